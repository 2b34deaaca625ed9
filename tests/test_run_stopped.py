"""A run that a signal, a full disk or another run stops ends with one line, leaves nothing torn, and goes on."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils
from resuming import T5, check_same, run, write_documents
from transformers import Trainer

import imagedex.training.run
import run_dsi
from imagedex.errors import Stopped, UserError
from imagedex.training import whole_checkpoints
from imagedex.training.generative.trainer import DSITrainer
from imagedex.training.stopping import StopSignals
from imagedex.training.whole_checkpoints import MANIFEST, fault, numbered, write_manifest

PER_EPOCH, STEPS = 3, 7  # twelve questions and documents, four a batch


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """arguments(folder, *more): of a training of two epochs and a bit in which words are dropped."""
    documents = write_documents(tmp_path_factory.mktemp("corpus") / "documents")

    def made(folder, *more):
        return ["--model_type", "t5", "--t5_config", json.dumps(T5), "--dataset_name", documents, "--do_train", "--do_eval",
                "--do_predict", "--use_cpu", "--report_to", "none", "--max_steps", STEPS, "--save_strategy", "steps",
                "--save_steps", 2, "--eval_strategy", "epoch", "--logging_steps", 1, "--learning_rate", "3e-3",
                "--caption_word_dropout", 0.3, "--per_device_train_batch_size", 4, "--output_dir", folder, *more]  # fmt: skip

    return made


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The folder of a run that nothing disturbs; its name is `out`, too, since the card has it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(run_dsi, arguments(folder))
    return folder


@pytest.fixture
def command(arguments, tmp_path, monkeypatch):
    """command(*more): `arguments` with the folder `out`."""
    monkeypatch.chdir(tmp_path)
    return lambda *more, output_dir="out": arguments(output_dir, *more)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): before the nth step of this process `do()` is called."""

    def arrange(number, do):
        step, calls = Trainer.training_step, []

        def training_step(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                do()
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", training_step)

    return arrange


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def check_nothing_torn(folder):
    assert [fault(checkpoint) for checkpoint in numbered(Path(folder))] == [None] * len(numbered(Path(folder)))
    assert not [name for name in names(folder) if name.startswith((".", "_"))]


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, PER_EPOCH), (signal.SIGINT, 130, 4), (signal.SIGINT, 130, STEPS)],
)
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(command, whole, at_step, number, status, step):
    """In the first step, within an epoch, in an epoch's last step and in the last of all."""
    at_step(step, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(
        Stopped, match=rf"out/checkpoint-{step} is written; the same command goes on in out$"
    ) as stopped:
        run(run_dsi, command())
    assert stopped.value.status == status and signal.getsignal(number) == before
    assert f"checkpoint-{step}" in names("out") and "trainer_state.json" not in names("out")
    check_nothing_torn("out")
    run(run_dsi, command())
    check_same(Path("out"), whole)
    assert Path("out/rankings.jsonl").read_bytes() == (whole / "rankings.jsonl").read_bytes()


def test_a_stop_saves_what_going_on_needs_whatever_else_is_saved(command, whole, at_step):
    for more in (["--save_strategy", "no"], ["--save_only_model", "true"]):
        shutil.rmtree("out", ignore_errors=True)
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(run_dsi, command(*more))
        run(run_dsi, command(*more))
        check_same(Path("out"), whole)


def test_a_signal_outside_training_ends_at_once(command, whole, monkeypatch):
    evaluate = DSITrainer.evaluate

    def asked(self, *args, **kwargs):
        if not self.is_in_train:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(DSITrainer, "evaluate", asked)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on in out"):
        run(run_dsi, command())
    assert "trainer_state.json" in names("out") and "eval_results.json" not in names("out")
    monkeypatch.setattr(DSITrainer, "evaluate", evaluate)
    run(run_dsi, command())
    check_same(Path("out"), whole)


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    trainer = SimpleNamespace(is_in_train=True, is_world_process_zero=lambda: False)
    with StopSignals(trainer, tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a job's signal may come to its processes more than once
        assert stop.asked == signal.SIGTERM and not ended
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [130]


def test_the_command_ends_in_one_line_and_the_status_of_its_signal(command, launch, tmp_path):
    """In a process of its own, with a DataLoader's worker that the signal reaches as well."""
    code = (
        "import os, runpy, signal, sys, transformers\n"
        "step = transformers.Trainer.training_step\n"
        "def asked(self, *a, **k):\n"
        "    if self.state.global_step == 2: os.killpg(0, signal.{})\n"
        "    return step(self, *a, **k)\n"
        "transformers.Trainer.training_step = asked\n"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for name, status in (("SIGTERM", 143), ("SIGINT", 130)):
        ended = launch("run_dsi.py", *command("--dataloader_num_workers", 1, output_dir=name),
                       launcher=("setsid", "--wait", sys.executable, "-c", code.format(name)))  # fmt: skip
        assert ended.returncode == status, ended.stderr[-3000:]
        said = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C"}[name]
        place = f"{name}/checkpoint-3"
        assert ended.stderr == f"stopped by {said}: {place} is written; the same command goes on in {name}\n"
        check_nothing_torn(tmp_path / name)


def test_processes_stop_together_when_one_is_asked(command, launch, tmp_path):
    (tmp_path / "asked.py").write_text(
        "import os, runpy, signal, sys, transformers\n"
        "step = transformers.Trainer.training_step\n"
        "def asked(self, *a, **k):\n"
        "    if self.state.global_step == 1 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *a, **k)\n"
        "transformers.Trainer.training_step = asked\n"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "asked.py")
    ended = launch("run_dsi.py", *command("--per_device_train_batch_size", 2), launcher=torchrun)
    said = "stopped by SIGTERM: out/checkpoint-2 is written; the same command goes on in out"
    assert ended.stderr.splitlines().count(said) == 1, ended.stderr[-3000:]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= names("out/checkpoint-2")
    check_nothing_torn("out")


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


# what is written by what -> module, name, how often it goes well before it fails, one run after the other
WRITES = {
    "states": (torch, "save", (0, 9)),
    "weights": (transformers.modeling_utils, "safe_save_file", (2, 2)),  # two checkpoints; one more, and the model
    "renames": (os, "replace", (1, 25)),
    "manifest": (whole_checkpoints, "describe", (3, 20)),
    "record": (imagedex.training.run, "create", (0,)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_breaks_nothing(command, whole, monkeypatch, name):
    """At the beginning, in a checkpoint, or in what comes after the training; each time the same command goes on."""
    module, attribute, every = WRITES[name]
    write = getattr(module, attribute)
    for allowed in every:
        left = [allowed]

        def fails(*args, left=left, **kwargs):
            left[0] -= 1
            return no_room() if left[0] < 0 else write(*args, **kwargs)

        monkeypatch.setattr(module, attribute, fails)
        with pytest.raises(UserError, match="no room to write --output_dir out"):
            run(run_dsi, command())
        check_nothing_torn("out")
    monkeypatch.setattr(module, attribute, write)
    run(run_dsi, command())
    check_same(Path("out"), whole)
    assert Path("out/rankings.jsonl").read_bytes() == (whole / "rankings.jsonl").read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with little room; small_disk(megabytes) changes that."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be had by root alone")

    def resize(kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)
        return place

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_breaks_nothing(command, whole, small_disk):
    """Room for a part of a checkpoint, for one and a part of the next, for all but the model at the end."""
    checkpoint = sum(path.stat().st_size for path in (whole / "checkpoint-2").iterdir()) // 1024
    for room in (checkpoint // 2, checkpoint + 60, 4 * checkpoint + 60):
        out = small_disk(room) / "out"
        with pytest.raises(UserError, match="no room to write|No space left on device"):
            run(run_dsi, command(output_dir=out))
        check_nothing_torn(out)
    out = small_disk(20_000) / "out"
    run(run_dsi, command(output_dir=out))
    check_same(out, whole)


def test_a_folder_that_is_deleted_meanwhile_is_said_and_stays_deleted(command, at_step):
    for step in (2, 7):
        at_step(step, lambda: shutil.rmtree("out"))
        with pytest.raises(UserError, match="--output_dir out is gone: it was deleted or moved"):
            run(run_dsi, command())
        assert not Path("out").exists()


def test_a_second_run_in_the_same_folder_is_refused(command, at_step, capfd):
    code = "import run_dsi, sys; from imagedex import command_line; command_line.run(run_dsi.main)"
    ended = []

    def another():
        root = str(Path(run_dsi.__file__).parent)
        ended.append(
            subprocess.run(
                [sys.executable, "-c", code, *map(str, command())],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": root},
            )  # fmt: skip
        )

    at_step(3, another)
    run(run_dsi, command())
    assert ended[0].returncode == 2
    assert ended[0].stderr.endswith(
        "error: --output_dir out: another run is at work there; wait until it ends, or give another folder\n"
    )
    check_nothing_torn("out")


def test_what_a_killed_run_left_is_cleared(command, whole, capfd):
    shutil.copytree(whole, "out")
    for name in ("finished.json", "trainer_state.json", "model.safetensors"):
        Path("out", name).unlink()
    Path("out/_unfinished/checkpoint-6").mkdir(parents=True)
    Path("out/.README.md.ab_12xyz.tmp").write_text("half a card")
    Path("out/notes.txt").write_text("mine")
    run(run_dsi, command())
    assert (
        "removed what a stopped run left unfinished in out: .README.md.ab_12xyz.tmp, _unfinished"
        in capfd.readouterr().out
    )
    check_nothing_torn("out")
    check_same(Path("out"), whole)
    assert Path("out/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "listed"),
    [("optimizer.pt", True), ("scheduler.pt", False), ("rng_state.pth", True), ("rng_state.pth", False)],
)
def test_no_checkpoint_is_executed(command, whole, name, listed):
    """A pickle that would do something, in a checkpoint whose maker wrote the manifest, too."""

    class Malicious:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    checkpoint = Path(shutil.copytree(whole / "checkpoint-2", "given/checkpoint-2"))
    torch.save(Malicious(), checkpoint / name)
    write_manifest(checkpoint) if listed else (checkpoint / MANIFEST).unlink()
    with pytest.raises(UserError, match="holds something else than tensors and numbers, and was not read"):
        run(run_dsi, command("--resume_from_checkpoint", checkpoint))
    assert not Path("executed").exists()
    with open("plain", "wb") as file:  # the pickle does what it says
        pickle.dump(Malicious(), file)
    pickle.loads(Path("plain").read_bytes())
    assert Path("executed").exists()


def test_the_best_model_is_kept_where_a_run_that_goes_on_lies_elsewhere(command, tmp_path):
    """A checkpoint names the best one by where it lay; the best model must also be as it was written."""
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--eval_strategy", "steps",
            "--eval_steps", 1, "--save_steps", 1, "--greater_is_better", "true", "--save_total_limit", 2]  # fmt: skip
    run(run_dsi, command(*best, output_dir="whole/out"))
    whole = tmp_path / "whole" / "out"
    state = json.loads((whole / "trainer_state.json").read_text())
    assert state["best_global_step"] < STEPS and len(numbered(whole)) == 2
    shutil.copytree(whole, "elsewhere/out")
    shutil.rmtree(whole / numbered(whole)[0].name)
    for name in ("finished.json", "trainer_state.json", "model.safetensors"):
        Path("elsewhere/out", name).unlink()
    run(run_dsi, command(*best, output_dir="elsewhere/out"))
    assert Path("elsewhere/out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("finished.json", "trainer_state.json", "model.safetensors"):
        Path("elsewhere/out", name).unlink()
    weights = Path("elsewhere/out", numbered(Path("elsewhere/out"))[0].name, "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="has the best model, but is not whole: model.safetensors has changed"):
        run(run_dsi, command(*best, output_dir="elsewhere/out"))
