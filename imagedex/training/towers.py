"""Builds the dual encoder and its processor from the arguments: a trained model, or two towers, each pretrained or new."""

import logging

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import is_timm_available, is_torchvision_available
from transformers.utils import logging as hf_logging

from imagedex.bounds import PIXELS, Bounds
from imagedex.checkpoints import from_hub, one_line, read_model_type, source_of, why_not
from imagedex.command_line import suggestion
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.modeling.two_towers import is_two_towers, load_two_towers, own_fields
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments
from imagedex.training.image_processor import check_image_processor, output_size
from imagedex.training.processors import choose_image_processor
from imagedex.training.publishing import public_name
from imagedex.training.trainer_parts import trained_model

logger = logging.getLogger(__name__)

MOST_PARAMETERS = 10**11


def build_tower_config(value: dict | None, argument: str, **overrides):
    """A mapping with model_type -> the configuration object; overrides fill what the mapping leaves open."""
    if value is None:
        return None
    fields = {name: field for name, field in value.items() if name != "model_type"}
    if not isinstance(value["model_type"], str):
        raise UserError(f"--{argument}: model_type is {value['model_type']!r}, not the name of one")
    try:
        default = AutoConfig.for_model(value["model_type"])
        known = default.to_dict().keys() | default.attribute_map.keys()
        for name in fields:
            if name not in known:  # transformers would keep it as an attribute that nothing reads
                raise UserError(
                    f"--{argument}: a {value['model_type']} config has no {name!r}{suggestion(name, known)}"
                )
        return AutoConfig.for_model(value["model_type"], **{k: v for k, v in overrides.items() if k in known} | fields)
    except UserError:
        raise
    except Exception as error:  # every config has its own ways
        raise UserError(f"--{argument}: {one_line(error)}") from error


def check_tower(config, argument: str) -> None:
    """Builds a tower without memory for its weights. Raises `UserError` for sizes that do not fit each other, or that no machine
    holds."""
    try:
        sizes = getattr(config, "image_size", None)
        for side in sizes if isinstance(sizes, list | tuple) else [sizes]:
            if side is not None and not Bounds(1, PIXELS).admit(side):
                raise UserError(f"--{argument}: image_size {side}; give {Bounds(1, PIXELS)}")
        with torch.device("meta"):
            tower = AutoModel.from_config(config)
        count = sum(parameter.numel() for parameter in tower.parameters())
        reads = "pictures" if tower.main_input_name == "pixel_values" else "texts"
    except UserError:
        raise
    except Exception as error:  # every tower has its own ways
        if "meta" in str(error):  # one that cannot be built so
            return
        raise UserError(f"--{argument}: no {config.model_type} can be made of it ({one_line(error)})") from error
    if reads != ("pictures" if argument.startswith("vision") else "texts"):
        raise UserError(f"--{argument}: a {config.model_type} reads {reads}")
    if count > MOST_PARAMETERS:
        raise UserError(f"--{argument}: this {config.model_type} would have {count:,} parameters; give smaller sizes")


def check_pictures(model: ModelArguments, image_size: int | None) -> None:
    """Whether the vision tower can read pictures of the size that they will have: one is read, without memory for the weights.
    Raises `UserError`."""
    whole, flag = model.model_name_or_path or model.config_name, "vision_model_name_or_path"
    if model.model_name_or_path and not (model.image_processor_name or model.image_processor_config):
        return  # it reads them as it was trained
    pixels = output_size(choose_image_processor(model, None, image_size))
    if whole:
        flag = "model_name_or_path" if model.model_name_or_path else "config_name"
        fields = PreTrainedConfig.get_config_dict(source_of(whole))[0].get("vision_config")
        config = build_tower_config(fields, flag)
    elif model.vision_config:
        flag, square = "vision_config", pixels and pixels[0] == pixels[1]
        config = build_tower_config(model.vision_config, flag, **({"image_size": pixels[0]} if square else {}))
    else:
        config = from_hub(AutoConfig.from_pretrained, model.vision_model_name_or_path, flag)
        config = getattr(config, "vision_config", config)
    if pixels and config is not None:
        read_blank(config, pixels, flag)


def read_blank(config, pixels: tuple[int, int], argument: str) -> None:
    """Args: pixels, (height, width). Raises `UserError`."""
    for device in ("meta", "cpu"):  # what fails without memory may work with it
        try:
            with torch.device(device):
                tower = AutoModel.from_config(config, dtype=torch.float32).eval()
        except Exception:  # one that cannot be built so; what is wrong with it is said where it is made
            return
        try:
            with torch.no_grad():
                tower(pixel_values=torch.zeros(1, 3, *pixels, device=device))
            return
        except Exception as error:  # every tower has its own ways
            reason = one_line(error)
    size = "x".join(map(str, pixels))
    raise UserError(
        f"--{argument}: this {config.model_type} cannot read pictures of {size} pixels ({reason}); give another size "
        "(--image_size or the image processor's), or patches and windows that fit it"
    )


def check_towers(model: ModelArguments, xmatching: XMatchingArguments, image_size: int | None = None) -> None:
    """Before anything is read: each tower comes from exactly one place, what is there is of the right kind, and it can read the
    pictures."""
    check_sources(model, xmatching)
    check_pictures(model, image_size)


def check_sources(model: ModelArguments, xmatching: XMatchingArguments) -> None:
    check_image_processor(model.image_processor_name, model.image_processor_config)
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
        found = read_model_type(name, whole)
        if found != XMatchingConfig.model_type:
            raise UserError(f"--{whole} {name} is a {found} model; this script trains xmatching models")
        return
    check_fields(xmatching)
    for side in ("text", "vision"):
        pretrained, config = f"{side}_model_name_or_path", f"{side}_config"
        if bool(towers[pretrained]) == bool(towers[config]):
            problem = "both given for" if towers[config] else "no"
            raise UserError(f"{problem} {side} tower: give --{pretrained} (pretrained) or --{config} (from scratch)")
        if towers[config]:
            check_tower(build_tower_config(towers[config], config), config)
        else:
            check_timm(from_hub(AutoConfig.from_pretrained, towers[pretrained], pretrained), pretrained)


def check_fields(xmatching: XMatchingArguments) -> None:
    """What is said of pooling, heads and loss, apart from the towers. Raises `UserError`."""
    try:
        XMatchingConfig(**xmatching.config_fields())
    except Exception as error:  # huggingface_hub's own, which is no ValueError
        raise UserError(one_line(error.__cause__ or error)) from error
    layers = (xmatching.text_config or {}).get("num_hidden_layers")
    if isinstance(layers, int) and (xmatching.text_pooling_layers or 1) > layers:
        raise UserError(
            f"--text_pooling_layers {xmatching.text_pooling_layers}, but the text tower has {layers} layers"
        )


def check_timm(config, argument: str) -> None:
    """Raises `UserError` when a tower is timm's and what it needs is not installed."""
    if config.model_type == "timm_wrapper" and not (is_timm_available() and is_torchvision_available()):
        raise UserError(f"--{argument} is a timm model, which needs timm and torchvision: pip install 'imagedex[timm]'")


def build_model(
    model: ModelArguments, xmatching: XMatchingArguments, processor: RetrievalProcessor, checkpoint: str | None = None
) -> XMatchingModel:
    """The model in the processor's sizes. Raises `UserError` for a checkpoint of another kind or sizes that do not fit.

    Args: checkpoint, of a run that goes on; its model stands for what the arguments name, see `trained_model`.
    """
    trained = trained_model(checkpoint) or model.model_name_or_path
    fields = xmatching.config_fields()
    if xmatching.text_config:
        fields["freeze_text_tower"] = decide_freezing("text", xmatching.freeze_text_tower)
    if model.vision_config:
        fields["freeze_vision_tower"] = decide_freezing("vision", xmatching.freeze_vision_tower)
    made = make_model(trained, model, xmatching, processor, fields)
    if model.config_name and not trained:
        warn_of_random_towers(made.config)
    forget_folders(made.config)
    return made


def make_model(
    trained: str | None,
    model: ModelArguments,
    xmatching: XMatchingArguments,
    processor: RetrievalProcessor,
    fields: dict,
) -> XMatchingModel:
    """Args: trained, a whole model; fields, of its config. Raises `UserError`, see `build_model`."""
    hf_logging.set_verbosity_error()  # the load report lists heads that are new on purpose
    try:
        if trained:
            # a closed form may have chosen fewer directions than the recipe allows
            fields.pop("projection_dim", None)
            return open_trained(XMatchingModel, trained, fields)
        if model.config_name:
            config = XMatchingConfig.from_pretrained(model.config_name, **fields)
            for field, value in tokenizer_fields(processor.tokenizer).items():
                setattr(config.text_config, field, value)
            return XMatchingModel(config)
        if is_two_towers(xmatching.text_model_name_or_path, model.vision_model_name_or_path):
            return start_as_two_towers(xmatching.text_model_name_or_path, fields)
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
    except Exception as error:  # sizes that do not fit, a package that a tower needs, weights that are broken
        raise of_parts(error) from error
    finally:
        hf_logging.set_verbosity_warning()


def of_parts(error: Exception) -> UserError:
    """Why a model cannot be made of the parts that were given."""
    return error if isinstance(error, UserError) else UserError(f"the model cannot be made: {why_not(error)}")


def open_trained(model_class, name: str, fields: dict):
    """A whole model, saved again as it was: transformers would write into the configs of its towers which type it read.

    Args: fields, of its config, given anew.
    """
    config = model_class.config_class.from_pretrained(name, **fields)
    dtypes = {
        part: getattr(config, part).dtype for part in config.sub_configs if getattr(config, part, None) is not None
    }
    model = model_class.from_pretrained(name, config=config)
    for part, dtype in dtypes.items():
        getattr(model.config, part).dtype = dtype
    return model


def start_as_two_towers(name: str, fields: dict) -> XMatchingModel:
    """As the CLIP or SigLIP of that name is, but for the fields that say otherwise; which is logged."""
    whole = load_two_towers(name)
    own = own_fields(whole)
    other = ", ".join(f"{field} {value}" for field, value in fields.items() if own.get(field, value) != value)
    but = f", but for {other}" if other else ""
    logger.info("both towers are halves of %s: the model starts as that is%s", public_name(name), but)
    return XMatchingModel.from_two_towers(whole, **fields)


def decide_freezing(side: str, given: bool | None) -> bool:
    """Whether a tower from scratch is frozen: only where that is asked for, and never in silence.

    Args: side, "text" or "vision".
    """
    flag = f"--freeze_{side}_tower"
    if given:
        logger.warning("the %s tower starts from scratch and stays at random weights, as %s says", side, flag)
        return True
    if given is None:
        logger.info("the %s tower starts from scratch, so it is trained; %s true would leave it random", side, flag)
    return False


def warn_of_random_towers(config) -> None:
    """Of a model from scratch whose config says what is frozen."""
    for side in ("text", "vision"):
        if getattr(config, f"freeze_{side}_tower", False):
            logger.warning(
                "the %s tower starts from scratch and stays at random weights, as the config says; "
                "--freeze_%s_tower false trains it",
                side,
                side,
            )


def forget_folders(config) -> None:
    """Of towers that came from a folder, a saved config keeps the folder's name and not where it lies on this machine."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if getattr(part, "_name_or_path", ""):
            part._name_or_path = public_name(part._name_or_path)


def tokenizer_fields(tokenizer) -> dict:
    """What a new text tower's config takes from the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
