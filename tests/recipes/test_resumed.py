"""Every recipe that was run: killed in the middle and started again, it ends, bit for bit, where an unbroken run does.

The recipes are as they are but for sizes: few pictures, narrow towers, few steps. tests/test_run_resumed.py has the same in
small, within one process, with stops between and within epochs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipes import commands, parts  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parents[2]


def started(folder, name, script, arguments, out):
    command = [sys.executable, ROOT / script, ROOT / "recipes" / f"{name}.yaml", *arguments]
    command += ["--use_cpu", "--report_to", "none", "--keep_dir", "kept", "--output_dir", out]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    with open(folder / "said.txt", "w") as said:
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=said, stderr=said)


def finished(folder, *command):
    assert started(folder, *command).wait() == 0, (folder / "said.txt").read_text()[-3000:]


def figures(folder):
    found = json.loads((folder / "eval_results.json").read_text())
    return {
        name: value for name, value in found.items() if not name.endswith(("runtime", "per_second", "ms_per_query"))
    }


def is_whole(state):
    """Whether a checkpoint's state, which is written last, is all there."""
    try:
        return bool(json.loads(state.read_text()))
    except (ValueError, FileNotFoundError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", commands(""))
def test_killed_and_started_again_it_ends_where_an_unbroken_run_does(
    parts,  # noqa: F811
    flickr_folder,
    tmp_path,
    name,
):
    script, arguments = commands(flickr_folder)[name]
    if name.endswith("retrieval"):
        first = name.replace("retrieval", "indexing")
        finished(tmp_path, first, *commands(flickr_folder)[first], "step1")
    finished(tmp_path, name, script, arguments, "whole/run")

    out = tmp_path / "killed" / "run"
    process = started(tmp_path, name, script, arguments, "killed/run")
    while not any(map(is_whole, out.glob("checkpoint-*/trainer_state.json"))):
        assert process.poll() is None, (tmp_path / "said.txt").read_text()[-3000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "model.safetensors").exists()
    finished(tmp_path, name, script, arguments, "killed/run")
    assert "going on from" in (tmp_path / "said.txt").read_text()

    whole = tmp_path / "whole" / "run"
    for file in sorted(path.name for path in whole.glob("*.safetensors")):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert figures(out) == figures(whole)
