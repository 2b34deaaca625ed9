"""What can be wrong with the parts of a generative model, found before anything is read."""

from transformers import AutoConfig, T5Config

from imagedex.checkpoints import from_hub, read_model_type
from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.indexed import IndexedSplits
from imagedex.errors import UserError
from imagedex.modeling import GENERATIVE
from imagedex.modeling.identifiers import FACTS_FILE
from imagedex.training.arguments import ModelArguments
from imagedex.training.generative.arguments import T5Arguments
from imagedex.training.generative.identify import brought_identifiers
from imagedex.training.image_processor import check_image_processor
from imagedex.training.towers import build_tower_config, check_pictures, check_timm, check_tower

WITH_PICTURES = ("codebook_t5", "vision_grounded_t5")


def check_model(
    model: ModelArguments,
    t5: T5Arguments,
    image_size: int | None = None,
    indexing: bool = False,
    needs_identifiers: bool = False,
) -> str:
    """Which model it is, before anything is read: it comes from exactly one place, and its parts fit its kind and the pictures.

    Args: indexing, whether this is the script that teaches pictures alone; needs_identifiers, whether a model is judged as it
    is. Raises `UserError`.
    """
    allowed = WITH_PICTURES if indexing else tuple(GENERATIVE)
    whole = "model_name_or_path" if model.model_name_or_path else "config_name"
    name = model.model_name_or_path or model.config_name
    if name:
        kind = read_model_type(name, whole)
        if kind not in allowed:
            raise UserError(f"--{whole} {name} is a {kind} model; this script trains {', '.join(allowed)}")
        if t5.model_type not in (None, kind):
            raise UserError(f"--{whole} {name} is a {kind} model, but --model_type says {t5.model_type}; leave it out")
    else:
        kind = t5.model_type
        if kind is None:
            raise UserError(f"no model: give --model_type ({', '.join(allowed)}) or --model_name_or_path")
        if kind not in allowed:
            raise UserError(f"--model_type {kind}: this script trains {', '.join(allowed)}")
    check_image_processor(model.image_processor_name, model.image_processor_config)
    if kind == "vision_grounded_t5" and not indexing:
        check_second_step(model)
    _check_parts(model, t5, kind, whole if name else None)
    if model.model_name_or_path and brought_identifiers(model.model_name_or_path) is None and needs_identifiers:
        raise UserError(
            f"--model_name_or_path {model.model_name_or_path} has no {FACTS_FILE}, so nobody knows which identifier names "
            "which item; lay the one of its training beside it, or give --do_train to teach it new ones"
        )
    if kind in WITH_PICTURES:
        check_pictures(model, image_size)
    return kind


def check_corpus(kind: str, splits: IndexedSplits, data: CorpusArguments) -> None:
    """Raises `UserError` when documents are to be indexed by a model of pictures."""
    if splits.documents and kind != "t5":
        raise UserError(f"--dataset_name {data.dataset_name} holds documents, and a {kind} indexes pictures; give a t5")


def check_second_step(model: ModelArguments) -> None:
    """Raises `UserError` when vision_grounded_t5 is to be taught captions before it has learned the pictures."""
    name = model.model_name_or_path
    if brought_identifiers(name) is None:
        raise UserError(
            "vision_grounded_t5 learns pictures first and captions second, and this is the second step: give "
            "--model_name_or_path the output folder of run_image_indexing.py"
            + (f" ({name} brings no identifiers)" if name else "")
        )


def _check_parts(model: ModelArguments, t5: T5Arguments, kind: str, whole: str | None) -> None:
    sides = {
        "T5": ("text_model_name_or_path", "t5_config"),
        "vision tower": ("vision_model_name_or_path", "vision_config"),
    }
    given = {name: getattr(t5, name, None) or getattr(model, name, None) for names in sides.values() for name in names}
    if kind == "t5":
        for name in sides.pop("vision tower"):
            if given[name]:
                raise UserError(
                    f"--{name}: a t5 reads no pictures; give --model_type codebook_t5 or vision_grounded_t5"
                )
    known = GENERATIVE[kind].config_class().to_dict().keys() - T5Config().to_dict().keys() if kind != "t5" else set()
    for name in t5.config_fields():
        if name not in known:
            raise UserError(f"--{name}: a {kind} has no such field")
    for side, names in sides.items():
        there = [name for name in names if given[name]]
        if whole and there:
            raise UserError(f"--{whole} brings its {side}, so --{there[0]} cannot be given with it")
        if not whole and len(there) != 1:
            raise UserError(
                f"{'both given for the' if there else 'no'} {side}: give --{names[0]} (pretrained) or --{names[1]} (from "
                "scratch)"
            )
    if t5.t5_start == "lexical" and (whole or not given["t5_config"]):
        raise UserError("--t5_start lexical is for a T5 from scratch; give --t5_config, or leave it out")
    if given["t5_config"]:
        if given["t5_config"]["model_type"] != "t5":
            raise UserError(f"--t5_config has model_type {given['t5_config']['model_type']}; it must be t5")
        check_tower(build_tower_config(given["t5_config"], "t5_config"), "t5_config")
    if given["vision_config"]:
        check_tower(build_tower_config(given["vision_config"], "vision_config"), "vision_config")
    for name in ("text_model_name_or_path", "vision_model_name_or_path"):
        if given[name]:
            config = from_hub(AutoConfig.from_pretrained, given[name], name)
            check_timm(config, name)
            if name.startswith("text") and config.model_type != "t5":
                raise UserError(f"--{name} {given[name]} is a {config.model_type} model; a t5 is needed")
