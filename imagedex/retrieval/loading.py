"""A saved model, by folder or Hub id, made ready to encode or to answer: whatever goes wrong is said in one line."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    T5ForConditionalGeneration,
)

from imagedex.errors import UserError
from imagedex.hub import hub_reason
from modeling.identifiers import Identifiers
from modeling.modeling_codebook_t5 import CodebookT5
from modeling.modeling_vision_grounded_t5 import VisionGroundedT5

logger = logging.getLogger(__name__)

# what from_pretrained raises for a user's mistake
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)

# models that write identifiers
GENERATIVE = {"t5": T5ForConditionalGeneration, "codebook_t5": CodebookT5, "vision_grounded_t5": VisionGroundedT5}
MODEL_FLAG = "model_name_or_path"


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


@dataclass
class GenerativeModel:
    """A model that writes identifiers, and what it needs to be asked.

    Attributes:
        name: as the user named it.
        model: T5ForConditionalGeneration, CodebookT5 or VisionGroundedT5.
        image_processor: None of a T5, which reads no pictures.
        identifiers: of the pictures (or documents) it learned.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    image_processor: object | None
    identifiers: Identifiers


def read_model_type(name_or_path: str, flag: str = MODEL_FLAG) -> str:
    """The `model_type` of a folder's or Hub id's config.json, without loading the model.

    Args: flag, which argument named it, for messages.

    Raises:
        UserError: no such folder or Hub model, or no config.json in it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"--{flag} {name_or_path} has no config.json, so it is not a saved model")
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if not folder.is_dir() and (looks_like_path or folder.exists()):
        raise UserError(f"--{flag} {name_or_path} is not a folder; give a model's folder or its Hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(folder) if folder.is_dir() else name_or_path)
    except _FAILURES as error:
        reason = f"its config.json is broken ({_one_line(error)})" if folder.is_dir() else hub_reason(error)
        raise UserError(f"cannot load --{flag} {name_or_path}: {reason or _one_line(error)}") from error
    if not config.get("model_type"):
        raise UserError(f"--{flag} {name_or_path}: its config.json names no model_type")
    return config["model_type"]


def load_dual_encoder(
    name_or_path: str, trust_remote_code: bool = False, device="cpu", flag: str = MODEL_FLAG
) -> DualEncoder:
    """Loads an XMatchingModel with this repository's code, other dual encoders (CLIP, SigLIP, ...) through AutoModel.

    Args:
        trust_remote_code: run code that comes with the checkpoint, for models transformers does not know.
        device: where to put it. On a CPU the weights are float32, elsewhere of the precision they were saved in.
        flag: which argument named it, for messages.

    Raises:
        UserError: the model cannot be loaded, is not a dual encoder (its type is named), or brings no tokenizer or no
            image processor.
    """
    model_type = read_model_type(name_or_path, flag)
    source, dtype = _source(name_or_path), _dtype(device)
    try:
        if model_type == "xmatching":
            from modeling.modeling_xmatching import XMatchingModel
            from modeling.processing_xmatching import XMatchingProcessor

            model, report = XMatchingModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
            processor = XMatchingProcessor.from_pretrained(source)
        else:
            options = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
            model, report = AutoModel.from_pretrained(source, dtype=dtype, **options)
            _require_dual_encoder(model, name_or_path, model_type, flag)
            processor = _load_processor(source, trust_remote_code)
    except _FAILURES as error:
        raise UserError(f"cannot load --{flag} {name_or_path}: {_reason(error)}") from error
    _require_whole(report, model_type, f"--{flag} {name_or_path}")
    tokenizer, image_processor = getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)
    for missing, is_missing in (("tokenizer", _is_empty(tokenizer)), ("image processor", image_processor is None)):
        if is_missing:
            raise UserError(f"--{flag} {name_or_path} brings no {missing}; save the model's processor beside it")
    text_kwargs = dict(getattr(processor, "text_kwargs", None) or {})
    return DualEncoder(name_or_path, model.to(device).eval(), tokenizer, image_processor, text_kwargs)


def load_generative(name_or_path: str, device="cpu") -> GenerativeModel:
    """Loads a T5, CodebookT5 or VisionGroundedT5 with the identifiers it learned, by this repository's code.

    Args: device, see `load_dual_encoder`.

    Raises:
        UserError: the model cannot be loaded, is of another type (named), brings no identifiers or no tokenizer, or its
            identifiers are not made of its tokens.
    """
    model_type, shown = read_model_type(name_or_path), f"--{MODEL_FLAG} {name_or_path}"
    source = _source(name_or_path)
    if model_type not in GENERATIVE:
        raise UserError(f"{shown} is a {model_type} model, which writes no identifiers")
    identifiers = load_identifiers(name_or_path)
    what, tokenizer, image_processor = "tokenizer", None, None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if _is_empty(tokenizer):
            raise UserError(f"{shown} brings no tokenizer; save the one it was trained with beside it")
        what = "image processor"
        if model_type != "t5":
            image_processor = AutoImageProcessor.from_pretrained(source)
        what = "model"
        options = {"dtype": _dtype(device), "output_loading_info": True}
        model, report = GENERATIVE[model_type].from_pretrained(source, **options)
    except _FAILURES as error:
        raise UserError(f"cannot load the {what} of {shown}: {_reason(error)}") from error
    _require_whole(report, model_type, shown)
    try:
        identifiers.check_tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from error
    if identifiers.trie.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{shown}: its identifiers use token {identifiers.trie.vocab_size - 1}, but it has only "
            f"{model.config.vocab_size} tokens; the identifiers are those of another model"
        )
    return GenerativeModel(name_or_path, model.to(device).eval(), tokenizer, image_processor, identifiers)


def load_identifiers(name_or_path: str) -> Identifiers:
    """The identifiers that a generative model brings. Raises `UserError`: there are none, or they are broken."""
    try:
        return Identifiers.from_pretrained(_source(name_or_path))
    except OSError as error:
        raise UserError(
            f"--{MODEL_FLAG} {name_or_path} brings no identifiers.json, so it can name no picture; give the output folder "
            "of run_dsi.py"
        ) from error
    except ValueError as error:
        raise UserError(f"--{MODEL_FLAG} {name_or_path}: {_one_line(error)}") from error


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


def _source(name_or_path: str) -> str:
    """What from_pretrained is to be given: the folder, if it is one."""
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else name_or_path


def _dtype(device):
    return torch.float32 if torch.device(device).type == "cpu" else "auto"


def _reason(error: BaseException) -> str:
    """Why a model cannot be loaded, in one line."""
    reason = _one_line(error)
    if "trust_remote_code" in str(error):
        reason += "; pass --trust_remote_code to run the code it brings"
    elif "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other shapes than its config.json says"
    return reason


def _require_whole(report: dict, model_type: str, shown: str) -> None:
    """transformers only warns of missing weights and draws them at random, which would give figures that mean nothing."""
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise UserError(
            f"{shown} lacks {len(lacking)} weights of its {model_type} model, the first is {lacking[0]}; it is the "
            "checkpoint of another model, or not a whole one"
        )


def _is_empty(tokenizer) -> bool:
    """Where a folder has no tokenizer files, transformers 5 makes an empty tokenizer of the model's class, silently."""
    return tokenizer is None or len(tokenizer) <= len(set(tokenizer.all_special_ids))


def _require_dual_encoder(model, name_or_path: str, model_type: str, flag: str) -> None:
    lacking = [name for name in ("get_text_features", "get_image_features") if not hasattr(model, name)]
    if lacking:
        raise UserError(
            f"--{flag} {name_or_path} is a {model_type} model ({type(model).__name__}) without "
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
