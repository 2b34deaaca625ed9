"""run_dsi.py with two processes: what one process with the same global batch gives, metrics, identifiers and model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from imagedex.modeling.modeling_codebook_t5 import CodebookT5

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
       "patch_size": 8}  # fmt: skip


def launcher(config):
    accelerate = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    return (*accelerate, "--config_file", str(CONFIGS / config), "--num_cpu_threads_per_process", "1")


def flags(flickr_folder, out, batch_size):
    """Nothing is drawn at random, identifiers have one length (a rank's mean is over as many tokens), and plain SGD."""
    return [
        "--model_type", "codebook_t5", "--dataset_name", flickr_folder, "--output_dir", out, "--held_out_captions_per_image", 1,
        "--t5_config", json.dumps(T5), "--vision_config", json.dumps(VIT), "--image_size", 16,
        "--visual_token_selection", "even", "--identifier_scheme", "rq", "--identifier_levels", 2, "--do_train", "--do_eval",
        "--do_predict", "--optim", "sgd", "--learning_rate", 0.05, "--num_train_epochs", 2, "--dataloader_drop_last", "true",
        "--per_device_train_batch_size", batch_size, "--per_device_eval_batch_size", 5, "--eval_strategy", "epoch",
        "--save_strategy", "epoch", "--load_best_model_at_end", "--metric_for_best_model", "mrr", "--logging_steps", 1,
        "--keep_states", "--keep_dir", f"{out}-kept", "--report_to", "none",
        *(["--use_cpu"] if torch.accelerator.is_available() else []),
    ]  # fmt: skip


def what_a_run_left(folder):
    """(eval_results.json without its times, loss of every step, weights)."""
    results = json.loads((folder / "eval_results.json").read_text())
    timed = ("runtime", "per_second", "per_query")
    results = {name: value for name, value in results.items() if not name.endswith(timed)}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return results, losses, CodebookT5.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_two_processes_train_and_judge_as_one_does(launch, flickr_folder, tmp_path):
    """12 captions and 12 pictures are asked in batches of 5: for two processes an uneven second round."""
    for out, batch_size, config in (("one", 12, "cpu.yaml"), ("two", 6, "cpu_two_processes.yaml")):
        done = launch("run_dsi.py", *flags(flickr_folder, out, batch_size), launcher=launcher(config), timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("12 held-out captions, a gallery of 12 pictures") == 1, "one process speaks"

    results, losses, weights = what_a_run_left(tmp_path / "one")
    assert results["eval_queries"] == results["eval_gallery_size"] == results["eval_memorised_samples"] == 12
    assert len(losses) == 12 and losses[0] > losses[-1]
    found, found_losses, found_weights = what_a_run_left(tmp_path / "two")
    assert found.pop("eval_loss") == pytest.approx(results.pop("eval_loss"), abs=1e-4)
    for name in ("eval_codebook_perplexity", "eval_codebook_usage"):  # means over batches, which are others here
        assert found.pop(name) > 0 and results.pop(name) > 0
    assert found == results
    assert found_losses == pytest.approx(losses, abs=1e-3)
    for name, weight in weights.items():
        torch.testing.assert_close(found_weights[name], weight, atol=1e-4, rtol=1e-4, msg=name)
    one, two = ((tmp_path / out) for out in ("one", "two"))
    shards = [sorted((tmp_path / f"{out}-kept").glob("image_states-*/shard-*")) for out in ("one", "two")]
    assert [path.name for path in shards[0]] == [path.name for path in shards[1]] and shards[0]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    for name in ("identifiers.json", "identifiers.safetensors", "tokenizer.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    rankings = [
        [json.loads(line)["images"] for line in (out / "rankings.jsonl").read_text().splitlines()] for out in (one, two)
    ]
    assert rankings[0] == rankings[1] and len(rankings[0]) == 12
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


@pytest.mark.slow
def test_two_processes_that_stopped_within_an_epoch_end_where_unbroken_ones_do(launch, flickr_folder, tmp_path):
    """Six steps an epoch; the checkpoint is of the second."""
    drawn = ["--caption_word_dropout", 0.2, "--caption_mixing", 0.5, "--visual_token_selection", "random"]
    steps = ["--max_steps", 9, "--save_strategy", "steps", "--save_steps", 8, "--load_best_model_at_end", "false"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        done = launch(
            "run_dsi.py", *flags(flickr_folder, out, 6), *drawn, *steps, launcher=launcher("cpu_two_processes.yaml")
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if out == whole:
            broken.mkdir()
            shutil.copytree(whole / "checkpoint-8", broken / "checkpoint-8")
            shutil.copy(whole / "run_arguments.json", broken)
    assert "going on from" in done.stdout
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert what_a_run_left(broken)[:2] == what_a_run_left(whole)[:2]
