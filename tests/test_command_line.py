"""The shared command line: recipes, overrides, and one clear line for each mistake."""

import dataclasses
import itertools
import os
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

import run_dsi
import run_image_indexing
import run_retrieval
import run_xmatching
from imagedex import command_line, files
from imagedex.errors import UserError


@dataclass
class Arguments:
    learning_rate: float = field(default=0.1, metadata={"help": "step"})
    name: str | None = None
    sizes: list[int] | None = None
    loss: Literal["hinge", "nce"] | None = None
    shuffle: bool = True
    needed: str = field(kw_only=True)


def parse(*argv):
    return command_line.parse_arguments((Arguments,), "a script", list(map(str, argv)))[0]


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_flags_override_the_recipe_and_the_recipe_the_defaults(recipe):
    path = recipe("learning_rate: 1e-4\nname: from recipe\nneeded: x\nsizes: [1, 2]\nshuffle: false\nloss: nce\n")
    found = parse(path, "--name", "from flag")
    assert found == Arguments(learning_rate=1e-4, name="from flag", needed="x", sizes=[1, 2], shuffle=False, loss="nce")
    assert parse(path, "--shuffle", "true", "--learning_rate", "2").shuffle is True
    assert parse("--needed", "y", "--no_shuffle").shuffle is False
    json_path = recipe('{"needed": "z", "learning_rate": 3}', "recipe.json")
    assert parse(json_path) == Arguments(needed="z", learning_rate=3)


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("learning_rat: 1\nneeded: x", [], "unknown argument 'learning_rat'; did you mean learning_rate?"),
        ("loss: hing\nneeded: x", [], "one of hinge, nce"),
        ("learning_rate: fast\nneeded: x", [], "not a number"),
        ("needed: x", ["--learnin_rate", "1"], "unknown argument --learnin_rate; did you mean --learning_rate?"),
        ("needed: x", ["--loss", "nope"], "invalid choice: 'nope'"),
        ("needed: x", ["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        ("name: x", [], "required: --needed"),
        ("- a list", [], "must be a mapping"),
        ("a: [", [], "not valid YAML"),
        (None, [], "missing.yaml: neither a file nor one that comes with imagedex"),
        ("needed: x", ["--needed=y", "stray"], "unknown argument stray"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, text, argv, message):
    path = recipe(text) if text is not None else tmp_path / "missing.yaml"
    with pytest.raises(UserError) as caught:
        parse(path, *argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_run_turns_a_user_error_into_one_line_and_status_2(capsys):
    def main():
        raise UserError("this is wrong; do that")

    with pytest.raises(SystemExit) as stopped:
        command_line.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: this is wrong; do that\n"


def test_run_keeps_the_traceback_of_a_defect():
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 / 0)


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    files.write_atomically(path, "first")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "\ud800")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["file.txt"]


def test_output_dir_same_arguments_go_on_others_are_refused(tmp_path):
    folder, record = tmp_path / "run", "run_arguments.json"
    assert files.check_output_dir(folder, {"a": 1}, record) == folder and not folder.exists()
    files.write_atomically(folder / record, '{"a": 1, "b": [1, 2]}')
    assert files.check_output_dir(folder, {"a": 1, "b": (1, 2)}, record) == folder
    with pytest.raises(UserError, match=r"other arguments: a \(1 then, 2 now\)"):
        files.check_output_dir(folder, {"a": 2, "b": [1, 2]}, record)
    with pytest.raises(UserError, match="not empty and not a run"):
        files.check_output_dir(folder, {"a": 1}, "other_record.json")
    with pytest.raises(UserError, match="is a file"):
        files.check_output_dir(folder / record, {}, record)


SCRIPTS = {module.__name__: module for module in (run_xmatching, run_image_indexing, run_dsi, run_retrieval)}
TRAINING = [name for name in SCRIPTS if name != "run_retrieval"]


def help_of(name, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main([flag])
    assert not stopped.value.code
    return capsys.readouterr().out


def flags_in(text):
    return set(re.findall(r"^  (?:-h, )?--(\w+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_our_arguments_with_their_defaults_and_the_examples_as_they_are_typed(name, capsys):
    text = help_of(name, "--help", capsys)
    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    ours = {
        field.name
        for group in SCRIPTS[name].ARGUMENTS
        for field in dataclasses.fields(group)
        if field.name not in theirs and field.init
    }
    assert ours <= flags_in(text)
    assert "(default: None)" not in text and "default: True" not in text
    assert "[RECIPE]" in text.splitlines()[0] and "--help_all" in text.splitlines()[1]
    examples = re.findall(r"^    .*$", SCRIPTS[name].__doc__, flags=re.MULTILINE)
    assert examples and "\n".join(examples) in text
    for line, following in itertools.pairwise(examples):
        assert line.endswith("\\") == following.startswith("        "), "a line goes on where it says so"


@pytest.mark.parametrize("name", TRAINING)
def test_help_shows_of_the_trainers_arguments_the_most_used_and_help_all_every_one(name, capsys):
    text, everything = (help_of(name, flag, capsys) for flag in ("--help", "--help_all"))
    assert set(command_line.MOST_USED) <= flags_in(text)
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert flags_in(text) & theirs == set(command_line.MOST_USED)
    parser = command_line.Parser(SCRIPTS[name].ARGUMENTS)
    assert flags_in(everything) == {action.dest for action in parser._actions}
    assert everything.index("\nmodel:") < everything.index("\ndata:") < everything.index("\nthe Trainer:")
    assert "hub_token" not in flags_in(text) and "hub_token" in flags_in(everything)


def test_help_after_a_recipe_shows_its_values(recipe, capsys):
    with pytest.raises(SystemExit):
        parse(recipe("learning_rate: 7\nneeded: x\n"), "--help")
    assert "step (default: 7)" in capsys.readouterr().out
