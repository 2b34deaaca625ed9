"""--report_to from the real command line, without a network."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def arguments(flickr_folder, text_config, vision_config):
    """A run of a second into the folder `out`."""
    return [
        "--dataset_name", flickr_folder, "--output_dir", "out", "--held_out_captions_per_image", 1,
        "--text_config", json.dumps(text_config), "--vision_config", json.dumps(vision_config), "--image_size", 16,
        "--text_pooling_layers", 1, "--projection_dim", 16, "--loss_type", "info_nce", "--do_train", "--do_eval", "--use_cpu",
        "--num_train_epochs", 1, "--per_device_train_batch_size", 12, "--save_strategy", "epoch", "--logging_steps", 1,
    ]  # fmt: skip


def test_tensorboard_writes_into_the_output_folder_and_the_run_goes_on(launch, arguments, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = launch("run_xmatching.py", *arguments, "--report_to", "tensorboard")
    assert done.returncode == 0, done.stderr[-3000:]
    files = list((tmp_path / "out" / "runs").rglob("events.out.tfevents.*"))
    values = {}
    for file in files:
        events = accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    assert len(values["train/loss"]) == 3
    measured = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert values["eval/hits@1"] == [pytest.approx(measured["eval_hits@1"])]

    (tmp_path / "out" / "trainer_state.json").unlink()  # as if stopped before the end of the training
    again = launch("run_xmatching.py", *arguments, "--report_to", "tensorboard")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from" in again.stdout


def test_trackio_keeps_training_and_evaluation_as_one_run_on_this_machine(launch, arguments, tmp_path):
    pytest.importorskip("trackio")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = launch("run_xmatching.py", *arguments, "--report_to", "trackio", **home)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "out" / "eval_results.json").read_text())

    def ask(*words):
        command = [
            sys.executable,
            "-c",
            "from trackio.cli import main; main()",
            *words,
            "--project",
            "huggingface",
            "--json",
        ]
        answer = subprocess.run(command, env=os.environ | home, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr[-2000:]
        return json.loads(answer.stdout)

    (run,) = ask("list", "runs")["runs"]
    assert run.startswith("out-")
    values = {
        name: ask("get", "metric", "--run", run, "--metric", name)["values"] for name in ("train/loss", "eval/hits@1")
    }
    assert len(values["train/loss"]) == 3
    assert [row["value"] for row in values["eval/hits@1"]] == [pytest.approx(measured["eval_hits@1"])]


@pytest.mark.parametrize(
    ("name", "message"), [("tensorbord", "tensorbord is not supported"), ("comet_ml", "Run `pip install comet-ml")]
)
def test_a_tracker_that_is_not_there_is_one_line_before_anything_is_read(
    arguments, tmp_path, monkeypatch, capfd, name, message
):
    import run_xmatching
    from imagedex import command_line

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: run_xmatching.main(list(map(str, [*arguments, "--report_to", name]))))
    said = capfd.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith(f"error: --report_to {name} cannot work: ") and len(said.err.splitlines()) == 1
    assert message in said.err and "Corpus recognised" not in said.out
