"""From two pretrained towers to answers, by the command line: kept states, heads in closed form, the bank against hubs."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

from imagedex.evaluation.rankings import read_rankings
from imagedex.modeling.modeling_xmatching import XMatchingModel

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def launcher(config):
    accelerate = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    return (*accelerate, "--config_file", str(CONFIGS / config), "--num_cpu_threads_per_process", "1")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Two tower folders as they come from the Hub."""
    folder, tokenizer = tmp_path_factory.mktemp("towers"), tiny_tokenizer(24)
    torch.manual_seed(3)
    BertModel(BertConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=24)).save_pretrained(
        folder / "text"
    )
    tokenizer.save_pretrained(folder / "text")
    ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(folder / "vision")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vision")
    return folder


@pytest.fixture
def arguments(flickr_folder, towers, tmp_path):
    return [
        "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--do_train", "--do_eval",
        "--text_model_name_or_path", towers / "text", "--vision_model_name_or_path", towers / "vision",
        "--keep_states", "--keep_dir", tmp_path / "kept", "--head_start", "cca", "--vision_head_power", 0.5,
        "--head_dropout", 0, "--projection_dim", 16, "--max_text_length", 24, "--num_train_epochs", 2, "--use_cpu",
        "--per_device_train_batch_size", 12, "--learning_rate", "1e-5", "--eval_strategy", "epoch", "--report_to", "none",
    ]  # fmt: skip


def results(folder, name="eval_results.json"):
    found = json.loads((folder / name).read_text())
    return {key: value for key, value in found.items() if not key.endswith(("runtime", "per_second"))}


def test_from_two_towers_to_answers(launch, arguments, flickr_folder, tmp_path):
    out = tmp_path / "out"
    done = launch("run_xmatching.py", *arguments, "--output_dir", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "heads in closed form (cca), from 36 captions of 12 pictures" in done.stdout
    chosen = json.loads((out / "head_start.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config["projection_dim"] == chosen["directions"] <= 16 and len(chosen["tried"]) > 10
    start, end = results(out, "start_results.json"), results(out)
    assert {"start_hits@1", "start_mrr"} <= start.keys()
    assert {"eval_hits@1", "eval_cosine_hits@1", "eval_cosine_mrr"} <= end.keys()
    assert len(XMatchingModel.from_pretrained(out).caption_bank) == 36
    readme = (out / "README.md").read_text()
    assert "caption_bank.safetensors" in readme

    # the next run reads no tower again, and has the same closed form
    again = launch("run_xmatching.py", *arguments, "--output_dir", tmp_path / "again", "--num_train_epochs", 0)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "36 of 36 text states are kept" in again.stdout and "12 of 12 image states are kept" in again.stdout
    assert "others take" not in again.stdout
    assert json.loads((tmp_path / "again" / "head_start.json").read_text()) == chosen

    # search by scores, and by cosines; what the one does is said beside the other
    asked = [
        "--model_name_or_path",
        out,
        "--dataset_name",
        flickr_folder,
        "--queries",
        out / "eval_queries.csv",
        "--device",
        "cpu",
    ]
    found = launch("run_retrieval.py", *asked, "--output_dir", tmp_path / "found")
    plain = launch("run_retrieval.py", *asked, "--output_dir", tmp_path / "plain", "--hub_bias", "false")
    assert found.returncode == plain.returncode == 0, (found.stderr + plain.stderr)[-3000:]
    metrics, by_cosine = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("found", "plain"))
    for name in ("hits@1", "hits@10", "mrr"):
        assert metrics[name] == pytest.approx(end[f"eval_{name}"])
        assert metrics[f"cosine_{name}"] == pytest.approx(end[f"eval_cosine_{name}"]) == pytest.approx(by_cosine[name])
    assert "cosines alone (--hub_bias false)" in found.stdout and "cosine_hits@1" not in by_cosine
    ranking, other = (read_rankings(tmp_path / name / "rankings.jsonl")[0] for name in ("found", "plain"))
    assert other.cosines is None
    cosine_of = dict(zip(other.images, other.scores, strict=True))
    for image, score, cosine in zip(ranking.images, ranking.scores, ranking.cosines, strict=True):
        assert cosine == pytest.approx(cosine_of.get(image, cosine), abs=1e-6) and score < cosine
    assert ranking.scores == sorted(ranking.scores, reverse=True)


def test_a_model_that_is_trained_on_leaves_its_old_bank_behind(launch, arguments, flickr_folder, tmp_path):
    """In training it would judge vectors by those of other weights; and sizes that a closed form chose stay."""
    done = launch("run_xmatching.py", *arguments, "--num_train_epochs", 0, "--output_dir", tmp_path / "first")
    assert done.returncode == 0, done.stderr[-3000:]
    width = json.loads((tmp_path / "first" / "config.json").read_text())["projection_dim"]
    on = [
        "--model_name_or_path", tmp_path / "first", "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1,
        "--do_train", "--do_eval", "--do_predict", "--projection_dim", 16, "--use_cpu", "--max_steps", 2,
        "--eval_strategy", "steps", "--eval_steps", 1,
        "--save_strategy", "steps", "--save_steps", 1, "--learning_rate", "1e-3", "--report_to", "none",
    ]  # fmt: skip
    done = launch("run_xmatching.py", *on, "--output_dir", tmp_path / "second")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((tmp_path / "second").glob("checkpoint-*/caption_bank.safetensors"))
    history = json.loads((tmp_path / "second" / "trainer_state.json").read_text())["log_history"]
    during = [entry for entry in history if "eval_mrr" in entry and entry["step"] == 1]
    assert during and not any(name.startswith("eval_cosine") for entry in during for name in entry)
    old, new = (XMatchingModel.from_pretrained(tmp_path / name).caption_bank for name in ("first", "second"))
    assert old.fingerprint != new.fingerprint
    assert json.loads((tmp_path / "second" / "config.json").read_text())["projection_dim"] == width
    ranking = read_rankings(tmp_path / "second" / "rankings.jsonl")[0]
    assert len(ranking.cosines) == len(ranking.scores) and ranking.scores[0] < ranking.cosines[0]

    none = launch("run_xmatching.py", *on, "--caption_bank_size", 0, "--output_dir", tmp_path / "none")
    assert none.returncode == 0, none.stderr[-3000:]
    assert not (tmp_path / "none" / "caption_bank.safetensors").exists()


def test_two_processes_share_the_work_and_end_as_one(launch, arguments, tmp_path):
    for name, batch, config in (("one", 12, "cpu.yaml"), ("two", 6, "cpu_two_processes.yaml")):
        flags = [
            "--per_device_train_batch_size",
            batch,
            "--keep_dir",
            tmp_path / f"kept-{name}",
            "--output_dir",
            tmp_path / name,
        ]
        plain_sgd = ["--optim", "sgd", "--learning_rate", 0.05]
        done = launch("run_xmatching.py", *arguments, *flags, *plain_sgd, launcher=launcher(config))
        assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("text_states", "image_states"):
        one, two = (sorted((tmp_path / f"kept-{name}").glob(f"{kind}-*/shard-*")) for name in ("one", "two"))
        assert [path.name for path in one] == [path.name for path in two] and one
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    weights = [XMatchingModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-5)
    chosen = [json.loads((tmp_path / name / "head_start.json").read_text()) for name in ("one", "two")]
    assert chosen[0]["mrr"] == pytest.approx(chosen[1]["mrr"]) and chosen[0]["directions"] == chosen[1]["directions"]
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert {k: v for k, v in one.items() if "loss" not in k} == {k: v for k, v in two.items() if "loss" not in k}


def test_a_stopped_run_goes_on_and_ends_the_same(launch, arguments, tmp_path):
    """The checkpoint has the sizes that the closed form chose."""
    saves = ["--save_strategy", "epoch", "--num_train_epochs", 3, "--learning_rate", "1e-3"]
    whole, broken = tmp_path / "a" / "out", tmp_path / "b" / "out"
    done = launch("run_xmatching.py", *arguments, *saves, "--output_dir", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    broken.mkdir(parents=True)
    first = min(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(first, broken / first.name)
    shutil.copy(whole / "run_arguments.json", broken)
    for _ in range(2):
        done = launch("run_xmatching.py", *arguments, *saves, "--output_dir", broken)
        assert done.returncode == 0, done.stderr[-3000:]
        for name in ("model.safetensors", "caption_bank.safetensors", "README.md", "head_start.json"):
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
        assert results(whole) == results(broken) and results(whole, "start_results.json") == results(
            broken, "start_results.json"
        )
        (broken / "eval_results.json").unlink()  # the second time the training is over, and the rest is done


def test_steps_that_end_below_the_start_are_said_or_taken_back(launch, arguments, tmp_path):
    wild = ["--learning_rate", 3, "--num_train_epochs", 4, "--weight_decay", 0]
    done = launch("run_xmatching.py", *arguments, *wild, "--output_dir", tmp_path / "said")
    assert done.returncode == 0, done.stderr[-3000:]
    start, end = results(tmp_path / "said", "start_results.json"), results(tmp_path / "said")
    assert (
        end["eval_cosine_mrr"] < start["start_mrr"] and "at the closed-form start: lower" in done.stdout + done.stderr
    )
    best = ["--load_best_model_at_end", "--metric_for_best_model", "mrr", "--save_strategy", "epoch"]
    done = launch("run_xmatching.py", *arguments, *wild, *best, "--output_dir", tmp_path / "kept-start")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the start is the best model, and is kept" in done.stdout + done.stderr
    assert results(tmp_path / "kept-start")["eval_cosine_mrr"] == pytest.approx(start["start_mrr"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_states", "false"], "--keep_states true"),
        (["--freeze_vision_tower", "false"], "--keep_states true"),
        (["--text_head", "mlp"], "--text_head linear"),
        (["--head_start", "none", "--head_start_regularization", 1], "--head_start_regularization"),
        (["--head_start_regularization", -1], "--head_start_regularization"),
        (["--caption_bank_size", -1], "--caption_bank_size"),
        (["--kept_views", 2, "--keep_states", "false"], "--kept_views"),
    ],
)
def test_mistakes_are_one_line(launch, arguments, flags, message, tmp_path):
    done = launch("run_xmatching.py", *arguments, *flags, "--output_dir", tmp_path / "wrong")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "wrong").exists()


def test_augmented_views_are_kept(launch, arguments, tmp_path):
    flags = ["--image_augmentation", "random_resized_crop", "--kept_views", 3, "--output_dir", tmp_path / "views"]
    done = launch("run_xmatching.py", *arguments, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 of 36 image states are kept" in done.stdout  # three of each to train on
    with open(tmp_path / "views" / "eval_queries.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert os.path.exists(tmp_path / "views" / "caption_bank.safetensors")
