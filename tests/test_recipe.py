"""Recipes: found by name from anywhere, and giving way to the command line where the two are alternatives."""

import json
import os
from pathlib import Path

import pytest
import yaml

import run_dsi
import run_retrieval
import run_xmatching
from imagedex import command_line, recipe
from imagedex.corpora.load import load_splits
from imagedex.errors import UserError
from imagedex.training.dual_encoder.streaming import check_streaming
from imagedex.training.towers import check_towers

ROOT = Path(__file__).resolve().parents[1]
BERT, VIT = {"model_type": "bert"}, {"model_type": "vit"}


@pytest.fixture
def groups(tmp_path):
    """groups({recipe}, "--flag", ...) -> the dataclasses, filled; by default those of run_xmatching.py."""

    def parsed(given, *flags, script=run_xmatching):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(given))
        flags = [json.dumps(flag) if isinstance(flag, dict) else str(flag) for flag in flags]
        return command_line.parse_arguments(script.ARGUMENTS, "", [str(path), *flags, "--output_dir", str(tmp_path)])

    return parsed


@pytest.fixture
def parse(groups):
    """The same, as the values by name."""

    def parsed(*given, **kwargs):
        return {name: value for group in groups(*given, **kwargs) for name, value in vars(group).items()}

    return parsed


@pytest.mark.parametrize("name", ["recipes/photos/xmatching.yaml", "photos/xmatching.yaml", "photos/xmatching"])
def test_a_recipe_that_comes_with_imagedex_is_found_from_any_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "recipes" / "photos" / "xmatching.yaml"
    found = command_line.parse_arguments(run_xmatching.ARGUMENTS, "", [name, "--use_cpu"])
    assert found[0].vision_config == yaml.safe_load(shipped.read_text())["vision_config"]
    assert capsys.readouterr().out == f"I recipe: {shipped}\n"


def test_a_file_that_is_there_comes_before_one_of_the_same_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.makedirs("recipes/photos")
    Path("recipes/photos/xmatching.yaml").write_text("projection_dim: 7\n")
    found = command_line.parse_arguments(run_xmatching.ARGUMENTS, "", ["recipes/photos/xmatching.yaml", "--use_cpu"])
    assert found[1].projection_dim == 7
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photos/xmatchin", "did you mean photos/xmatching"),
        ("recipes/fotos/codebook_t5.yaml", "did you mean photos/codebook_t5"),
        ("/somewhere/photos/xmatching.yml", "did you mean photos/xmatching"),
        ("../photos/xmatching", "did you mean photos/xmatching"),
        ("zzzzzz", "there are coco/xmatching, "),
        ("my_photos", "neither a file nor one that comes with imagedex"),
    ],
)
def test_a_recipe_that_is_not_there_is_one_line_with_what_there_is(name, message):
    with pytest.raises(UserError) as caught:
        recipe.find(name)
    assert str(caught.value).startswith(f"no recipe {name}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


GIVES_WAY = {  # recipe, flags, what is left of the recipe's names afterwards
    "a table against a corpus": (
        {"dataset_name": "shape_scenes", "dataset_config_name": "9", "image_dir": "a"},
        ["--train_file", "pairs.csv"],
        {"dataset_name": None, "dataset_config_name": None, "image_dir": None},
    ),
    "a table and its pictures": (
        {"dataset_name": "x/y", "image_dir": "a", "caption_column": "b"},
        ["--train_file", "pairs.csv", "--image_dir", "pictures"],
        {"dataset_name": None, "image_dir": "pictures", "caption_column": None},
    ),
    "a corpus against tables": (
        {"train_file": "a.csv", "validation_file": "b.csv", "image_dir": "c"},
        ["--dataset_name", "shape_scenes"],
        {"train_file": None, "validation_file": None, "image_dir": None},
    ),
    "another table": (
        {"train_file": "a.csv", "image_dir": "c"}, ["--train_file", "d.csv"], {"train_file": "d.csv", "image_dir": "c"},
    ),
    "another corpus": (
        {"dataset_name": "a", "image_dir": "b", "dataset_config_name": "c"},
        ["--dataset_name", "d"],
        {"dataset_name": "d", "image_dir": "b", "dataset_config_name": "c"},
    ),
    "shards against a corpus": (
        {"dataset_name": "shards", "streaming": True}, ["--train_file", "more/*.tar"], {"dataset_name": None},
    ),
    "shards, and a corpus to evaluate on": (
        {"dataset_name": "shards", "streaming": True},
        ["--train_file", "more/*.tar", "--dataset_name", "shape_scenes"],
        {"dataset_name": "shape_scenes"},
    ),
    "a corpus to evaluate on, beside the recipe's shards": (
        {"train_file": "*.tar", "validation_file": "b.csv", "streaming": True},
        ["--dataset_name", "shape_scenes"],
        {"train_file": "*.tar", "validation_file": None},
    ),
    "a table to evaluate on, beside the recipe's shards": (
        {"train_file": "*.tar", "dataset_name": "shape_scenes", "streaming": True},
        ["--validation_file", "b.csv"],
        {"train_file": "*.tar", "dataset_name": None},
    ),
    "pictures held out": (
        {"held_out_captions_per_image": 1}, ["--held_out_images", "0.1"], {"held_out_captions_per_image": 0},
    ),
    "captions held out": (
        {"held_out_images": 0.1, "eval_gallery": "held_out"},
        ["--held_out_captions_per_image", 2],
        {"held_out_images": 0.0, "eval_gallery": "all"},
    ),
    "nothing held out is no alternative": (
        {"held_out_images": 0.1}, ["--held_out_captions_per_image", 0], {"held_out_images": 0.1},
    ),
    "a pretrained vision tower": (
        {"vision_config": VIT, "text_config": BERT},
        ["--vision_model_name_or_path", "a/b"],
        {"vision_config": None, "text_config": BERT},
    ),
    "a vision tower from scratch": (
        {"vision_model_name_or_path": "a/b"}, ["--vision_config", VIT], {"vision_model_name_or_path": None},
    ),
    "a pretrained text tower": ({"text_config": BERT}, ["--text_model_name_or_path", "a/b"], {"text_config": None}),
    "a text tower from scratch": (
        {"text_model_name_or_path": "a/b"}, ["--text_config", BERT], {"text_model_name_or_path": None},
    ),
    "a whole model": (
        {"vision_config": VIT, "text_model_name_or_path": "a/b", "image_size": 32},
        ["--model_name_or_path", "c/d"],
        {"vision_config": None, "text_model_name_or_path": None, "image_size": 32},
    ),
    "a tower against a whole model": (
        {"model_name_or_path": "c/d"}, ["--vision_config", VIT], {"model_name_or_path": None},
    ),
    "a size against an image processor": (
        {"image_processor_config": {"size": {"height": 8, "width": 8}}}, ["--image_size", 16], {"image_processor_config": None},
    ),
    "an image processor against a size": (
        {"image_size": 64}, ["--image_processor_config", {"size": {"height": 8, "width": 8}}], {"image_size": None},
    ),
    "crops against kept pixels": (
        {"keep_pixels": True}, ["--image_augmentation", "random_resized_crop"], {"keep_pixels": False},
    ),
    "five folds": ({"compare_with_baselines": True}, ["--five_fold"], {"compare_with_baselines": False}),
    "a stream": (
        {"keep_pixels": True, "keep_states": True, "held_out_images": 0.1, "max_train_samples": 5},
        ["--streaming"],
        {"keep_pixels": False, "keep_states": False, "held_out_images": 0.0, "max_train_samples": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVES_WAY)
def test_a_recipe_gives_way_and_the_log_says_so_in_one_line(case, parse, capsys):
    given, flags, expected = GIVES_WAY[case]
    values = parse(given, *flags)
    assert {name: values[name] for name in expected} == expected
    said = capsys.readouterr().out
    typed = [flag for flag in flags if str(flag).startswith("--")]
    aside = [name for name, value in expected.items() if value != given[name] and f"--{name}" not in typed]
    assert said.count("\n") == bool(aside)
    assert all(name in said for name in aside)
    assert not aside or (said.startswith("I of the recipe, ") and any(flag in said for flag in typed))


def test_a_pretrained_t5_stands_in_for_a_recipes_t5_from_scratch(parse):
    given = {"t5_config": {"model_type": "t5"}, "t5_start": "lexical"}
    values = parse(given, "--text_model_name_or_path", "a/b", script=run_dsi)
    assert (values["t5_config"], values["t5_start"]) == (None, "random")
    values = parse(given, "--model_name_or_path", "a/b", script=run_dsi)
    assert (values["t5_config"], values["t5_start"]) == (None, "random")


def test_every_name_of_the_table_is_an_argument():
    """Of some script; a name that was changed there must be changed here."""
    known = set()
    for script in (run_xmatching, run_dsi, run_retrieval):
        known |= {action.dest for action in command_line.Parser(script.ARGUMENTS)._actions}
    table = [*recipe.ALTERNATIVES.items(), *recipe.GOES_WITH.items()]
    assert {name for key, others in table for name in (key, *others)} <= known


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "shape_scenes", "--train_file", "a.csv"], "give one or the other"),
        (["--dataset_name", "shape_scenes", "--validation_file", "a.csv"], "give one or the other"),
        (
            ["--text_model_name_or_path", "a/b", "--text_config", BERT, "--vision_config", VIT],
            "both given for text tower",
        ),
        (["--streaming", "--keep_pixels"], "cannot be had with --streaming"),
    ],
)
def test_two_alternatives_that_were_both_typed_are_refused(flags, message, groups):
    model, xmatching, data, args = groups({"text_config": BERT, "vision_config": VIT}, *flags)
    with pytest.raises(UserError, match=message):
        check_streaming(data, args)
        if data.dataset_name:
            load_splits(data)
        check_towers(model, xmatching)
