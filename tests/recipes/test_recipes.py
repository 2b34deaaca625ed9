"""Every recipe is made of real arguments, and each value arrives."""

from enum import Enum
from pathlib import Path

import pytest
import yaml

from imagedex import cli
from imagedex.training.arguments import DataArguments, ModelArguments, XMatchingArguments, XMatchingTrainingArguments

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCRIPTS = {  # how a recipe's name begins -> the dataclasses of its script
    "xmatching": (ModelArguments, XMatchingArguments, DataArguments, XMatchingTrainingArguments),
}
PATHS = sorted(RECIPES.rglob("*.yaml"))


def groups_of(path):
    found = [groups for name, groups in SCRIPTS.items() if path.stem.startswith(name)]
    assert len(found) == 1, f"say in SCRIPTS which script takes {path.name}"
    return found[0]


@pytest.mark.parametrize("path", PATHS, ids=[str(path.relative_to(RECIPES)) for path in PATHS])
def test_every_value_arrives(path, tmp_path):
    flags = [path, "--output_dir", tmp_path / "out", "--use_cpu"]
    groups = cli.parse_arguments(groups_of(path), "", [str(flag) for flag in flags])
    arrived = {name: value for group in groups for name, value in vars(group).items()}
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe
    for name, value in recipe.items():
        found = arrived[name]
        assert (found.value if isinstance(found, Enum) else found) == value, name


@pytest.mark.parametrize("path", sorted((RECIPES / "coco").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_that_was_not_run_says_so_at_its_head(path):
    head = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:4])
    assert "not be run here" in head or "Not run here" in head
