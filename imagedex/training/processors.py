"""The processor of a model that is to be trained: how it will read pictures and sentences, then and ever after."""

from types import SimpleNamespace

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, ViTImageProcessorPil
from transformers.utils import PROCESSOR_NAME, cached_file

from imagedex.bounds import check_pixels
from imagedex.checkpoints import check_tokenizer, from_hub
from imagedex.encoding.vectors import PADDED_TO_MAX_LENGTH, text_length_limit
from imagedex.errors import UserError
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.modeling.two_towers import is_two_towers
from imagedex.training.arguments import ModelArguments
from imagedex.training.image_processor import build_image_processor, check_sides
from imagedex.training.tokenizer import train_tokenizer

NEW = {
    "prompt": "",
    "clean_text": False,
    "max_text_length": 75,
    "padding": "longest",
}  # of a new model, where nothing else is said


def build_processor(
    model: ModelArguments,
    whole: tuple[str, str | None],
    text_tower: str | None,
    image_size: int | None,
    texts,
    style: dict,
    with_pictures: bool = True,
    new_prompt: str = "",
) -> SentenceProcessor:
    """Tokenizer and image processor: those named, those of the whole model or of the towers; where a tower is new, a tokenizer
    trained on the texts and plain resizing.

    Args:
        whole: the argument that names a trained model or checkpoint to start from, and the name (None: there is none).
        texts: to train a tokenizer on, an iterable; read only where one is needed.
        style: `prompt`, `clean_text`, `max_text_length`; None: as the whole model was trained, as a CLIP or SigLIP reads whose
            halves the towers are, else `NEW`.
        new_prompt: of a model that does not know its own.

    Raises: `UserError`.
    """
    brought = None
    if whole[1]:
        kind = RetrievalProcessor if with_pictures else SentenceProcessor
        brought = from_hub(kind.from_pretrained, whole[1], whole[0])
    default = NEW | {"prompt": new_prompt}
    if brought is not None and brings_processor(whole[1]):
        default = {name: getattr(brought, name) for name in NEW}
    if model.tokenizer_name and not (brought and whole[0] == "resume_from_checkpoint"):
        tokenizer = from_hub(AutoTokenizer.from_pretrained, model.tokenizer_name, "tokenizer_name")
    elif brought is not None:
        tokenizer = brought.tokenizer
    elif text_tower:
        tokenizer = from_hub(AutoTokenizer.from_pretrained, text_tower, "text_model_name_or_path")
    else:
        tokenizer = train_tokenizer(texts, model.tokenizer_vocab_size)
    named = model.tokenizer_name or whole[1] or text_tower
    if named:
        check_tokenizer(tokenizer, named)
    if brought is None and is_two_towers(text_tower, model.vision_model_name_or_path):
        default |= reading_of(text_tower, tokenizer)
    style = default | {name: value for name, value in style.items() if value is not None}
    if not with_pictures:
        return SentenceProcessor(tokenizer, **style)
    image_processor = choose_image_processor(model, getattr(brought, "image_processor", None), image_size)
    return RetrievalProcessor(image_processor, tokenizer, **style)


def reading_of(two_towers: str, tokenizer) -> dict:
    """How a CLIP or SigLIP reads sentences: as long as its positions go; padded to that length where it was trained so."""
    config = AutoConfig.from_pretrained(two_towers, trust_remote_code=False)
    padding = "max_length" if config.model_type in PADDED_TO_MAX_LENGTH else "longest"
    return {"max_text_length": text_length_limit(SimpleNamespace(config=config), tokenizer), "padding": padding}


def brings_processor(name_or_path: str) -> bool:
    """Whether a model says how it reads; a plain T5 of somebody else's has a tokenizer alone."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name_or_path, PROCESSOR_NAME, **options) is not None


def choose_image_processor(model: ModelArguments, brought, image_size: int | None):
    """The image processor that is described, named, or brought by the whole model or the vision tower; else plain resizing.

    Pillow resizes on every machine, whether or not torchvision is there (timm's own processor alone uses that).
    """
    if model.image_processor_config:
        if image_size:
            raise UserError("the size of pictures is in --image_processor_config; leave --image_size out")
        return build_image_processor(model.image_processor_config)
    for argument in ("image_processor_name", "vision_model_name_or_path"):
        name = getattr(model, argument)
        if name and not (brought and argument == "vision_model_name_or_path"):
            found = from_hub(AutoImageProcessor.from_pretrained, name, argument, backend="pil")
            check_pixels(found, f"--{argument} {name}")
            return found
    if brought is not None:
        check_pixels(brought, f"--model_name_or_path {model.model_name_or_path}")
        return brought
    side = image_size or (model.vision_config or {}).get("image_size") or 224
    check_sides(side, "pictures are to have a side")
    return ViTImageProcessorPil(size={"height": side, "width": side})
