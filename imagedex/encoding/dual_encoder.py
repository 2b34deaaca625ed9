"""Opens a dual encoder, ours or any other with `get_text_features` and `get_image_features` (CLIP, SigLIP, ...)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from imagedex.bounds import check_pixels
from imagedex.checkpoints import (
    MODEL_FLAG,
    check_tokenizer,
    dtype_on,
    loading,
    read_model_type,
    require_whole,
    source_of,
)
from imagedex.encoding.vectors import encode_texts
from imagedex.errors import UserError
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor

logger = logging.getLogger(__name__)


@dataclass
class DualEncoder:
    """A model with `get_text_features` and `get_image_features`, and what prepares its inputs.

    Attributes:
        name: as the user named it.
        tokenizer: of an XMatchingModel its whole processor, which knows how sentences are written.
        text_kwargs: what the model's own processor passes to its tokenizer (padding, length), see `encode_texts`.
        bank: of an XMatchingModel's training captions, against hubs; None where it has none.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    image_processor: object
    text_kwargs: dict = field(default_factory=dict)
    bank: CaptionBank | None = None

    def encode(self, sentences: Sequence[str], **options) -> torch.Tensor:
        """(Q, D) vectors of sentences, see `encode_texts`, whose options these are."""
        return encode_texts(self.model, self.tokenizer, sentences, text_kwargs=self.text_kwargs, **options)


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
    source, dtype = source_of(name_or_path), dtype_on(device)
    with loading(f"--{flag} {name_or_path}"):
        if model_type == "xmatching":
            model, report = XMatchingModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
            processor = RetrievalProcessor.from_pretrained(source)
        else:
            options = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
            model, report = AutoModel.from_pretrained(source, dtype=dtype, **options)
            _require_dual_encoder(model, name_or_path, model_type, flag)
            processor = _load_processor(source, trust_remote_code)
    require_whole(report, model_type, f"--{flag} {name_or_path}")
    tokenizer, image_processor = getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)
    check_tokenizer(tokenizer, f"--{flag} {name_or_path}")
    if image_processor is None:
        raise UserError(f"--{flag} {name_or_path} brings no image processor; save the model's processor beside it")
    check_pixels(image_processor, f"--{flag} {name_or_path}")
    if isinstance(processor, RetrievalProcessor):
        tokenizer = processor
    text_kwargs = dict(getattr(processor, "text_kwargs", None) or {})
    bank = getattr(model, "caption_bank", None)
    return DualEncoder(name_or_path, model.to(device).eval(), tokenizer, image_processor, text_kwargs, bank)


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
    except Exception as error:  # there is none, or it is broken in any way
        logger.debug("no processor in %s: %s", source, error)
    if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
        return processor
    return _Parts(
        AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code),
        AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code),
    )
