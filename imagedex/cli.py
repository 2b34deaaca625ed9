"""The console command `imagedex`: one subcommand a script, and the list of recipes."""

import importlib
import sys

from imagedex import __version__, endings, recipe
from imagedex.errors import UserError

# subcommand -> the script whose main() it is, and what it does
COMMANDS = {
    "xmatching": (
        "run_xmatching",
        "train and evaluate the dual encoder: a sentence's and a picture's vector, compared",
    ),
    "image-indexing": (
        "run_image_indexing",
        "teach a generative model the pictures: picture -> identifier, or -> caption",
    ),
    "dsi": ("run_dsi", "train and evaluate a generative retriever: caption (or question) -> identifier"),
    "retrieval": ("run_retrieval", "ask trained models: sentences in; rankings, figures and a contact sheet out"),
}
# subcommands of imagedex.commands
GALLERY = {
    "index": "make a gallery of pictures, or bring it in step with them",
    "remove": "take pictures out of a gallery",
    "search": "find pictures in a gallery: a sentence or a picture in, pictures out",
    "serve": "search a gallery in a browser, and a JSON endpoint",
    "export": "write a gallery's vectors as Parquet",
}
RECIPES, CLEAR_KEPT = "recipes", "clear-kept"
LISTED = (
    GALLERY
    | {name: does for name, (_, does) in COMMANDS.items()}
    | {
        RECIPES: "list the recipes: settings to begin with",
        CLEAR_KEPT: "remove what --keep_states has kept on disk",
    }
)
PLAIN_HELP = {
    RECIPES: "usage: imagedex recipes\n\nLists the recipes that come with imagedex; each can be named from any folder.",
    CLEAR_KEPT: "usage: imagedex clear-kept [FOLDER]\n\nRemoves what --keep_states has kept: in the folder that was given as "
    "--keep_dir, or in the default one.",
}


def help_text() -> str:
    width = max(map(len, LISTED))
    lines = [f"  {name:{width}}  {does}" for name, does in LISTED.items()]
    return "\n".join(
        [
            "usage: imagedex COMMAND [RECIPE] [--argument value ...]",
            "",
            "Find pictures from sentences.",
            "",
            *lines,
            "",
            "imagedex COMMAND --help explains a command's arguments; imagedex --version says which imagedex this is.",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    endings.run(lambda: answer(sys.argv[1:] if argv is None else argv))


def answer(argv: list[str]) -> None:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"imagedex {__version__}")
    elif name in PLAIN_HELP and argv[1:] and argv[1] in ("-h", "--help"):
        print(PLAIN_HELP[name])
    else:
        carry_out(name, argv[1:])


def clear_kept(folder: str | None = None) -> str:
    """Removes what was kept in the folder (the default one); says what that was."""
    from pathlib import Path

    from imagedex.training import kept

    where = Path(folder).expanduser() if folder else kept.default_keep_dir()
    sizes = kept.clear_kept(where)
    lines = [f"{size / 1e6:12,.1f} MB  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()) / 1e6:,.1f} MB removed from {where}"])


def carry_out(name: str, argv: list[str]) -> None:
    """Raises `UserError`."""
    if name == RECIPES:
        if argv:
            raise UserError(f"imagedex recipes takes no arguments: {argv[0]}")
        print("\n".join(recipe.listing()))
    elif name == CLEAR_KEPT:
        if argv[1:] or (argv and argv[0].startswith("-")):
            raise UserError(f"imagedex clear-kept takes one folder, or none: {' '.join(argv)}")
        print(clear_kept(*argv))
    elif name in GALLERY:
        from imagedex import commands

        commands.COMMANDS[name](argv)
    elif name in COMMANDS:
        script = importlib.import_module(f"imagedex.{COMMANDS[name][0]}")
        script.main(argv, prog=f"imagedex {name}")
    else:
        from imagedex.command_line import suggestion  # brings transformers, which the help does not wait for

        raise UserError(f"imagedex has no command {name}{suggestion(name, LISTED)}")
