"""Every recipe is made of real arguments, and each value arrives."""

from enum import Enum
from pathlib import Path

import pytest
import yaml

from imagedex import command_line
from imagedex.configuration.configuration_vision_grounded_t5 import VisionGroundedT5Config
from imagedex.corpora.arguments import CorpusArguments, DataArguments
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments, XMatchingTrainingArguments
from imagedex.training.generative.arguments import (
    DSITrainingArguments,
    IdentifierArguments,
    ImageIndexingArguments,
    IndexingArguments,
    T5Arguments,
    TextArguments,
)
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
GENERATIVE = (ModelArguments, T5Arguments, IdentifierArguments, CorpusArguments, DSITrainingArguments)
DSI = (*GENERATIVE, TextArguments, IndexingArguments, CaptionAugmentationArguments)
INDEXING = (*GENERATIVE, ImageIndexingArguments)
SCRIPTS = {  # how a recipe's name begins -> the dataclasses of its script
    "xmatching": (ModelArguments, XMatchingArguments, DataArguments, XMatchingTrainingArguments),
    "codebook_t5": DSI,
    "codebook_t5_captioning": INDEXING,
    "vision_grounded_t5_indexing": INDEXING,
    "vision_grounded_t5_retrieval": DSI,
    "t5": DSI,
    "dsi": DSI,
    "retrieval": (RetrievalArguments, GenerativeArguments),
}
PATHS = sorted(RECIPES.rglob("*.yaml"))
NOT_RUN = [path for path in PATHS if path.parent.name in ("coco", "flickr30k", "nq10k", "reddit_openimages")]


def groups_of(path):
    found = [name for name in SCRIPTS if path.stem.startswith(name)]
    assert found, f"say in SCRIPTS which script takes {path.name}"
    return SCRIPTS[max(found, key=len)]


@pytest.mark.parametrize("path", PATHS, ids=[str(path.relative_to(RECIPES)) for path in PATHS])
def test_every_value_arrives(path, tmp_path):
    groups = groups_of(path)
    flags = [path, "--output_dir", tmp_path / "out", *([] if RetrievalArguments in groups else ["--use_cpu"])]
    parsed = command_line.parse_arguments(groups, "", [str(flag) for flag in flags])
    arrived = {name: value for group in parsed for name, value in vars(group).items()}
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe
    for name, value in recipe.items():
        found = arrived[name].value if isinstance(arrived[name], Enum) else arrived[name]
        found = found[0] if name == "model_name_or_path" and isinstance(found, list) else found  # one of several models
        assert found == value, name


@pytest.mark.parametrize("folder", ["photos", "quickstart", "flickr30k"])
def test_a_tower_as_wide_as_t5_speaks_to_it_without_a_projection(folder):
    recipe = yaml.safe_load((RECIPES / folder / "vision_grounded_t5_indexing.yaml").read_text(encoding="utf-8"))
    assert recipe["vision_projection"] is False
    if "t5_config" in recipe:  # else both base models, 768 wide
        vision = VisionGroundedT5Config(vision_config=recipe["vision_config"], **recipe["t5_config"]).vision_config
        assert vision.hidden_sizes[-1] == recipe["t5_config"]["d_model"]


@pytest.mark.parametrize("path", NOT_RUN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_that_was_not_run_says_so_at_its_head(path):
    head = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:4])
    assert "not be run here" in head or "Not run here" in head
