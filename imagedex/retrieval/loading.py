"""Opens a model that writes identifiers, with those it learned: whatever goes wrong is said in one line."""

from dataclasses import dataclass

import torch

from imagedex.checkpoints import (
    FAILURES,
    MODEL_FLAG,
    dtype_on,
    is_empty_tokenizer,
    one_line,
    read_model_type,
    require_whole,
    source_of,
    why_not,
)
from imagedex.errors import UserError
from imagedex.modeling import GENERATIVE
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor


@dataclass
class GenerativeModel:
    """A model that writes identifiers, and what it needs to be asked.

    Attributes:
        name: as the user named it.
        model: T5ForConditionalGeneration, CodebookT5 or VisionGroundedT5.
        processor: `RetrievalProcessor`; of a T5, which reads no pictures, `SentenceProcessor`.
        identifiers: of the pictures (or documents) it learned.
    """

    name: str
    model: torch.nn.Module
    processor: SentenceProcessor
    identifiers: Identifiers


def load_generative(name_or_path: str, device="cpu") -> GenerativeModel:
    """Loads a T5, CodebookT5 or VisionGroundedT5 with the identifiers it learned, by this repository's code.

    Args: device, see `load_dual_encoder`.

    Raises:
        UserError: the model cannot be loaded, is of another type (named), brings no identifiers or no tokenizer, or its
            identifiers are not made of its tokens.
    """
    model_type, shown = read_model_type(name_or_path), f"--{MODEL_FLAG} {name_or_path}"
    source = source_of(name_or_path)
    if model_type not in GENERATIVE:
        raise UserError(f"{shown} is a {model_type} model, which writes no identifiers")
    identifiers = load_identifiers(name_or_path)
    what = "processor"
    try:
        processor = (SentenceProcessor if model_type == "t5" else RetrievalProcessor).from_pretrained(source)
        if is_empty_tokenizer(processor.tokenizer):
            raise UserError(f"{shown} brings no tokenizer; save the one it was trained with beside it")
        what = "model"
        options = {"dtype": dtype_on(device), "output_loading_info": True}
        model, report = GENERATIVE[model_type].from_pretrained(source, **options)
    except FAILURES as error:
        raise UserError(f"cannot load the {what} of {shown}: {why_not(error)}") from error
    require_whole(report, model_type, shown)
    try:
        identifiers.check_tokenizer(processor.tokenizer)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from error
    if identifiers.trie.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{shown}: its identifiers use token {identifiers.trie.vocab_size - 1}, but it has only "
            f"{model.config.vocab_size} tokens; the identifiers are those of another model"
        )
    return GenerativeModel(name_or_path, model.to(device).eval(), processor, identifiers)


def load_identifiers(name_or_path: str) -> Identifiers:
    """The identifiers that a generative model brings. Raises `UserError`: there are none, or they are broken."""
    try:
        return Identifiers.from_pretrained(source_of(name_or_path))
    except OSError as error:
        raise UserError(
            f"--{MODEL_FLAG} {name_or_path} brings no identifiers.json, so it can name no picture; give the output folder "
            "of run_dsi.py"
        ) from error
    except ValueError as error:
        raise UserError(f"--{MODEL_FLAG} {name_or_path}: {one_line(error)}") from error
