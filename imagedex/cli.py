"""The command line all scripts share: a recipe first, flags over it, one clear line for a mistake."""

import dataclasses
import difflib
import json
import os
import sys
import tempfile
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


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Writes beside the target and renames: a reader sees the old file or the whole new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_output_dir(output_dir: str | Path, arguments: dict, record: str) -> Path:
    """Refuses an output folder that cannot be written or that belongs to a run with other arguments; writes nothing.

    Args: arguments, what makes two runs the same (JSON values); record, the file in the folder that keeps them
    (written by the script with `write_atomically` once its inputs are known to be good).
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; give a folder")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # asks the file system itself: permissions do not bind root
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({existing}: {error.strerror})") from error
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    try:
        before = json.loads((folder / record).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--output_dir {folder} is not empty and not a run of this script; give another folder"
        ) from None
    arguments = json.loads(json.dumps(arguments))
    differing = sorted(name for name in before.keys() | arguments.keys() if before.get(name) != arguments.get(name))
    if differing:
        shown = ", ".join(f"{name} ({before.get(name)!r} then, {arguments.get(name)!r} now)" for name in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"--output_dir {folder} holds a run with other arguments: {shown}{more}; give another folder")
    return folder
