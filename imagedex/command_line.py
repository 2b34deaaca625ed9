"""The command line all scripts share: a recipe first, flags over it, one clear line for a mistake."""

import dataclasses
import difflib
import json
import os
import sys
from dataclasses import field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from imagedex.errors import LocalUserError, UserError

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


class Parser(HfArgumentParser):
    """HfArgumentParser whose complaint is one line (argparse prints the usage of every training argument first)."""

    def error(self, message):
        raise UserError(message)


def read_recipe(path: Path) -> dict:
    """A flat mapping of argument names to values, from YAML or JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    try:
        recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(
            f"the recipe {path} is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} must be a mapping of arguments to values")
    return recipe


def suggestion(name: str, known) -> str:
    """The end of a complaint about an unknown name: the closest known one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists what there is"


def apply_recipe(parser: Parser, recipe: dict, path: Path) -> None:
    """Makes the recipe's values the parser's defaults. Unknown names and values outside an argument's choices are refused."""
    actions = {}  # a flag that is on by default has a second action, --no_flag, with the same dest
    for action in parser._actions:
        actions.setdefault(action.dest, action)
    for name, value in recipe.items():
        if name not in actions:
            raise UserError(f"the recipe {path} has an unknown argument {name!r}{suggestion(name, actions)}")
        action = actions[name]
        if action.choices and value is not None and value not in action.choices:
            raise UserError(
                f"the recipe {path} says {name}: {value}; it is one of {', '.join(map(str, action.choices))}"
            )
        if isinstance(value, str) and action.type in (int, float):  # YAML reads 1e-4 as a string
            try:
                value = action.type(value)
            except ValueError as error:
                raise UserError(f"the recipe {path} says {name}: {value!r}, which is not a number") from error
        action.required = False
        parser.set_defaults(**{name: value})


def parse_arguments(dataclass_types, description: str, argv: list[str] | None = None) -> tuple:
    """Fills the dataclasses from `[RECIPE] --flag value ...`; flags override the recipe. Raises `UserError`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclass_types, description=description, allow_abbrev=False)
    parser.usage = "%(prog)s [RECIPE.yaml|RECIPE.json] [--argument value ...]"
    if argv and argv[0].endswith(RECIPE_SUFFIXES):
        path = Path(argv.pop(0))
        apply_recipe(parser, read_recipe(path), path)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {name}{suggestion(name, parser._option_string_actions)}")
    values, filled = vars(namespace), []
    for dataclass_type in parser.dataclass_types:
        names = {field.name for field in dataclasses.fields(dataclass_type) if field.init}
        try:
            filled.append(dataclass_type(**{name: values[name] for name in names}))
        except (ValueError, TypeError) as error:  # the checks of a dataclass's __post_init__
            raise UserError(" ".join(str(error).split())) from error
    return tuple(filled)


def run(main) -> None:
    """Calls `main()`. A `UserError` becomes one line on standard error and exit status 2; other errors keep their traceback."""
    try:
        main()
    except UserError as error:
        line = f"error: {without_traceback(error)}"
        if isinstance(error, LocalUserError):  # met on the way, when a progress bar stands on the line
            print(f"\n{line}", file=sys.stderr)
        elif int(os.environ.get("RANK", "0")) == 0:  # every process fails alike; one of them says so
            print(line, file=sys.stderr)
        sys.exit(2)


def without_traceback(error: UserError) -> str:
    """The message. An error from a DataLoader worker comes with the worker's traceback before it, in one text."""
    return str(error).rsplit(f"{type(error).__module__}.{type(error).__name__}: ", 1)[-1].strip()


def argument(help: str, default=None, **kwargs):
    """A dataclass field with its help text. A mutable default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


def read_mapping(name: str, value, key: str, example: str):
    """A mapping (from a recipe) or its JSON text (from the command line) that has `key`; None stays None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} is not valid JSON ({error}); give a mapping with its {key}") from None
    if value is not None and (not isinstance(value, dict) or key not in value):
        raise ValueError(f"--{name} must be a mapping with a {key}, for example {example}")
    return value


def read_config(name: str, value):
    """A tower's configuration, a mapping or JSON text."""
    return read_mapping(name, value, "model_type", "{'model_type': 'vit'}")
