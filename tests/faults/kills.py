"""Chains of kills: trainings that are killed at random moments and begun again until they end, against one that is left alone.

    python tests/faults/kills.py [SCRIPT ...] [--chains 9] [--moments 3] [--seed 0] [--folder DIR]

A chain is one training. At each of its random moments, some of them while a checkpoint is being written, the process is killed by
SIGKILL, and the same command is given again. Prints a line a chain, with the reason beside each that failed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VIT = {"model_type": "vit", "patch_size": 8, **SMALL}
STEPS = 24
COMMON = ["--do_train", "--use_cpu", "--report_to", "none", "--max_steps", STEPS, "--save_strategy", "steps", "--save_steps", 2,
          "--save_total_limit", 2, "--logging_steps", 2, "--learning_rate", "3e-3"]  # fmt: skip
ASKED = ["--do_eval", "--do_predict", "--eval_strategy", "steps", "--eval_steps", 2, "--load_best_model_at_end", "true",
         "--metric_for_best_model", "eval_loss", "--caption_word_dropout", 0.2]  # fmt: skip
PICTURES = ["--dataset_name", "shape_scenes", "--dataset_config_name", 24, "--held_out_captions_per_image", 1,
            "--per_device_train_batch_size", 8, "--image_size", 16]  # fmt: skip
GENERATIVE = ["--t5_config", json.dumps(T5), "--vision_config", json.dumps(VIT), *PICTURES, *COMMON]
GROUNDED = ["--model_type", "vision_grounded_t5", *GENERATIVE]


def commands(folder: Path) -> dict[str, list]:
    """Name -> script and arguments, without the output folder."""
    return {
        "xmatching": ["run_xmatching.py", "--text_config", json.dumps({"model_type": "bert", **SMALL}), "--vision_config",
                      json.dumps(VIT), "--projection_dim", 16, *PICTURES, *COMMON, *ASKED[:-2], "--image_augmentation",
                      "random_resized_crop"],
        "codebook_t5": ["run_dsi.py", "--model_type", "codebook_t5", *GENERATIVE, *ASKED],
        "vision_grounded_t5_1": ["run_image_indexing.py", *GROUNDED, "--do_eval", "--image_augmentation",
                                 "random_resized_crop"],
        "vision_grounded_t5_2": ["run_dsi.py", "--model_name_or_path", folder / "vision_grounded_t5_1" / "whole", *PICTURES,
                                 *COMMON, *ASKED],
        "text_dsi": ["run_dsi.py", "--model_type", "t5", "--t5_config", json.dumps(T5), "--dataset_name",
                     folder / "documents", *COMMON, *ASKED, "--per_device_train_batch_size", 4],
    }  # fmt: skip


NAMES = tuple(commands(Path()))


@dataclass
class Chain:
    """What came of one: how far the training was at each kill, and why it does not match; "" where it does."""

    name: str
    number: int
    killed: list[str]
    reason: str = ""


def begin(command: list, out: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(out.parent / "cache"), "IMAGEDEX_KEEP_DIR": str(out.parent / "kept")}
    words = [sys.executable, ROOT / command[0], *command[1:], "--output_dir", out]
    with open(log, "a") as file:
        return subprocess.Popen([str(word) for word in words], stdout=file, stderr=file, env=environment)


def undisturbed(name: str, command: list, folder: Path) -> Path:
    """Its output folder."""
    out = folder / name / "whole"
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / "whole.log"
    if begin(command, out, log).wait():
        raise RuntimeError(f"{name} fails undisturbed, see {log}")
    return out


def reached(out: Path) -> int:
    """The step of a run's newest checkpoint; -1 before it has written anything."""
    if not (out / "run_arguments.json").exists():
        return -1
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*")), default=0)


def place(out: Path) -> str:
    """How far a run is, and what it was writing."""
    writing = sorted(path.name for path in (out / "_unfinished").glob("*"))
    return f"{reached(out)}" + (f" (writing {writing[0]})" if writing else "")


def wait_for(process: subprocess.Popen, out: Path, step: int, seconds: float, writing: bool) -> None:
    """Until so long after the checkpoint of that step, or of a later one; then, if asked, until something is being written."""
    while process.poll() is None and reached(out) < step:
        time.sleep(0.001)
    time.sleep(seconds)
    while process.poll() is None and writing and not (out / "_unfinished").exists():
        time.sleep(0.0005)


def chain(name: str, number: int, command: list, whole: Path, moments: int, draw) -> Chain:
    """One training that is killed at so many moments, unless it ends before them."""
    out, found = whole.parent / f"chain-{number}" / whole.name, Chain(name, number, [])
    log = out.parent.parent / f"chain-{number}.log"
    out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(moments):
        before = reached(out)
        step = before + 1 + draw.randrange(max(1, (STEPS - before) // 2))
        process = begin(command, out, log)
        wait_for(process, out, step, draw.uniform(0, 0.3), writing=draw.random() < 0.4)
        if process.poll() is not None:
            if process.returncode:
                return failed(found, log, process.returncode)
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found.killed.append(place(out))
    process = begin(command, out, log)
    if process.wait(timeout=600):
        return failed(found, log, process.returncode)
    found.reason = difference(out, whole)
    return found


def failed(found: Chain, log: Path, status: int) -> Chain:
    found.reason = f"status {status}: {log.read_text(errors='replace').strip().splitlines()[-1][:160]}"
    return found


def digests(folder: Path) -> dict[str, str]:
    """What a run is for: weights, identifiers, rankings."""
    wanted = {*folder.glob("*.safetensors"), *folder.glob("identifiers.json"), *folder.glob("rankings.jsonl")}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}


def difference(found: Path, expected: Path) -> str:
    ours, theirs = digests(found), digests(expected)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    left = sorted(path.name for path in found.iterdir() if path.name.startswith(("_", ".")))
    if differing:
        return f"other {', '.join(differing)}"
    return f"left behind: {', '.join(left)}" if left else ""


def matrix(names, chains: int, moments: int, seed: int, folder: Path):
    """Yields each `Chain` when it has ended."""
    from resuming import write_documents

    write_documents(folder / "documents")
    every = commands(folder)
    for name in names:
        if name == "vision_grounded_t5_2" and not (folder / "vision_grounded_t5_1" / "whole").exists():
            undisturbed("vision_grounded_t5_1", every["vision_grounded_t5_1"], folder)
        whole = undisturbed(name, every[name], folder)
        for number in range(chains):
            draw = random.Random(f"{seed}/{name}/{number}")
            yield chain(name, number, every[name], whole, moments, draw)


def row(found: Chain) -> str:
    killed = ", ".join(found.killed)
    return f"{found.name:22}{found.number:3}  killed at {killed:60}  {found.reason or 'bit-equal'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("script", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--chains", type=int, default=9)
    parser.add_argument("--moments", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default nowhere")
    args = parser.parse_args()
    if unknown := set(args.script) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for result in matrix(args.script, args.chains, args.moments, args.seed, folder.resolve()):
        found.append(result)
        print(row(result), flush=True)
    equal = sum(not result.reason for result in found)
    print(f"{equal} of {len(found)} chains went on and ended bit-equal")
    if not args.folder:
        shutil.rmtree(folder)
    return int(equal < len(found))


if __name__ == "__main__":
    sys.exit(main())
