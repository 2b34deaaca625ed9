"""Maria's retriever (arXiv 2105.13073), as its training saves it, into a folder that this repository loads.

    python -m imagedex.training.dual_encoder.convert_maria BEST.pth runs/maria
    python run_retrieval.py --model_name_or_path runs/maria --image_dir photos --queries questions.txt --output_dir found

BEST.pth is the state dict (BEST.pth.model beside it is a pickled program and is not read). Configuration and tokenizer of
the towers come from their names; every weight comes from the file.
"""

import pickle
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from imagedex import command_line, files
from imagedex.checkpoints import from_hub
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.image_processor import build_image_processor
from imagedex.training.towers import forget_folders

IMAGE_PROCESSOR = {  # xmatching/main.py, valid_transform
    "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": "bilinear",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
MARIA = {  # what the file does not tell
    "text_pooling": "first", "vision_pooling": "pooler", "text_head": "mlp", "vision_head": "mlp", "head_dropout": 0.2,
    "freeze_text_tower": True, "freeze_vision_tower": True, "loss_type": "paired_hinge",
    "loss_margin": 0.5, "loss_reduction": "sum", "mask_same_image": False, "negatives": "local",
}  # fmt: skip

MAX_TEXT_LENGTH = 75  # --max-len

# BERT's pooler and what old versions kept as buffers: in the file, used by neither model
UNUSED = re.compile(r"lang_model\.backbone\.(pooler\..*|embeddings\.position_ids)|.*\.num_batches_tracked")

# torchvision's names of a ResNet's parts -> those of transformers' ResNetModel; timm's are torchvision's
RESNET_NAMES = [
    (r"conv1\.(\w+)", r"embedder.embedder.convolution.\1"),
    (r"bn1\.(\w+)", r"embedder.embedder.normalization.\1"),
    (r"layer(\d+)\.(\d+)\.conv(\d+)\.(\w+)", r"encoder.stages.{1}.layers.\2.layer.{3}.convolution.\4"),
    (r"layer(\d+)\.(\d+)\.bn(\d+)\.(\w+)", r"encoder.stages.{1}.layers.\2.layer.{3}.normalization.\4"),
    (r"layer(\d+)\.(\d+)\.downsample\.0\.(\w+)", r"encoder.stages.{1}.layers.\2.shortcut.convolution.\3"),
    (r"layer(\d+)\.(\d+)\.downsample\.1\.(\w+)", r"encoder.stages.{1}.layers.\2.shortcut.normalization.\3"),
]


def resnet_name(name: str) -> str | None:
    """`layer1.0.conv2.weight` -> `encoder.stages.0.layers.0.layer.1.convolution.weight`; None for a part it has not."""
    for theirs, ours in RESNET_NAMES:
        if match := re.fullmatch(theirs, name):
            counted_from_zero = re.sub(r"\{(\d)\}", lambda group: str(int(match[int(group[1])]) - 1), ours)
            return match.expand(counted_from_zero)
    return None


def our_name(name: str, vision_type: str) -> str | None:
    """A name in the original's state dict -> in XMatchingModel's; None when it has no counterpart."""
    side, _, rest = name.partition(".")
    side = {"lang_model": "text", "visn_model": "vision"}.get(side)
    if match := re.fullmatch(r"mlp\.linears\.(\d+)\.(weight|bias)", rest):
        return f"{side}_head.layers.{match[1]}.{match[2]}" if side else None
    if not rest.startswith("backbone."):
        return None
    rest = rest.removeprefix("backbone.")
    if side == "text":
        return f"text_model.{rest}"
    rest = f"timm_model.{rest}" if vision_type == "timm_wrapper" else resnet_name(rest)
    return f"vision_model.{rest}" if side and rest else None


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Tensors by name, without the `module.` of DistributedDataParallel. Runs no code from the file. Raises `UserError`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is not a state dict that can be read without running its code; give BEST.pth, not BEST.pth.model"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path} is not a state dict: it holds something else than tensors by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def head_sizes(state: dict, side: str) -> list[int]:
    """Widths of a head, input first, from the shapes of its layers. Raises `UserError`."""
    weights = []
    while (weight := state.get(f"{side}.mlp.linears.{len(weights)}.weight")) is not None:
        weights.append(weight)
    if not weights:
        hint = "; it looks like Vokenization's matcher of words" if f"{side}.mlp.0.weight" in state else ""
        raise UserError(f"this is not Maria's retriever: it has no {side}.mlp.linears.0.weight{hint}")
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


def build_config(state: dict, text_config, vision_config) -> XMatchingConfig:
    """Widths as in the file, the rest as in Maria. Raises `UserError`."""
    if text_config.model_type != "bert" or vision_config.model_type not in ("timm_wrapper", "resnet"):
        found = f"{text_config.model_type} and {vision_config.model_type}"
        raise UserError(f"the towers are BERT and a ResNet (timm's, or a plain one of transformers), not {found}")
    text, vision = head_sizes(state, "lang_model"), head_sizes(state, "visn_model")
    if text[1:] != vision[1:]:
        raise UserError(f"the two heads differ ({text[1:]} and {vision[1:]}); Maria's are alike")
    if text[0] % text_config.hidden_size:
        raise UserError(f"the text head takes {text[0]} values, no multiple of the tower's {text_config.hidden_size}")
    return XMatchingConfig(
        text_config=text_config.to_dict(),
        vision_config=vision_config.to_dict(),
        text_pooling_layers=text[0] // text_config.hidden_size,
        head_hidden_sizes=text[1:-1],
        projection_dim=text[-1],
        **MARIA,
    )


def load(state: dict, config: XMatchingConfig) -> tuple[XMatchingModel, list[str]]:
    """The model with the file's weights, and the names left out because neither model uses them. Raises `UserError`."""
    unused = [name for name in state if UNUSED.fullmatch(name)]
    names = {name: our_name(name, config.vision_config.model_type) for name in state.keys() - set(unused)}
    strange = sorted(name for name, ours in names.items() if ours is None)
    if strange:
        raise UserError(f"{len(strange)} weights are not those of Maria's retriever, the first is {strange[0]}")
    try:
        model = XMatchingModel(config)
    except (ImportError, ValueError, RuntimeError) as error:  # timm is not installed, or has no such network
        raise UserError(f"the towers cannot be made: {' '.join(str(error).split())[:300]}") from error
    try:
        found = model.load_state_dict({ours: state[name] for name, ours in names.items()}, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"the weights have other shapes than the towers: {str(error).splitlines()[-1].strip()}"
        ) from error
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    for problem, wrong in (("lacks", missing), ("has, beyond the towers,", found.unexpected_keys)):
        if wrong:
            raise UserError(f"the file {problem} {len(wrong)} weights, the first is {wrong[0]}; name its own towers")
    return model.eval(), unused


def save(model, processor, folder: Path) -> None:
    """Model, processor and code; the folder appears when it is whole."""
    forget_folders(model.config)
    with files.whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def main(argv=None):
    parser = command_line.Parser([], description=__doc__, prog="python -m imagedex.training.dual_encoder.convert_maria")
    parser.add_argument("state_dict", metavar="BEST.pth", help="the original's state dict")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="a folder that does not exist yet, or is empty")
    parser.add_argument("--text_model_name_or_path", default="bert-base-uncased", help="configuration and tokenizer")
    parser.add_argument("--vision_model_name_or_path", default="timm/resnext101_32x8d.tv_in1k", help="configuration")
    args = parser.parse_args(argv)
    folder = files.check_output_dir(args.output_dir, {}, record="conversion.json")

    state = read_state_dict(args.state_dict)
    text_config, vision_config = (
        from_hub(AutoConfig.from_pretrained, getattr(args, name), name)
        for name in ("text_model_name_or_path", "vision_model_name_or_path")
    )
    tokenizer = from_hub(AutoTokenizer.from_pretrained, args.text_model_name_or_path, "text_model_name_or_path")
    model, unused = load(state, build_config(state, text_config, vision_config))
    image_processor = build_image_processor(IMAGE_PROCESSOR)
    save(model, RetrievalProcessor(image_processor, tokenizer, max_text_length=MAX_TEXT_LENGTH), folder)
    print(f"{len(state) - len(unused)} tensors taken, {len(unused)} left out: {', '.join(sorted(unused)) or 'none'}")
    print(f"model, processor and code: {folder}")


if __name__ == "__main__":
    command_line.run(main)
