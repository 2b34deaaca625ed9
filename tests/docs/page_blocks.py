"""The fenced blocks of a page, and how each is carried out: every command and every snippet, one after the other."""

import importlib
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from docs.stand_ins import EARLIER, NOT_CODE, NOT_RUN, ROOT, SMALL, STREAMED, TEXTS

from imagedex.cli import GALLERY
from imagedex.command_line import parse_arguments
from imagedex.commands import PARSERS

SCRIPTS = ("run_xmatching", "run_image_indexing", "run_dsi", "run_retrieval")
SUBCOMMANDS = {name.removeprefix("run_").replace("_", "-"): name for name in SCRIPTS}
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Step:
    """A command line (continued lines joined), a snippet, or a block in no language.

    Attributes: language: "bash", "python" or "". line: where it stands on the page.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"


def steps_of(page: str) -> list[Step]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        language, content = block.groups()
        line = text[: block.start(2)].count("\n") + 1
        if language != "bash":
            found.append(Step(page, line, language, content))
            continue
        for command in re.finditer(r"(?:.*\\\n)*.*\n", content):
            joined = " ".join(command[0].replace("\\\n", " ").split())
            if joined and not joined.startswith("#"):
                found.append(Step(page, line + content[: command.start()].count("\n"), language, joined))
    return found


def how(step: Step) -> str:
    """ "script", "shell", "snippet", or the entry of a table that says why it is not run. Fails for what nobody thought of."""
    if step.language == "python":
        return "snippet"
    if not step.language:
        return next(first for first in NOT_CODE if step.text.startswith(first))
    assert step.language == "bash", f"{step}: blocks are bash, python or in no language"
    listed = [first for first in NOT_RUN if f"{step.text} ".startswith(f"{first} ")]
    if listed:
        return listed[0]
    if re.match(r"(python run_\w+\.py|imagedex) ", step.text):
        return "script"
    assert step.text.startswith("echo "), f"{step}: neither run nor listed in NOT_RUN"
    return "shell"


def words_of(command: str) -> list[str]:
    """As the shell splits it, comment left out."""
    return shlex.split(command, comments=True)


def split_command(command: str) -> tuple[str, list[str]]:
    """(script, its arguments) of `python run_x.py ...`, `run_x.py ...` or `imagedex x ...`."""
    words = words_of(command)
    if words[0] == "python":
        words = words[1:]
    if words[0] == "imagedex":
        return SUBCOMMANDS[words[1]], words[2:]
    return words[0].removesuffix(".py"), words[1:]


def parse(script: str, argv: list[str]) -> tuple:
    """What the script's own parser makes of these arguments. A recipe's name is as in a checkout. Raises `UserError`."""
    argv = [str(ROOT / argv[0]), *argv[1:]] if argv and (ROOT / argv[0]).is_file() else argv
    return parse_arguments(importlib.import_module(f"imagedex.{script}").ARGUMENTS, "", argv)


def instead(step: Step, first: str) -> None:
    """What is checked of a command that is not run."""
    words = words_of(step.text)
    if first == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
    elif first == "pip install .":
        check_extras(step.text)
    elif first == "accelerate launch":
        args = launch_command_parser().parse_args(words[2:])
        assert (ROOT / args.config_file).is_file()
        parse(args.training_script.removesuffix(".py"), [*args.training_script_args, "--use_cpu"])
    elif first == "imagedex serve":
        PARSERS["serve"]().parse_args(words[2:])
    elif first == "curl":
        server = importlib.import_module("imagedex.page.server")
        assert server.ROUTE + "/search" in step.text
        server.Asked.model_validate_json(words[words.index("-d") + 1])
    else:
        raise AssertionError(f"say what is checked instead of {step}")


def check_extras(text: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= set(known), text


def run_script(command: str) -> None:
    """In this process and folder, with small sizes."""
    words = words_of(command)
    if words[:2] == ["imagedex", "recipes"] or (words[0] == "imagedex" and words[1] in GALLERY):
        importlib.import_module("imagedex.cli").main(words[1:])
        return
    script, argv = split_command(command)
    argv += SMALL["retrieval" if script == "run_retrieval" else "training"].split()
    argv += STREAMED.split() if "--streaming" in argv else []
    if words[0] == "imagedex":
        importlib.import_module("imagedex.cli").main([words[1], *argv])
    else:
        importlib.import_module(f"imagedex.{script}").main(argv)


def with_stand_ins(text: str) -> str:
    for name, stand_in in TEXTS.items():
        text = text.replace(name, stand_in)
    return text


def taken_for_granted(text: str) -> list[str]:
    """The runs that a command or snippet uses and that other pages make."""
    used = re.sub(r"--output_dir \S+", "", text)
    return [name for name in EARLIER if re.search(rf"{name}(?![\w-])", used)]


def carry_out(step: Step, namespace: dict) -> None:
    """In the current folder. Args: namespace: of the page's snippets, which go on from each other."""
    kind, text = how(step), with_stand_ins(step.text)
    if kind == "script":
        run_script(text)
    elif kind == "snippet":
        code = compile("\n" * (step.line - 1) + text, str(ROOT / step.page), "exec")
        exec(code, namespace)
    elif kind == "shell":
        subprocess.run(["bash", "-euc", text], check=True)
    elif kind in NOT_RUN:
        instead(step, kind)


def outputs_of(command: str) -> Path | None:
    """The folder that a command writes to."""
    found = re.search(r"--output_dir (\S+)", command)
    return Path(found[1]) if found else None
