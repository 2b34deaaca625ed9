"""The command line all scripts share: a recipe first, flags over it, one clear line for a mistake."""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from dataclasses import field
from enum import Enum
from pathlib import Path

from transformers import HfArgumentParser

from imagedex import endings, recipe
from imagedex.bounds import check_bounds
from imagedex.errors import UserError

run = endings.run  # what every script calls with its main

USAGE = "%(prog)s [RECIPE] [--argument value ...]\n       %(prog)s --help | --help_all"

LISTS = ("report_to", "optim_target_modules", "fsdp")  # a name, or a list of them
MAPPINGS = ("_config", "_kwargs", "deepspeed")  # how arguments end that may be a mapping

# Of the Trainer's arguments, what --help shows: the others are shown by --help_all.
MOST_USED = (
    "output_dir", "do_train", "do_eval", "do_predict", "num_train_epochs", "max_steps", "learning_rate",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "warmup_steps",
    "eval_strategy", "save_strategy", "load_best_model_at_end", "metric_for_best_model", "seed", "bf16", "report_to",
    "push_to_hub", "hub_model_id", "hub_strategy", "resume_from_checkpoint", "dataloader_num_workers",
)  # fmt: skip


class HelpFormatter(argparse.HelpFormatter):
    """One spelling of each flag, defaults where there are some, and indented lines (examples) as they stand."""

    def _fill_text(self, text, width, indent):
        wrap, paragraphs = super()._fill_text, text.strip().split("\n\n")
        return "\n\n".join(part if part.startswith("    ") else wrap(part, width, indent) for part in paragraphs)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = (
            "" if action.nargs == 0 else f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )
        return ", ".join(spellings(action)) + value

    def _get_default_metavar_for_optional(self, action):
        kinds = {"int": "N", "float": "X", "string_to_bool": "true|false"}
        return kinds.get(getattr(action.type, "__name__", None), "TEXT")

    def _get_help_string(self, action):
        default = action.default.value if isinstance(action.default, Enum) else action.default
        if default in (None, "", argparse.SUPPRESS) or action.nargs == 0:
            return action.help
        default = str(default).lower() if isinstance(default, bool) else default
        return f"{action.help or ''} (default: {str(default).replace('%', '%%')})"


def spellings(action: argparse.Action) -> list[str]:
    """Of a flag, without those that have hyphens where others have underscores."""
    found = [option for option in action.option_strings if "-" not in option.lstrip("-")]
    return found or action.option_strings[:1]


class Parser(HfArgumentParser):
    """HfArgumentParser whose complaint is one line (argparse prints the usage of every training argument first), and whose
    help shows our arguments first and of the Trainer's only the most used."""

    def __init__(self, dataclass_types=(), **kwargs):
        super().__init__(dataclass_types, formatter_class=HelpFormatter, **kwargs)
        if self.dataclass_types:
            self.add_argument(
                "--help_all", action=HelpAll, nargs=0, default=argparse.SUPPRESS,
                help="show every argument, the Trainer's too, and exit",
            )  # fmt: skip

    def error(self, message):
        for action in self._actions:  # argparse names every spelling
            message = message.replace("argument " + "/".join(action.option_strings), "/".join(spellings(action)))
        raise UserError(message)

    def _print_message(self, message, file=None):
        """As argparse, which would not say that the output is closed or full."""
        print(message, end="", file=file or sys.stdout)

    def _add_dataclass_arguments(self, dtype):
        super()._add_dataclass_arguments(dtype)
        group = dtype.__dict__.get("_argument_group_name")
        if group:  # what it is about is said by the first class of this group
            first = [base for base in dtype.__mro__ if base.__dict__.get("_argument_group_name") == group][-1]
            self._action_groups[-1].description = " ".join(first.__doc__.split("\n\n")[0].split())

    def format_help(self, everything: bool = False) -> str:
        if not self.dataclass_types:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, text, actions in self.sections(everything):
            if actions:
                formatter.start_section(title)
                formatter.add_text(text)
                formatter.add_arguments(action for action in actions if not is_complement(action))
                formatter.end_section()
        return formatter.format_help()

    def sections(self, everything: bool):
        """(title, text, actions) in the order of --help."""
        trainers = {name for dataclass_type in self.dataclass_types for name in trainer_fields(dataclass_type)}
        _, options, *groups = self._action_groups
        theirs = {action.dest: action for action in reversed(options._group_actions) if action.dest in trainers}
        ours = [action for action in options._group_actions if action.dest not in trainers]
        asks = [action for action in ours if action.dest in ("help", "help_all")]
        yield "help", None, asks
        for group in groups:
            yield group.title, group.description, group._group_actions
        yield "training", "Our additions to the Trainer's arguments.", [action for action in ours if action not in asks]
        used = [theirs[name] for name in MOST_USED if name in theirs]
        yield "the Trainer", "Those most used; --help_all lists the others.", used
        if everything:
            rest = [action for name, action in theirs.items() if name not in MOST_USED]
            yield "the Trainer's other arguments", None, rest[::-1]


class HelpAll(argparse.Action):
    """--help_all."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


def trainer_fields(dataclass_type) -> set[str]:
    """Names of the fields that a dataclass takes from transformers' TrainingArguments."""
    theirs = [base for base in dataclass_type.__mro__ if base.__module__.startswith("transformers.")]
    return {field.name for base in theirs if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)}


def is_complement(action: argparse.Action) -> bool:
    """Whether this is the --no_flag that HfArgumentParser adds to a flag that is on by default."""
    return isinstance(action, argparse._StoreFalseAction)


def suggestion(name: str, known) -> str:
    """The end of a complaint about an unknown name: the closest known one."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists what there is"


def apply_recipe(parser: Parser, values: dict, path: Path) -> None:
    """Makes the recipe's values the parser's defaults. Unknown names and values outside an argument's choices are refused."""
    actions = {}  # a flag that is on by default has a second action, --no_flag, with the same dest
    for action in parser._actions:
        actions.setdefault(action.dest, action)
    for name, value in values.items():
        if name not in actions:
            raise UserError(f"the recipe {path} has an unknown argument {name!r}{suggestion(name, actions)}")
        action = actions[name]
        if action.choices and value is not None and value not in action.choices:
            raise UserError(
                f"the recipe {path} says {name}: {value}; it is one of {', '.join(map(str, action.choices))}"
            )
        if value is None:  # as if it were not there
            continue
        try:
            value = converted(action, name, value)
        except ValueError as error:
            raise UserError(f"the recipe {path} says {name}: {str(value)[:100]!r}, which is {error}") from error
        action.required = False
        parser.set_defaults(**{name: value})


def converted(action: argparse.Action, name: str, value):
    """A recipe's value in the kind that its argument has. Raises a `ValueError` that says what it is not."""
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [converted(action, name, each) for each in value]
    kind = getattr(action.type, "__name__", None)
    if kind == "string_to_bool":
        if not isinstance(value, bool):
            raise ValueError("not true or false")
    elif action.type in (int, float):  # YAML reads 1e-4 as a string
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError("not a number")
        try:
            number = action.type(value)
        except (ValueError, OverflowError):
            raise ValueError("not a number") from None
        if action.type is int and isinstance(value, float) and number != value:
            raise ValueError("not a whole number")
        return value if isinstance(value, int) else number
    elif kind == "str" and not isinstance(value, str):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not (isinstance(value, dict) and name.endswith(MAPPINGS)) and not (
            isinstance(value, list) and name in LISTS
        ):
            raise ValueError("not text")
    elif isinstance(value, str) and "\0" in value:
        raise ValueError("not text that a file's name could have")
    return value


def parse_arguments(dataclass_types, description: str, argv: list[str] | None = None, prog: str | None = None) -> tuple:
    """Fills the dataclasses from `[RECIPE] --flag value ...`; flags override the recipe. Raises `UserError`.

    Args: prog: what was typed, by default the script's name; the description's examples are shown with it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if prog:
        description = re.sub(
            r"python run_(\w+)\.py", lambda script: f"imagedex {script[1].replace('_', '-')}", description
        )
    parser = Parser(dataclass_types, prog=prog, usage=USAGE, description=description, allow_abbrev=False)
    defaults = {action.dest: action.default for action in reversed(parser._actions)}
    given = {}
    if argv and not argv[0].startswith("-"):
        path, by_name = recipe.find(argv.pop(0))
        given = recipe.read(path)
        apply_recipe(parser, given, path)
        if by_name:
            say(f"recipe: {path}")
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {name}{suggestion(name, parser._option_string_actions)}")
    values = vars(namespace)
    flags = {word.split("=")[0] for word in argv} & parser._option_string_actions.keys()
    typed = frozenset(parser._option_string_actions[flag].dest for flag in flags)
    say(recipe.give_way(values, given, typed, defaults))
    filled = tuple(fill(dataclass_type, values) for dataclass_type in parser.dataclass_types)
    for arguments in filled:
        arguments.typed = typed  # no field: it is not part of what a run records
    return filled


def fill(dataclass_type, values: dict):
    """The dataclass with those of the values that it has fields for. Raises `UserError`."""
    values = {field.name: values[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
    try:
        check_bounds(dataclass_type, values)
        return dataclass_type(**values)
    except (ValueError, TypeError) as error:  # the checks of a dataclass's __post_init__
        raise UserError(" ".join(str(error).split())) from error


def say(line: str) -> None:
    """A line of the log, where it is not empty. Logging is set up once the arguments are known, which is later."""
    if line and int(os.environ.get("RANK", "0")) == 0:
        print(f"I {line}")


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
