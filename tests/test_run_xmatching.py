"""The real command line: a run from data to a saved model, resuming, and ten wrong uses."""

import csv
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel

import run_xmatching
from imagedex import command_line
from imagedex.modeling.modeling_xmatching import XMatchingModel

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip


@pytest.fixture
def arguments(flickr_folder, tmp_path, text_config, vision_config):
    """A run of a few seconds; later flags override earlier ones."""
    return [
        "--dataset_name", flickr_folder, "--output_dir", tmp_path / "out", "--held_out_captions_per_image", 1,
        "--text_config", json.dumps(text_config), "--vision_config", json.dumps(vision_config), "--image_size", 16,
        "--text_pooling", "mean", "--text_pooling_layers", 1, "--projection_dim", 16, "--loss_type", "info_nce",
        "--freeze_text_tower", "false", "--freeze_vision_tower", "false", "--do_train", "--do_eval", "--use_cpu",
        "--num_train_epochs", 2, "--per_device_train_batch_size", 12, "--save_strategy", "epoch",
        "--learning_rate", "1e-3", "--report_to", "none",
    ]  # fmt: skip


def test_train_evaluate_save_and_go_on(launch, arguments, tmp_path):
    out = tmp_path / "out"
    first = launch("run_xmatching.py", *arguments, "--compare_with_baselines", launcher=ACCELERATE)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((out / "eval_results.json").read_text())
    assert {"eval_hits@1", "eval_hits@5", "eval_hits@10", "eval_mrr", "eval_gallery_size"} <= set(results)
    assert results["eval_gallery_size"] == 12 and results["eval_queries"] == 12
    assert {"README.md", "config.json", "model.safetensors", "modeling_xmatching.py", "processing_retrieval.py",
            "tokenizer.json", "eval_queries.csv", "run_arguments.json", "baselines.json"} <= set(os.listdir(out))  # fmt: skip
    assert f"{results['eval_hits@1']:.3f}" in (out / "README.md").read_text()
    last = [line for line in first.stdout.splitlines() if line.strip()][-1]
    assert last == "model, processor, code and card: out"
    assert "BM25" in first.stdout

    # the same arguments again: nothing left to do, the same figures
    again = launch("run_xmatching.py", *arguments, "--compare_with_baselines")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "this run is finished" in again.stdout and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert json.loads((out / "eval_results.json").read_text())["eval_mrr"] == results["eval_mrr"]

    # other arguments are refused, and what is there stays
    other = launch("run_xmatching.py", *arguments, "--learning_rate", "5e-3")
    assert other.returncode == 2
    assert "holds a run with other arguments" in other.stderr and "learning_rate" in other.stderr

    # the trained model is judged alike by a run of its own
    judged = launch("run_xmatching.py", "--model_name_or_path", out, "--dataset_name", arguments[1], "--do_eval", "--do_predict",
                    "--held_out_captions_per_image", 1, "--output_dir", "judged", "--use_cpu")  # fmt: skip
    assert judged.returncode == 0, judged.stderr[-3000:]
    alone = json.loads((tmp_path / "judged" / "eval_results.json").read_text())
    assert alone["eval_mrr"] == pytest.approx(results["eval_mrr"])
    rankings = [json.loads(line) for line in (tmp_path / "judged" / "rankings.jsonl").read_text().splitlines()]
    with open(out / "eval_queries.csv", newline="") as file:
        asked = list(csv.DictReader(file))
    assert [ranking["query"] for ranking in rankings] == [row["caption"] for row in asked]
    hits = [row["image"] == ranking["images"][0] for ranking, row in zip(rankings, asked, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(results["eval_hits@1"])


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(launch, arguments, tmp_path):
    whole = launch("run_xmatching.py", *arguments, "--save_total_limit", 5)
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = XMatchingModel.from_pretrained(tmp_path / "out").state_dict()
    # what a kill after the first epoch leaves: the record and the first checkpoint
    checkpoints = sorted(path for path in os.listdir(tmp_path / "out") if path.startswith("checkpoint-"))
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "out" / min(checkpoints, key=lambda n: int(n.split("-")[1])), broken / "checkpoint-3")
    shutil.copy(tmp_path / "out" / "run_arguments.json", broken)
    resumed = launch("run_xmatching.py", *arguments, "--save_total_limit", 5, "--output_dir", broken)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    found = XMatchingModel.from_pretrained(broken).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_with_nothing_held_out_evaluation_is_off_whatever_the_recipe_says(launch, arguments, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("eval_strategy: epoch\nload_best_model_at_end: true\nmetric_for_best_model: hits@1\n")
    done = launch("run_xmatching.py", recipe, *arguments, "--held_out_captions_per_image", 0, "--num_train_epochs", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing is held out: evaluation and the choice of the best checkpoint are off" in done.stdout
    assert not (tmp_path / "out" / "eval_results.json").exists()
    assert "Nothing was held out" in (tmp_path / "out" / "README.md").read_text()


def test_five_folds_are_said_wherever_their_figures_are(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_xmatching.main(list(map(str, [*arguments, "--five_fold", "--num_train_epochs", 1])))
    assert "12 held-out captions, a gallery of 3 pictures (the mean of 5 folds)" in capfd.readouterr().out
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert (results["eval_folds"], results["eval_gallery_size"]) == (5, 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "each against all 3 pictures of its fold (the gallery in 5 folds, figures averaged over them)" in card


def cosines_of(folder, captions, pictures):
    """(captions, pictures) through the model's own classes, one at a time."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        texts = [
            model.get_text_features(**processor.tokenizer([c], return_tensors="pt")).pooler_output for c in captions
        ]
        pixels = [processor.image_processor(images=Image.open(path), return_tensors="pt") for path in pictures]
        images = [model.get_image_features(**batch).pooler_output for batch in pixels]
    unit = [torch.nn.functional.normalize(torch.cat(vectors).double(), dim=1) for vectors in (texts, images)]
    return (unit[0] @ unit[1].T).numpy()


def test_new_pictures_beside_a_ready_made_model(arguments, flickr_folder, tiny_clip, tmp_path, monkeypatch, capfd):
    """Both galleries, for the model and for a CLIP, in results, table and card."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = ["--held_out_captions_per_image", 0, "--held_out_images", 0.4, "--eval_gallery", "held_out"]
    flags += ["--compare_with_model", tiny_clip, "--compare_with_baselines", "--num_train_epochs", 1]
    flags += ["--eval_strategy", "epoch"]
    run_xmatching.main(list(map(str, [*arguments, *flags])))
    shown, out = capfd.readouterr().out, tmp_path / "out"
    results = json.loads((out / "eval_results.json").read_text())
    rows = json.loads((out / "baselines.json").read_text())
    with open(out / "eval_queries.csv", newline="") as file:
        asked = [(row["caption"], row["image"]) for row in csv.DictReader(file)]
    new = sorted({image for _, image in asked})
    assert (results["eval_gallery_size"], results["eval_whole_gallery_size"]) == (len(new), 12)
    assert list(rows) == ["tiny_clip"] and "no picture that is asked for has a trained caption" in shown

    names = sorted(path.name for path in (flickr_folder / "images").iterdir())
    cosines = cosines_of(tiny_clip, [caption for caption, _ in asked], [flickr_folder / "images" / n for n in names])
    for prefix, gallery in (("", new), ("whole_", names)):
        found = cosines[:, [names.index(name) for name in gallery]]
        own = cosines[range(len(asked)), [names.index(image) for _, image in asked]][:, None]
        ranks = (found >= own - 1e-6).sum(1)
        assert rows["tiny_clip"][f"{prefix}mrr"] == pytest.approx((1 / ranks).mean())
        assert rows["tiny_clip"][f"{prefix}gallery_size"] == len(gallery)

    assert f"{len(asked)} held-out captions, a gallery of {len(new)} pictures, the new ones alone" in shown
    assert "the same captions, a gallery of 12 pictures, new and trained ones" in shown
    card = (out / "README.md").read_text()
    assert f"all {len(new)} pictures of the gallery, the new ones alone" in card
    assert "The same captions against 12 pictures, new and trained ones:" in card
    for text in (shown, card):
        for figures in (results, rows["tiny_clip"]):
            for prefix in ("", "whole_"):
                value, low, high = (
                    figures[f"{'eval_' * (figures is results)}{prefix}mrr{e}"] for e in ("", "_low", "_high")
                )
                assert f"{value:.3f} ({low:.2f} to {high:.2f})" in text

    run_xmatching.main(list(map(str, [*arguments, *flags])))  # finished: the same tables from what was left
    again = capfd.readouterr().out
    assert again[again.index("held-out captions") :] == shown[shown.rindex("held-out captions") :]


def test_help_explains_every_argument(launch):
    done = launch("run_xmatching.py", "--help")
    assert done.returncode == 0
    for name in ("dataset_name", "text_model_name_or_path", "loss_type", "held_out_images", "compare_with_baselines"):
        assert f"--{name}" in done.stdout


def wrong_uses():
    """name -> (change the folder, flags, what the line says)."""

    def empty(folder):
        shutil.rmtree(folder)
        folder.mkdir()

    def no_caption_column(folder):
        rows = (folder / "captions.txt").read_text().replace("image,caption", "image,remark", 1)
        (folder / "captions.txt").write_text(rows)

    def unreadable(folder):
        (folder / "images" / "red_blue.jpg").write_bytes(b"not a picture")

    def missing_picture(folder):
        (folder / "images" / "red_blue.jpg").unlink()

    def misspelt(folder):
        (folder / "r.yaml").write_text("learning_rat: 1")

    def other_model(folder):
        tiny = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
        )
        BertModel(tiny).save_pretrained(folder / "bert")

    return {
        "missing folder": (None, ["--dataset_name", "{}/nowhere"], "there is no such folder"),
        "empty folder": (empty, [], "the folder is empty"),
        "no caption column": (no_caption_column, [], "caption"),
        "unknown loss": (None, ["--loss_type", "hing"], "invalid choice: 'hing'"),
        "unreadable picture": (unreadable, [], "red_blue.jpg"),
        "caption of a missing picture": (missing_picture, [], "red_blue.jpg"),
        "odd batch": (None, ["--loss_type", "paired_hinge", "--per_device_train_batch_size", 7], "needs an even batch"),
        "checkpoint of another model": (other_model, ["--model_name_or_path", "{}/bert"], "is a bert model"),
        "unwritable output": (None, ["--output_dir", "/proc/imagedex"], "cannot be written"),
        "misspelt argument in a recipe": (misspelt, ["{}/r.yaml"], "did you mean learning_rate?"),
        "no tower": (None, ["--text_config", ""], "text_config"),
        "misspelt field of a tower": (
            None, ["--vision_config", '{"model_type": "resnet", "depth": [1]}'], "did you mean depths?"),
        "nothing to do": (None, ["--do_train", "false", "--do_eval", "false"], "nothing to do"),
        "folds without captions": (
            None, ["--held_out_captions_per_image", 0, "--held_out_images", 0.2, "--five_fold"], "have no caption"),
        "folds beside baselines": (None, ["--five_fold", "--compare_with_baselines"], "--compare_with_baselines out"),
        "folds beside a model": (None, ["--five_fold", "--compare_with_model", "x"], "--compare_with_model out"),
        "no model to compare with": (None, ["--compare_with_model", "{}/nowhere"], "--compare_with_model"),
        "no dual encoder to compare with": (other_model, ["--compare_with_model", "{}/bert"], "without get_text_features"),
        "compared with one model twice": (
            other_model, ["--compare_with_model", "{}/bert", "{}/bert"], "names bert twice"),
        "chunk of no rows": (None, ["--gradient_cache_chunk_size", 0], "give 1 to "),
        "batch larger than the corpus": (
            None, ["--loss_type", "paired_hinge", "--per_device_train_batch_size", 64], "do not fill one batch of 64"),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_uses())
def test_wrong_use_is_one_line_and_status_2(arguments, flickr_folder, tmp_path, monkeypatch, capfd, name):
    change, flags, message = wrong_uses()[name]
    folder = tmp_path / "corpus"
    shutil.copytree(flickr_folder, folder)
    if change:
        change(folder)
    flags = [str(flag).format(folder) if "{}" in str(flag) else flag for flag in flags]
    arguments[1] = folder
    if str(flags[0] if flags else "").endswith(".yaml"):
        arguments = [flags.pop(0), *arguments]
    if "--model_name_or_path" in flags:
        start = arguments.index("--text_config")
        arguments = arguments[:start] + arguments[start + 4 :]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: run_xmatching.main(list(map(str, [*arguments, *flags]))))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert message in lines[0]
    assert not (tmp_path / "out").exists(), "something was written"


def test_wrong_use_from_a_real_shell(launch, arguments, tmp_path):
    done = launch("run_xmatching.py", *arguments, "--loss_type", "paired_hinge", "--per_device_train_batch_size", 7)
    assert done.returncode == 2
    assert done.stderr == "error: the paired hinge loss needs an even batch; --per_device_train_batch_size is 7\n"
    assert not (tmp_path / "out").exists()
