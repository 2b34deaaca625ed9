"""The console command: what answers at once, what is handed to a script, and one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagedex import __version__, cli, recipe

ROOT = Path(__file__).resolve().parents[1]
ASKS = """
import sys
from imagedex import cli
cli.main(sys.argv[1:])
print("loaded:", *sorted({"torch", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("flag", ["--help", "--version", "recipes --help"])
def test_what_says_little_loads_neither_torch_nor_transformers(flag):
    command = [sys.executable, "-c", ASKS, *flag.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_help_names_every_command(capsys):
    cli.main([])
    without = capsys.readouterr().out
    cli.main(["--help"])
    assert capsys.readouterr().out == without
    assert len(without.splitlines()) < 20
    for name in ("xmatching", "image-indexing", "dsi", "retrieval", "recipes"):
        assert f"\n  {name} " in without
    cli.main(["--version"])
    assert capsys.readouterr().out == f"imagedex {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_calls_itself_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: imagedex {name} [RECIPE]")
    assert f"\n    imagedex {name} " in said and "python run_" not in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["retreival"], "imagedex has no command retreival; did you mean retrieval?"),
        (["recipes", "photos"], "imagedex recipes takes no arguments: photos"),
        (["xmatching", "--los_type", "hinge"], "unknown argument --los_type; did you mean --loss_type?"),
        (["dsi", "photos/codebok_t5"], "no recipe photos/codebok_t5"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and said.err.count("\n") == 1 and not said.out


def test_a_recipe_that_names_no_data_says_so_before_it_looks_for_models(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["xmatching", "photos/xmatching", "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: no corpus given: use --dataset_name")


def test_recipes_are_listed_with_what_they_say_of_themselves(capsys):
    cli.main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe.shipped())
    for line, path in zip(lines, recipe.shipped().values(), strict=True):
        says = line.split(maxsplit=1)[1]
        assert path.read_text(encoding="utf-8").replace("\n# ", " ").startswith(f"# {says}.")


def test_python_m_asks_a_model_from_any_folder(tiny_xmatching, picture_folder, tmp_path):
    (tmp_path / "sentences.txt").write_text("a red ball\n")
    command = [
        sys.executable,
        "-m",
        "imagedex",
        "retrieval",
        "--model_name_or_path",
        str(tiny_xmatching),
        "--device",
        "cpu",
    ]
    command += ["--image_dir", str(picture_folder), "--queries", "sentences.txt", "--output_dir", "out"]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (ranking,) = map(json.loads, (tmp_path / "out" / "rankings.jsonl").read_text().splitlines())
    assert ranking["query"] == "a red ball" and ranking["images"]
