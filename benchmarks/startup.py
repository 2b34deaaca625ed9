r"""How long the commands take to start, beside a process that only imports torch and transformers and loads the weights.

    python benchmarks/startup.py --model runs/mine --photos my_photos      # a minute or two
    python benchmarks/startup.py --repeats 3                               # with a small model and pictures of its own

Each round starts every command once, one after the other, in fresh processes; reported are medians of wall time and of the
processor's time (user and system), which other work on the machine disturbs less, and what a command takes beyond its own
baseline in the same round.
"""

import argparse
import importlib.metadata
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from million_queries import save_model
from PIL import Image

COLUMNS = ("command", "beyond", "wall_seconds", "cpu_seconds", "wall_beyond", "cpu_beyond", "repeats", "hardware", "torch",
           "transformers")  # fmt: skip
LOAD = "import sys, torch, transformers; transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)"
TRAINER = "import torch; from transformers import TrainingArguments"
SCRIPTS = ("run_xmatching.py", "run_image_indexing.py", "run_dsi.py", "run_retrieval.py")


def commands(model: Path, gallery: Path) -> dict[str, tuple[list, str]]:
    """Name -> the command, and the name of its baseline."""
    python, imagedex = [sys.executable], [sys.executable, "-m", "imagedex"]
    plain = {
        "nothing": ([*python, "-c", ""], ""),
        "import transformers": ([*python, "-c", "import transformers"], ""),
        "import transformers, imagedex": ([*python, "-c", "import transformers, imagedex"], "import transformers"),
        "imagedex --help": ([*imagedex, "--help"], "nothing"),
        "imagedex search --help": ([*imagedex, "search", "--help"], "nothing"),
        "import TrainingArguments": ([*python, "-c", TRAINER], ""),
    }
    helps = {f"{name} --help": ([*python, ROOT / name, "--help"], "import TrainingArguments") for name in SCRIPTS}
    load = {
        "torch, transformers, weights": ([*python, "-c", LOAD, model], ""),
        "imagedex search": ([*imagedex, "search", "two dogs", "--gallery", gallery], "torch, transformers, weights"),
    }
    return plain | helps | load


def times(command: list) -> tuple[float, float]:
    """Wall time and processor time of one process and its children, in seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def draw_pictures(folder: Path, count: int) -> None:
    rng = random.Random(0)
    folder.mkdir()
    for number in range(count):
        Image.frombytes("RGB", (4, 4), rng.randbytes(48)).resize((64, 48)).save(folder / f"{number:04d}.jpg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a dual encoder's folder; by default a small one with random weights")
    parser.add_argument("--photos", help="a folder of pictures; by default 1,000 drawn ones")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, photos = Path(args.model or folder / "model"), Path(args.photos or folder / "photos")
        if not args.model:
            save_model(model)
        if not args.photos:
            draw_pictures(photos, 1000)
        times([sys.executable, "-m", "imagedex", "index", photos, "--gallery", folder / "gallery", "--model", model])
        asked = commands(model.resolve(), folder / "gallery")
        found = {name: [] for name in asked}
        for _ in range(args.repeats):
            for name, (command, _) in asked.items():
                found[name].append(times(command))
    for name, (_, baseline) in asked.items():
        row = {"command": name, "beyond": baseline, "repeats": args.repeats}
        for number, kind in enumerate(("wall", "cpu")):
            own = [pair[number] for pair in found[name]]
            row[f"{kind}_seconds"] = round(statistics.median(own), 3)
            if baseline:
                less = [pair[number] for pair in found[baseline]]
                row[f"{kind}_beyond"] = round(statistics.median(a - b for a, b in zip(own, less, strict=True)), 3)
        rows.append(row | versions)
        print({key: row.get(key, "") for key in COLUMNS[:6]}, flush=True)
    path = args.results_dir / f"startup-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    main()
