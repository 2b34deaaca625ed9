"""The real command line of run_image_indexing.py: memorising the gallery, captioning, and wrong uses."""

import json

import pytest

import run_dsi
import run_image_indexing
from imagedex import command_line
from imagedex.modeling.identifiers import Identifiers
from imagedex.training.augmentation import RandomResizedCrop

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
       "patch_size": 8}  # fmt: skip


@pytest.fixture
def arguments(flickr_folder, tmp_path):
    return [
        "--model_type", "vision_grounded_t5", "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1,
        "--output_dir", tmp_path / "out", "--t5_config", json.dumps(T5), "--vision_config", json.dumps(VIT), "--image_size", 16,
        "--freeze_vision_tower", "false", "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 2,
        "--per_device_train_batch_size", 12, "--learning_rate", "3e-3", "--report_to", "none", "--disable_tqdm", "true",
    ]  # fmt: skip


def run(script, arguments, *more):
    script.main(list(map(str, [*arguments, *more])))


def results_of(folder):
    return json.loads((folder / "eval_results.json").read_text())


def test_until_the_gallery_is_memorised(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--num_train_epochs",
        600,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        20,
        "--lr_scheduler_type",
        "constant",
    ]
    flags += ["--save_strategy", "no", "--keep_pixels", "true", "--stop_when_memorised", 1.0]
    run(run_image_indexing, arguments, *flags)
    results = results_of(tmp_path / "out")
    assert results["eval_memorised"] == 1.0 and results["eval_memorised_samples"] == results["eval_gallery_size"] == 12
    assert results["epoch"] < 600
    said = capfd.readouterr().out
    assert "memorised: 1.000 of 12 pictures, among 12" in said
    assert said.splitlines()[-1] == "model, processor, identifiers, code and card: out"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "100.0 % are memorised" in card and "None captions" not in card


def test_training_pictures_are_cut_as_the_flags_say(arguments, tmp_path, monkeypatch):
    """A frozen tower reads them anew; what is evaluated is whole, and kept."""
    monkeypatch.chdir(tmp_path)
    seen, box = [], RandomResizedCrop.box

    def spied(crop, width, height):
        left, top, right, bottom = box(crop, width, height)
        seen.append(((right - left) * (bottom - top) / (width * height), crop.flip))
        return left, top, right, bottom

    monkeypatch.setattr(RandomResizedCrop, "box", spied)
    more = ["--image_augmentation", "random_resized_crop", "--random_crop_scale", "0.5", "1", "--random_flip", "0"]
    keep = [
        "--freeze_vision_tower",
        "true",
        "--keep_states",
        "true",
        "--keep_dir",
        tmp_path / "kept",
        "--num_train_epochs",
        3,
    ]
    run(run_image_indexing, arguments, *more, *keep)
    shares, flips = zip(*seen, strict=True)
    assert len(seen) == 3 * 12 and min(shares) > 0.45 and len(set(shares)) > 3 and set(flips) == {0.0}
    assert list((tmp_path / "kept").rglob("*.safetensors"))


def test_held_out_captions_are_not_read_when_everything_is_indexed(arguments, tmp_path, monkeypatch):
    """Identifiers and tokenizer come from the trained captions: with other held-out captions they are others."""
    monkeypatch.chdir(tmp_path)
    scheme = ["--identifier_scheme", "semantic", "--identifier_leaf_size", 2, "--num_train_epochs", 1]
    run(run_image_indexing, arguments, *scheme)
    run(run_image_indexing, arguments, *scheme, "--held_out_images", 0.3, "--held_out_captions_per_image", 0,
        "--identifier_scheme", "naive", "--index_held_out_images", "false", "--output_dir", "part")  # fmt: skip
    assert results_of(tmp_path / "out")["eval_memorised_samples"] == 12
    part = results_of(tmp_path / "part")
    assert part["eval_memorised_samples"] == 9 and part["eval_gallery_size"] == 12


@pytest.mark.parametrize("kind", ["codebook_t5", "vision_grounded_t5"])
def test_captioning_first_identifiers_afterwards(arguments, tmp_path, monkeypatch, capfd, kind):
    monkeypatch.chdir(tmp_path)
    arguments[1] = kind
    rest = arguments[arguments.index("--image_size") + 2 :]
    second = ["--model_name_or_path", "out", *arguments[2:6], *rest, "--output_dir", "second"]
    if kind == "codebook_t5":
        arguments += ["--quantization", "learned", "--codebook_projection_dim", 8]
    run(run_image_indexing, arguments, "--objective", "caption", "--num_train_epochs", 20)
    results = results_of(tmp_path / "out")
    assert results["eval_queries"] == 12 and 0 < results["eval_loss"] < 3  # about 4.4 nats a token before
    assert "held-out captions: " in capfd.readouterr().out
    assert not (tmp_path / "out" / "identifiers.json").exists()
    script = run_dsi if kind == "codebook_t5" else run_image_indexing
    run(script, second, "--identifier_scheme", "rq")
    assert Identifiers.from_pretrained(tmp_path / "second").scheme == "rq"
    assert results_of(tmp_path / "second")["eval_memorised_samples"] == 12


WRONG = {
    "a plain T5": (["--model_type", "t5"], "this script trains codebook_t5, vision_grounded_t5"),
    "widths that differ": (["--vision_projection", "false", "--t5_config", json.dumps(T5 | {"d_model": 16})],
                           "--vision_projection true"),
    "predictions": (["--do_predict"], "see run_dsi.py"),
    "stopping without looking": (["--stop_when_memorised", 1], "--stop_when_memorised needs evaluations"),
    "memorised captions": (["--objective", "caption", "--stop_when_memorised", 1], "is for identifiers"),
    "more than all": (["--stop_when_memorised", 1.5], "give more than 0, up to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_status_2(arguments, tmp_path, monkeypatch, capfd, name):
    flags, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: run(run_image_indexing, arguments, *flags))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists(), "something was written"
