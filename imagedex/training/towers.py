"""Builds the dual encoder and its processor from the arguments: a trained model, or two towers, each pretrained or new."""

import logging
import os

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ViTImageProcessorPil
from transformers.utils import logging as hf_logging

from configuration.configuration_xmatching import XMatchingConfig
from imagedex.cli import suggestion
from imagedex.errors import UserError
from imagedex.hub import hub_reason
from imagedex.training.arguments import ModelArguments, XMatchingArguments
from imagedex.training.image_processor import build_image_processor, output_size
from imagedex.training.tokenizer import train_tokenizer
from modeling.modeling_xmatching import XMatchingModel
from modeling.processing_xmatching import XMatchingProcessor

logger = logging.getLogger(__name__)


def from_hub(loader, name: str, argument: str, **kwargs):
    """`loader(name)`; a name that cannot be loaded is the user's mistake, said with the argument it came from."""
    if os.sep in name and not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"--{argument} {name}: there is no such folder")
    try:
        return loader(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = (None if os.path.isdir(name) else hub_reason(error)) or " ".join(str(error).split())[:300]
        raise UserError(f"--{argument} {name} cannot be loaded: {reason}") from error


def build_tower_config(value: dict | None, argument: str, **overrides):
    """A mapping with model_type -> the configuration object; overrides fill what the mapping leaves open."""
    if value is None:
        return None
    fields = {name: field for name, field in value.items() if name != "model_type"}
    try:
        default = AutoConfig.for_model(value["model_type"])
        known = default.to_dict().keys() | default.attribute_map.keys()
        for name in fields:
            if name not in known:  # transformers would keep it as an attribute that nothing reads
                raise UserError(
                    f"--{argument}: a {value['model_type']} config has no {name!r}{suggestion(name, known)}"
                )
        return AutoConfig.for_model(value["model_type"], **{k: v for k, v in overrides.items() if k in known} | fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"--{argument}: {' '.join(str(error).split())[:300]}") from error


def check_towers(model: ModelArguments, xmatching: XMatchingArguments) -> None:
    """Before anything is read: each tower comes from exactly one place, and what is there is of the right kind."""
    if model.image_processor_config:
        if model.image_processor_name:
            raise UserError("give --image_processor_name or --image_processor_config, not both")
        build_image_processor(model.image_processor_config)
    towers = {
        "text_model_name_or_path": xmatching.text_model_name_or_path,
        "text_config": xmatching.text_config,
        "vision_model_name_or_path": model.vision_model_name_or_path,
        "vision_config": model.vision_config,
    }
    given = [name for name, value in towers.items() if value]
    whole = "model_name_or_path" if model.model_name_or_path else "config_name"
    name = model.model_name_or_path or model.config_name
    if name:
        if given:
            raise UserError(f"--{whole} brings both towers, so --{given[0]} cannot be given with it")
        found = from_hub(PreTrainedConfig.get_config_dict, name, whole)[0].get("model_type", "nameless")
        if found != XMatchingConfig.model_type:
            raise UserError(f"--{whole} {name} is a {found} model; this script trains xmatching models")
        return
    for side in ("text", "vision"):
        pretrained, config = f"{side}_model_name_or_path", f"{side}_config"
        if bool(towers[pretrained]) == bool(towers[config]):
            problem = "both given for" if towers[config] else "no"
            raise UserError(f"{problem} {side} tower: give --{pretrained} (pretrained) or --{config} (from scratch)")
        if towers[config]:
            build_tower_config(towers[config], config)
        else:
            from_hub(AutoConfig.from_pretrained, towers[pretrained], pretrained)


def first_given(**names) -> tuple[str, str] | None:
    """The first argument that names something, and what it names."""
    return next(((argument, name) for argument, name in names.items() if name), None)


def build_processor(model: ModelArguments, xmatching: XMatchingArguments, image_size, captions) -> XMatchingProcessor:
    """Tokenizer and image processor of the towers, or the one that image_processor_config describes; where a tower is new,
    a tokenizer trained on the captions and plain resizing to `image_size` (or the size in vision_config)."""
    found = first_given(
        tokenizer_name=model.tokenizer_name,
        model_name_or_path=model.model_name_or_path,
        text_model_name_or_path=xmatching.text_model_name_or_path,
    )
    if found:
        tokenizer = from_hub(AutoTokenizer.from_pretrained, found[1], found[0])
    else:
        tokenizer = train_tokenizer(captions, model.tokenizer_vocab_size)
    image_processor = choose_image_processor(model, model.model_name_or_path, image_size)
    return XMatchingProcessor(image_processor=image_processor, tokenizer=tokenizer)


def choose_image_processor(model: ModelArguments, whole: str | None, image_size: int | None):
    """The image processor that is described, named, or brought by the whole model or the vision tower; else plain resizing.

    Args: whole, the trained model or checkpoint to start from. Raises `UserError`.
    """
    if model.image_processor_config:
        if image_size:
            raise UserError("the size of pictures is in --image_processor_config; leave --image_size out")
        return build_image_processor(model.image_processor_config)
    found = first_given(
        image_processor_name=model.image_processor_name,
        model_name_or_path=whole,
        vision_model_name_or_path=model.vision_model_name_or_path,
    )
    if found:
        return from_hub(AutoImageProcessor.from_pretrained, found[1], found[0])
    side = image_size or (model.vision_config or {}).get("image_size") or 224
    return ViTImageProcessorPil(size={"height": side, "width": side})


def build_model(model: ModelArguments, xmatching: XMatchingArguments, processor: XMatchingProcessor) -> XMatchingModel:
    """The model in the processor's sizes. Raises `UserError` for a checkpoint of another kind or sizes that do not fit."""
    fields = xmatching.config_fields()
    hf_logging.set_verbosity_error()  # the load report lists heads that are new on purpose
    try:
        name = model.model_name_or_path or model.config_name
        if name:
            config = XMatchingConfig.from_pretrained(name, **fields)
            if model.model_name_or_path:
                return XMatchingModel.from_pretrained(name, config=config)
            for field, value in tokenizer_fields(processor.tokenizer).items():
                setattr(config.text_config, field, value)
            return XMatchingModel(config)
        pixels = output_size(processor.image_processor)
        sizes = {"image_size": pixels[0]} if pixels and pixels[0] == pixels[1] else {}
        return XMatchingModel.from_text_vision_pretrained(
            xmatching.text_model_name_or_path,
            model.vision_model_name_or_path,
            text_config=build_tower_config(
                xmatching.text_config, "text_config", **tokenizer_fields(processor.tokenizer)
            ),
            vision_config=build_tower_config(model.vision_config, "vision_config", **sizes),
            **fields,
        )
    except (ValueError, OSError, ImportError) as error:  # ImportError: a timm tower, and timm is not installed
        raise UserError(" ".join(str(error).split())[:400]) from error
    finally:
        hf_logging.set_verbosity_warning()


def tokenizer_fields(tokenizer) -> dict:
    """What a new text tower's config takes from the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
