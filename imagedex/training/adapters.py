"""LoRA (2106.09685): beside each linear layer of a frozen tower a product of two small matrices learns, nothing else of it.

What is saved is the model with these products added to their layers: an ordinary XMatchingModel that needs no peft. A checkpoint
has beside it `adapters.safetensors`, everything that trains, so that a run goes on with the very numbers it stopped at.
"""

import logging
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from imagedex.errors import UserError

logger = logging.getLogger(__name__)

ADAPTERS = "adapters.safetensors"
NAME = "default"  # peft's, of the one adapter that a layer has here


def linear_layers(tower: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Names of the layers that get an adapter: every linear one, or those linear and convolutional ones whose name ends with one
    of the targets. Those within torch's MultiheadAttention (SigLIP's head) are read, never called, so none would learn."""
    kinds = (nn.Linear, nn.Conv2d) if targets else nn.Linear
    modules = dict(tower.named_modules())
    read = {name for name, module in modules.items() if isinstance(module, nn.MultiheadAttention)}
    found = [n for n, m in modules.items() if isinstance(m, kinds) and n.rpartition(".")[0] not in read]
    return [n for n in found if not targets or n.rpartition(".")[2] in targets]


def reaches(tower: nn.Module, args) -> bool:
    """Whether a run with these arguments gives the tower adapters, where it is frozen, or gave them."""
    return bool(args.lora_rank) and (has_adapters(tower) or bool(linear_layers(tower, args.lora_target_modules)))


def has_adapters(module: nn.Module) -> bool:
    return any(hasattr(part, "lora_A") for part in module.modules())


def adapter_layers(model, args) -> dict[str, list[str]]:
    """Of each frozen tower the layers that get adapters. Raises `UserError` where no tower is frozen, or no layer is meant.

    Args: args, with `lora_rank` and `lora_target_modules` (None: every linear layer).
    """
    frozen = [side for side in ("text", "vision") if model.is_frozen(side)]
    if not frozen:
        raise UserError("--lora_rank fine-tunes frozen towers, and here both are trained as a whole; leave it out")
    layers = {side: linear_layers(model.tower(side), args.lora_target_modules) for side in frozen}
    for side, names in layers.items():
        if not names and (args.lora_target_modules or len(layers) == 1):
            kinds = sorted({name.rpartition(".")[2] for name in linear_layers(model.tower(side))})
            raise UserError(
                f"--lora_rank: no layer of the {side} tower is meant; its linear ones are {', '.join(kinds) or 'none'}"
            )
    return layers


def add_adapters(model, args) -> None:
    """Gives every frozen tower its adapters, of which nothing is felt before the first step; what they are is logged.

    Args: args, as in `adapter_layers`, with `lora_alpha` (None: twice the rank) and `lora_dropout`.
    """
    import peft

    layers = adapter_layers(model, args)
    for side, names in layers.items():
        if not names:
            logger.warning("the %s tower has no linear layer for --lora_rank: it stays as it is", side)
            continue
        alpha = args.lora_alpha or 2 * args.lora_rank
        config = peft.LoraConfig(
            r=args.lora_rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=names
        )
        peft.inject_adapter_in_model(config, model.tower(side))
    counts = " and ".join(f"{len(names)} layers of the {side} tower" for side, names in layers.items() if names)
    numbers = [sum(p.numel() for p in model.parameters() if p.requires_grad or whole) for whole in (False, True)]
    logger.info(
        "LoRA of rank %d beside %s: %s of %s numbers train", args.lora_rank, counts, *(f"{n:,}" for n in numbers)
    )


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the model has without adapters, each product added to its layer. The model itself stays as it is."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    weights = {}
    for name, value in model.state_dict().items():
        layer, _, rest = name.partition(".base_layer.")
        if layer in layers:
            if rest == "weight":
                value = value + layers[layer].get_delta_weight(NAME).to(value)
            weights[f"{layer}.{rest}"] = value
        elif not any(part.startswith("lora_") for part in name.split(".")):
            weights[name] = value
    return weights


def moving_parts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the state dict what training moves: adapters, heads, scale, a tower trained as a whole with its batch statistics."""
    resting = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in resting}


def save_adapters(model: nn.Module, folder: Path | str) -> None:
    parts = {name: value.detach().cpu().contiguous() for name, value in moving_parts(model).items()}
    safetensors.torch.save_file(parts, Path(folder, ADAPTERS))


def load_adapters(model: nn.Module, folder: Path | str) -> None:
    """What `save_adapters` wrote there, into the model with its adapters. Raises `UserError` for a checkpoint of another kind."""
    path = Path(folder, ADAPTERS)
    if not path.exists():
        raise UserError(f"{folder} was not saved by a training with --lora_rank: it has no {ADAPTERS}")
    parts = safetensors.torch.load_file(path)
    if parts.keys() != moving_parts(model).keys():
        raise UserError(f"{path} holds other adapters than these arguments make")
    model.load_state_dict(parts, strict=False)
