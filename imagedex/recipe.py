"""A recipe: found by its name, read, and put aside where the command line says an alternative."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from imagedex import DATA
from imagedex.errors import UserError

SUFFIXES = (".yaml", ".yml", ".json")
RECIPES = DATA / "recipes"

WHOLE = ("model_name_or_path", "config_name")
TEXT_TOWER = ("text_model_name_or_path", "text_config", "t5_config", "t5_start")
VISION_TOWER = ("vision_model_name_or_path", "vision_config")
NO_STREAM = (
    "keep_pixels", "keep_states", "held_out_captions_per_image", "held_out_images", "compare_with_baselines",
    "max_train_samples", "max_images", "captions_per_image", "shuffle_every_epoch",
)  # fmt: skip

# An argument given on the command line -> what of a recipe gives way to it, since the scripts refuse the two together.
ALTERNATIVES = {
    "dataset_name": ("train_file", "validation_file"),
    "train_file": ("dataset_name", "validation_file"),
    "validation_file": ("dataset_name",),
    "held_out_captions_per_image": ("held_out_images",),
    "held_out_images": ("held_out_captions_per_image",),
    "model_name_or_path": ("config_name", *TEXT_TOWER, *VISION_TOWER),
    "config_name": ("model_name_or_path", *TEXT_TOWER, *VISION_TOWER),
    "text_model_name_or_path": (*WHOLE, "text_config", "t5_config", "t5_start"),
    "text_config": (*WHOLE, "text_model_name_or_path"),
    "t5_config": (*WHOLE, "text_model_name_or_path"),
    "vision_model_name_or_path": (*WHOLE, "vision_config"),
    "vision_config": (*WHOLE, "vision_model_name_or_path"),
    "image_processor_name": ("image_processor_config",),
    "image_processor_config": ("image_processor_name", "image_size"),
    "image_size": ("image_processor_config",),
    "image_augmentation": ("keep_pixels",),
    "keep_pixels": ("image_augmentation",),
    "lora_rank": ("keep_states",),
    "keep_states": ("lora_rank",),
    "five_fold": ("compare_with_baselines", "compare_with_model"),
    "compare_with_baselines": ("five_fold",),
    "compare_with_model": ("five_fold",),
    "streaming": NO_STREAM,
}
# What is said of something that gives way goes with it.
GOES_WITH = {
    "lora_rank": ("lora_alpha", "lora_dropout", "lora_target_modules"),
    "dataset_name": (
        "dataset_config_name",
        "image_dir",
        "visual_genome_dir",
        "image_column",
        "caption_column",
        "max_images",
        "captions_per_image",
        "draw_seed",
    ),
    "train_file": ("image_dir", "image_column", "caption_column"),
    "held_out_images": ("eval_gallery",),
    "image_augmentation": ("random_crop_scale", "random_flip"),
}


def alternatives(name: str, values: dict) -> tuple[str, ...]:
    """What gives way to an argument. Args: values, of all arguments, the recipe's among them."""
    if name == "dataset_name" and values.get("streaming"):
        return ("validation_file",)  # beside --train_file SHARDS it is the corpus to evaluate on
    if name == "validation_file" and not values.get("train_file"):
        return ()  # it cannot stand in for the corpus
    return ALTERNATIVES.get(name, ())


def give_way(values: dict, recipe: dict, typed: set[str], defaults: dict) -> str:
    """Sets what of the recipe gives way to the command line back to its default. Returns the line that says so, or "".

    Args:
        values: of all arguments, by name; changed in place.
        recipe: names that the recipe sets.
        typed: names that the command line sets.
        defaults: by name, of neither recipe nor command line.
    """

    def said(name):
        return name in recipe and name not in typed and name in values and values[name] != defaults[name]

    lines = []
    for name in sorted(typed):
        if not values[name] or values[name] == defaults[name]:  # switched off: that is no alternative to anything
            continue
        aside = [other for other in alternatives(name, values) if said(other)]
        aside += [other for given in aside for other in GOES_WITH.get(given, ()) if said(other)]
        for other in aside:
            values[other] = defaults[other]
        if aside:
            lines.append(f"{', '.join(aside)} {'give' if aside[1:] else 'gives'} way to --{name}")
    return f"of the recipe, {'; '.join(lines)}" if lines else ""


def shipped() -> dict[str, Path]:
    """The recipes that come with imagedex: `photos/xmatching` -> its file."""
    paths = sorted(path for path in RECIPES.rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


def find(name: str) -> tuple[Path, bool]:
    """The recipe's file, and whether it was found by name: a file there is, or a recipe that comes with imagedex, named
    `recipes/photos/xmatching.yaml`, `photos/xmatching.yaml` or `photos/xmatching`. Raises `UserError`."""
    path = Path(name)
    if path.is_file():
        return path, False
    short = (path.with_suffix("") if path.suffix in SUFFIXES else path).as_posix().removeprefix("recipes/")
    known = shipped()
    if short not in known:
        close = difflib.get_close_matches("/".join(short.split("/")[-2:]), known, n=3)
        there_are = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"no recipe {name}: neither a file nor one that comes with imagedex; {there_are}")
    return known[short], True


class Loader(yaml.SafeLoader):
    """YAML that says each thing once: a name twice, of which the last would count, is refused, and so are aliases, by which a few
    lines can stand for more than any memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, f"write the value of *{event.anchor} out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = [[self.construct_object(part, deep=True) for part in pair] for pair in node.value]
        return unique(pairs)


def unique(pairs) -> dict:
    """The mapping of these (name, value). Raises a `ValueError` for a name that stands there twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = value
    return found


def read(path: Path) -> dict:
    """A flat mapping of argument names to values, from YAML or JSON. Raises `UserError`."""
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = json.loads(text, object_pairs_hook=unique) if kind == "JSON" else yaml.load(text, Loader)  # noqa: S506
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"the recipe {path} is nested too deeply; it is a mapping of arguments to values") from error
    # ValueError: not UTF-8, a date or number that is none, a name twice; TypeError: a list as a name
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"the recipe {path} is not valid {kind}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} must be a mapping of arguments to values")
    for name in recipe:
        if not isinstance(name, str):
            raise UserError(f"the recipe {path} has {name!r} where the name of an argument stands")
    return recipe


def listing() -> Iterator[str]:
    """A line for each recipe that comes with imagedex: its name, and how the comment at its head begins."""
    known = shipped()
    width = max(map(len, known))
    for name, path in known.items():
        yield f"{name:{width}}  {head(path)}"


def head(path: Path) -> str:
    """The first sentence of the comment at a recipe's head."""
    comment = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not line.startswith("# "):
                break
            comment.append(line.strip("#\n "))
    return " ".join(comment).partition(". ")[0].rstrip(".")
