"""The real command line with two processes: what one process with the same global batch gives, metrics and model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from imagedex.modeling.modeling_xmatching import XMatchingModel

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
TEXT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
VISION = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
          "patch_size": 8}  # fmt: skip


def launcher(config):
    accelerate = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    return (*accelerate, "--config_file", str(CONFIGS / config), "--num_cpu_threads_per_process", "1")


def flags(flickr_folder, out, batch_size, *more):
    """Without dropout (ranks draw their own) and with plain SGD (Adam makes steps out of the rounding of zeros)."""
    return [
        "--dataset_name", flickr_folder, "--output_dir", out, "--held_out_captions_per_image", 1, "--image_size", 16,
        "--text_config", json.dumps(TEXT), "--vision_config", json.dumps(VISION), "--text_pooling", "mean",
        "--text_pooling_layers", 1, "--vision_pooling", "mean", "--text_head", "mlp",
        "--vision_head", "mlp", "--head_dropout", 0, "--projection_dim", 16, "--loss_margin", 0.5,
        "--freeze_text_tower", "false", "--freeze_vision_tower", "false", "--do_train", "--do_eval",
        "--optim", "sgd", "--learning_rate", 0.05, "--num_train_epochs", 3, "--dataloader_drop_last", "true",
        "--per_device_train_batch_size", batch_size, "--per_device_eval_batch_size", 5, "--eval_strategy", "epoch",
        "--save_strategy", "epoch", "--load_best_model_at_end", "--metric_for_best_model", "mrr", "--logging_steps", 1,
        "--report_to", "none", *more,
        *(["--use_cpu"] if torch.accelerator.is_available() else []),  # elsewhere the script must know by itself
    ]  # fmt: skip


def what_a_run_left(folder):
    """(eval_results.json without its times, loss of every step, weights)."""
    results = json.loads((folder / "eval_results.json").read_text())
    timed = ("runtime", "per_second")
    results = {name: value for name, value in results.items() if not name.endswith(timed)}
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return results, losses, XMatchingModel.from_pretrained(folder).state_dict()


def test_two_processes_train_and_judge_as_one_does(launch, flickr_folder, tmp_path):
    """12 captions and 12 pictures in batches of 5: three batches for one process, for two an uneven second round."""
    runs = {
        "one": (12, [], "cpu.yaml"),
        "two": (6, [], "cpu_two_processes.yaml"),
        "cached": (6, ["--gradient_cache_chunk_size", 4], "cpu_two_processes.yaml"),
    }
    for out, (batch_size, more, config) in runs.items():
        arguments = flags(flickr_folder, out, batch_size, "--loss_type", "sigmoid", *more)
        done = launch("run_xmatching.py", *arguments, launcher=launcher(config))
        assert done.returncode == 0, done.stderr[-3000:]
        # one process speaks
        assert done.stdout.count("12 held-out captions, a gallery of 12 pictures") == 1
        assert done.stdout.count(f"model, processor, code and card: {out}") == 1

    results, losses, weights = what_a_run_left(tmp_path / "one")
    assert results["eval_queries"] == results["eval_gallery_size"] == 12
    assert len(losses) == 9 and losses[0] > losses[-1]
    loss = results.pop("eval_loss")
    for out in ("two", "cached"):
        found, found_losses, found_weights = what_a_run_left(tmp_path / out)
        assert found.pop("eval_loss") == pytest.approx(loss, abs=1e-5)
        assert found == results, out
        assert found_losses == pytest.approx(losses, abs=1e-4)
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, atol=1e-5, rtol=1e-5, msg=f"{name} of {out}")
        files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", out)]
        assert files[0] == files[1]


def test_adapters_learn_in_two_processes_as_in_one(launch, flickr_folder, tmp_path):
    lora = ["--freeze_text_tower", "true", "--freeze_vision_tower", "true", "--lora_rank", 2]
    for out, batch_size, config in (("one", 12, "cpu.yaml"), ("two", 6, "cpu_two_processes.yaml")):
        arguments = flags(flickr_folder, out, batch_size, *lora)
        done = launch("run_xmatching.py", *arguments, launcher=launcher(config))
        assert done.returncode == 0, done.stderr[-3000:]
    (results, losses, weights), two = (what_a_run_left(tmp_path / out) for out in ("one", "two"))
    assert two[0] == pytest.approx(results, abs=1e-5) and two[1] == pytest.approx(losses, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(two[2][name], weight, atol=1e-5, rtol=1e-5, msg=name)
