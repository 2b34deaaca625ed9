"""Thousands of steps at flat memory: what a recipe's process holds after it has warmed up, it holds at the end.

Every recipe that was run, but for sizes. IMAGEDEX_STEPS=400 makes it shorter: the bound is one of growth, whatever the steps.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipes import commands, parts  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parents[2]
STEPS = int(os.environ.get("IMAGEDEX_STEPS", 2000))
EVERY = max(1, STEPS // 80)
GROWTH = (
    12 * 2**20
)  # bytes that an allocator may move by; a tensor of 10 kB a step would be 10 MB in half of 2,000 steps
TENSORS = 20  # as an evaluation or a checkpoint may leave behind once
STREAM = "streaming"


def watched(folder, name, script, arguments, out):
    """What the run held, [(bytes, tensors)], every `EVERY` steps; [] of a run that another one starts from."""
    steps = [
        "--max_steps",
        STEPS,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        STEPS // 4,
        "--logging_strategy",
        "steps",
    ]
    steps += ["--logging_steps", max(1, STEPS // 40), "--save_strategy", "steps", "--save_steps", STEPS // 4]
    recipe = [] if name == STREAM else [ROOT / "recipes" / f"{name}.yaml"]
    command = [
        sys.executable,
        ROOT / "tests" / "watched_run.py",
        folder / "held.json",
        EVERY,
        Path(script).stem,
        *recipe,
    ]
    command += [*arguments, *steps, "--dataloader_num_workers", 0, "--save_total_limit", 1]
    command += ["--use_cpu", "--report_to", "none", "--keep_dir", "kept", "--output_dir", out]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment = os.environ | own | {"PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "held.json").read_text())


def streamed(flickr_folder, flickr_shards):
    """What no recipe has: tar shards."""
    text = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    return "run_xmatching.py", [
        "--streaming", "--dataset_name", flickr_shards, "--shuffle_buffer_size", 10, "--text_config", json.dumps(text),
        "--vision_config", json.dumps(vision), "--image_size", 16, "--projection_dim", 16, "--loss_type", "info_nce",
        "--freeze_text_tower", "false", "--freeze_vision_tower", "false", "--do_train", "--per_device_train_batch_size", 12,
        "--validation_file", flickr_folder / "captions.csv", "--image_dir", flickr_folder / "images", "--do_eval",
    ]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("name", [*commands(""), STREAM])
def test_memory_stays_flat(parts, flickr_folder, flickr_shards, tmp_path, name):  # noqa: F811
    if name == STREAM:
        (flickr_folder / "captions.csv").write_bytes((flickr_folder / "captions.txt").read_bytes())
        script, arguments = streamed(flickr_folder, flickr_shards)
    else:
        script, arguments = commands(flickr_folder)[name]
    if name.endswith("retrieval"):
        first = name.replace("retrieval", "indexing")
        watched(tmp_path, first, *commands(flickr_folder)[first], "step1")
    held = watched(tmp_path, name, script, arguments, "run")
    assert len(held) > 40
    quarter = len(held) // 4
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    sizes = [statistics.median(size for size, _ in samples) for samples in (early, late)]
    counts = [statistics.median(tensors for _, tensors in samples) for samples in (early, late)]
    assert sizes[1] - sizes[0] < GROWTH, (
        f"{name} grew by {(sizes[1] - sizes[0]) / 2**20:.1f} MB in half of {STEPS} steps"
    )
    assert counts[1] - counts[0] <= TENSORS, f"{name} held {counts[0]} tensors, then {counts[1]}"
