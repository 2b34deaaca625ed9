"""Gradient caching (GradCache, 2101.06983): a contrastive batch of thousands at the memory of a chunk.

A contrastive loss needs the embeddings of the whole batch at once, but not the activations that made them. So:

1. every chunk is embedded without a graph, and the random state before it is kept;
2. the loss of all embeddings, gathered over processes where the model says so, gives a gradient for each embedding (the
   cache) and for the loss's own parameters (temperature, bias);
3. every chunk is embedded again, with the same dropout, and its cached gradients go backward through it.

The parameters get the gradient of the plain step; the price is one more forward pass. What looks at other rows of the
batch inside a tower (batch normalisation that trains) sees a chunk instead of the batch: `batch_statistics` finds it.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn


def batch_statistics(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise by what is in the batch at hand: batch norms in training mode."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if layer.training or not layer.track_running_stats]


@contextlib.contextmanager
def running_statistics_kept(model: nn.Module):
    """Batch norms use the statistics of the batch, but do not move their running ones: the second pass will."""
    layers = [layer for layer in batch_statistics(model) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state that dropout on `device` depends on: the CPU's, and the accelerator's where it is one."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    which = () if device.type == "mps" else (device,)  # there is only one
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(*which)


def set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        which = () if device.type == "mps" else (device,)
        torch.get_device_module(device).set_rng_state(state[1], *which)


def cached_step(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    chunk_size: int,
    *,
    core: nn.Module | None = None,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    no_sync: Callable = contextlib.nullcontext,
) -> torch.Tensor:
    """Forward and backward of one batch; adds to the parameters' `.grad` what the plain step would add.

    Args:
        model: takes a chunk of `inputs` and gives `text_embeds` and `image_embeds` (rows, D); may be wrapped for DDP.
        inputs: tensors of B rows each; `image_ids` go to the loss, the others to the model.
        chunk_size: rows that are embedded at once; the last chunk takes what is left.
        core: the `XMatchingModel` inside `model`, which has the loss; by default `model` itself.
        backward: what to do with the scalar whose gradient is wanted (an accelerator scales it before).
        no_sync: context in which gradients are not averaged over processes; entered for all chunks but the last.

    Returns:
        the loss of the batch, a scalar without a graph.
    """
    core = model if core is None else core
    inputs = dict(inputs)
    image_ids = inputs.pop("image_ids", None)
    split = {name: value.split(chunk_size) for name, value in inputs.items()}
    chunks = [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]
    device = next(iter(inputs.values())).device

    states, embeds = [], []
    with torch.no_grad(), running_statistics_kept(core):
        for chunk in chunks:
            states.append(random_state(device))
            output = model(**chunk, return_loss=False)
            embeds.append((output.text_embeds, output.image_embeds))
    text_embeds, image_embeds = (torch.cat(side).requires_grad_() for side in zip(*embeds, strict=True))  # (B, D)

    loss = core.batch_loss(text_embeds, image_embeds, image_ids)
    learned = [parameter for parameter in core.parameters(recurse=False) if parameter.requires_grad]
    text_cache, image_cache, *learned_cache = torch.autograd.grad(loss, [text_embeds, image_embeds, *learned])

    caches = zip(text_cache.split(chunk_size), image_cache.split(chunk_size), strict=True)
    for i, (chunk, state, (text_grad, image_grad)) in enumerate(zip(chunks, states, caches, strict=True)):
        last = i == len(chunks) - 1
        with contextlib.nullcontext() if last else no_sync():
            set_random_state(device, state)  # after the last chunk it is what the first pass left
            output = model(**chunk, return_loss=False)
            # a scalar whose gradient is the cached one
            surrogate = (output.text_embeds * text_grad).sum() + (output.image_embeds * image_grad).sum()
            if last:
                surrogate = surrogate + sum((p * g).sum() for p, g in zip(learned, learned_cache, strict=True))
            backward(surrogate)
    return loss.detach()
