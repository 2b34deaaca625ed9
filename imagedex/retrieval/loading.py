"""A saved model, by folder or Hub id, made ready to encode: whatever goes wrong is said in one line."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedConfig

from imagedex.errors import UserError
from imagedex.hub import hub_reason

logger = logging.getLogger(__name__)

# what from_pretrained raises for a user's mistake
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


@dataclass
class DualEncoder:
    """A model with `get_text_features` and `get_image_features`, and what prepares its inputs.

    Attributes:
        name: as the user named it.
        text_kwargs: what the model's own processor passes to its tokenizer (padding, length), see `encode_texts`.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    text_kwargs: dict = field(default_factory=dict)


def read_model_type(name_or_path: str) -> str:
    """The `model_type` of a folder's or Hub id's config.json, without loading the model.

    Raises:
        UserError: no such folder or Hub model, or no config.json in it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--model_name_or_path {name_or_path} has no config.json, so it is not a saved model")
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if not folder.is_dir() and (looks_like_path or folder.exists()):
        raise UserError(f"--model_name_or_path {name_or_path} is not a folder; give a model's folder or its Hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(folder) if folder.is_dir() else name_or_path)
    except _FAILURES as error:
        reason = f"its config.json is broken ({_one_line(error)})" if folder.is_dir() else hub_reason(error)
        raise UserError(f"cannot load --model_name_or_path {name_or_path}: {reason or _one_line(error)}") from error
    if not config.get("model_type"):
        raise UserError(f"--model_name_or_path {name_or_path}: its config.json names no model_type")
    return config["model_type"]


def load_dual_encoder(name_or_path: str, trust_remote_code: bool = False, device="cpu") -> DualEncoder:
    """Loads an XMatchingModel with this repository's code, other dual encoders (CLIP, SigLIP, ...) through AutoModel.

    Args:
        trust_remote_code: run code that comes with the checkpoint, for models transformers does not know.
        device: where to put it. On a CPU the weights are float32, elsewhere of the precision they were saved in.

    Raises:
        UserError: the model cannot be loaded, is not a dual encoder (its type is named), or brings no tokenizer or no
            image processor.
    """
    model_type = read_model_type(name_or_path)
    source = str(Path(name_or_path).expanduser()) if Path(name_or_path).expanduser().is_dir() else name_or_path
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        if model_type == "xmatching":
            from modeling.modeling_xmatching import XMatchingModel
            from modeling.processing_xmatching import XMatchingProcessor

            model, report = XMatchingModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
            processor = XMatchingProcessor.from_pretrained(source)
        else:
            options = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
            model, report = AutoModel.from_pretrained(source, dtype=dtype, **options)
            _require_dual_encoder(model, name_or_path, model_type)
            processor = _load_processor(source, trust_remote_code)
    except _FAILURES as error:
        reason = _one_line(error)
        if "trust_remote_code" in str(error):
            reason += "; pass --trust_remote_code to run the code it brings"
        elif "ignore_mismatched_sizes" in str(error):
            reason = "its weights have other shapes than its config.json says"
        raise UserError(f"cannot load --model_name_or_path {name_or_path}: {reason}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers only warns and draws them at random, which would give figures that mean nothing
        raise UserError(
            f"--model_name_or_path {name_or_path} lacks {len(lacking)} weights of its {model_type} model, the first is "
            f"{lacking[0]}; it is the checkpoint of another model, or not a whole one"
        )
    tokenizer, image_processor = getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)
    # Where a folder has no tokenizer files, transformers 5 makes an empty tokenizer of the model's class, silently.
    if tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        missing = "tokenizer"
    else:
        missing = "image processor" if image_processor is None else None
    if missing:
        raise UserError(
            f"--model_name_or_path {name_or_path} brings no {missing}; save the model's processor beside it"
        )
    text_kwargs = dict(getattr(processor, "text_kwargs", None) or {})
    return DualEncoder(name_or_path, model.to(device).eval(), tokenizer, image_processor, text_kwargs)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best one there is. Raises `UserError` when it is not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {_one_line(error)}") from error
    return device


def _require_dual_encoder(model, name_or_path: str, model_type: str) -> None:
    lacking = [name for name in ("get_text_features", "get_image_features") if not hasattr(model, name)]
    if lacking:
        raise UserError(
            f"--model_name_or_path {name_or_path} is a {model_type} model ({type(model).__name__}) without "
            f"{' and '.join(lacking)}; give an XMatchingModel, CLIP, SigLIP or another dual encoder"
        )


@dataclass
class _Parts:
    tokenizer: object
    image_processor: object


def _load_processor(source: str, trust_remote_code: bool):
    """The processor, or, where a checkpoint was saved without one, its tokenizer and image processor apart."""
    processor = None
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except _FAILURES as error:
        logger.debug("no processor in %s: %s", source, error)
    if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
        return processor
    return _Parts(
        AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code),
        AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code),
    )


def _one_line(error: BaseException, limit: int = 300) -> str:
    """The first paragraph of an error's message on one line."""
    text = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
