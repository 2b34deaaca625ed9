"""A model that writes identifiers, opened with those it learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from imagedex.checkpoints import (
    MODEL_FLAG,
    check_tokenizer,
    dtype_on,
    loading,
    one_line,
    read_model_type,
    require_whole,
    source_of,
    take_style,
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


def load_generative(name_or_path: str, device="cpu", flag: str = MODEL_FLAG) -> GenerativeModel:
    """Loads a T5, CodebookT5 or VisionGroundedT5 with the identifiers it learned, by this repository's code.

    Args: device and flag, see `load_dual_encoder`.

    Raises:
        UserError: the model cannot be loaded, is of another type (named), brings no identifiers or no tokenizer, or its
            identifiers are not made of its tokens.
    """
    model_type, shown = read_model_type(name_or_path, flag), f"--{flag} {name_or_path}"
    source = source_of(name_or_path)
    if model_type not in GENERATIVE:
        raise UserError(f"{shown} is a {model_type} model, which writes no identifiers")
    identifiers = load_identifiers(name_or_path, shown)
    with loading(f"the processor of {shown}"):
        processor = (SentenceProcessor if model_type == "t5" else RetrievalProcessor).from_pretrained(source)
        check_tokenizer(processor.tokenizer, shown)
        for name, value in take_style(identifiers).items():
            setattr(processor, name, value)
    with loading(f"the model of {shown}"):
        options = {"dtype": dtype_on(device), "output_loading_info": True}
        model, report = GENERATIVE[model_type].from_pretrained(source, **options)
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


def load_identifiers(name_or_path: str, shown: str) -> Identifiers:
    """The identifiers that a generative model brings. Raises `UserError`: there are none, or they are broken."""
    try:
        return Identifiers.from_pretrained(source_of(name_or_path))
    except OSError as error:
        raise UserError(
            f"{shown} brings no identifiers.json, so it can name no picture; give the output folder of run_dsi.py"
        ) from error
    except ValueError as error:
        raise UserError(f"{shown}: {one_line(error)}") from error


def without_identifier(
    shown: str, identifiers: Identifiers, image_ids: Sequence[str], may_add: bool, noun: str = "pictures"
) -> list[str]:
    """The gallery's pictures that have no identifier yet, in its order.

    Args: shown, the model as the message names it; may_add, whether they are to get one (else they are refused).

    Raises:
        UserError: there are some and they may not be added, or the gallery has nothing in common with the identifiers.
    """
    missing = [image_id for image_id in image_ids if image_id not in identifiers]
    if len(missing) == len(image_ids):
        raise UserError(
            f"{shown} has identifiers of {len(identifiers)} {noun}, and not one of the {len(image_ids)} in the gallery is "
            f"among them (theirs are named like {identifiers.image_ids[0]!r}, the gallery's like {missing[0]!r}); give the "
            "gallery it was trained on, from the same root"
        )
    if missing and not may_add:
        raise UserError(
            f"{shown} has identifiers of {len(identifiers)} {noun}, but {len(missing)} of the {len(image_ids)} in the gallery "
            f"have none, the first is {missing[0]!r}; give the gallery it was trained on, train with these too, or add them "
            "with --add_new_images"
        )
    return missing
