r"""A gallery that is killed on the way and continued, or made by two processes, against one that is not: the same bytes?

    python benchmarks/gallery_kills.py                                 # 20,000 pictures
    python benchmarks/gallery_kills.py --pictures 2500 --kills 2       # to try it

Pictures of 160 x 120 pixels are drawn into a folder and indexed by the real command with a small XMatchingModel (random weights,
512 numbers a vector). `killed`: SIGKILL at random moments, while files are read or encoded, and the same command until it ends.
`two processes`: by accelerate. Then 100 pictures are added, 100 changed and 100 removed. Every file of the galleries is compared,
the catalog and all vectors.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from million_queries import save_model
from PIL import Image

WIDTH, CHANGED = 512, 100
COLUMNS = ("pictures", "how", "kills", "seconds", "line", "same_bytes", "hardware", "torch", "transformers")
TWO = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_two_processes.yaml"))


def draw(path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.frombytes("RGB", (8, 6), rng.randbytes(144))
    coarse.resize((160, 120), Image.Resampling.BICUBIC).save(path, quality=90)


def begin(folder: Path, gallery: str, launcher=()) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "imagedex", "index", folder / "pictures", "--gallery", folder / gallery,
               "--model", folder / "model", "--device", "cpu", "--json"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log
        )


def ended(process: subprocess.Popen, folder: Path) -> str:
    """What it says at its end."""
    output = process.communicate()[0].decode()
    if process.returncode:
        sys.exit(f"it ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}")
    said = json.loads(output.splitlines()[-1])
    return ", ".join(f"{said[name]} {name}" for name in ("added", "changed", "removed", "unchanged"))


def undisturbed(folder: Path, gallery: str, launcher=()) -> tuple[float, str]:
    started = time.perf_counter()
    line = ended(begin(folder, gallery, launcher), folder)
    return time.perf_counter() - started, line


def killed(folder: Path, gallery: str, kills: int, whole: float, rng: random.Random) -> tuple[float, str]:
    """Args: whole, the seconds that it takes alone."""
    started = time.perf_counter()
    for number in range(kills):
        process = begin(folder, gallery)
        try:
            process.wait(rng.uniform(0.2, 0.9) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        shards = len(list((folder / gallery / "vectors").glob("shard-*")))
        print(f"kill {number + 1}: {shards} shards are there", flush=True)
    line = ended(begin(folder, gallery), folder)
    return time.perf_counter() - started, line


def digest(gallery: Path) -> dict[str, str]:
    files = sorted(path for path in gallery.rglob("*") if path.is_file())
    return {str(path.relative_to(gallery)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def change(folder: Path, rng: random.Random) -> None:
    there = rng.sample(sorted(folder.rglob("*.jpg")), 2 * CHANGED)
    for path in there[:CHANGED]:
        path.unlink()
    for path in [*there[CHANGED:], *(folder / f"new/{number:03d}.jpg" for number in range(CHANGED))]:
        draw(path, rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    rows, rng = [], random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", WIDTH)
        for number in range(args.pictures):
            draw(folder / "pictures" / f"{number % 100:02d}" / f"{number:06d}.jpg", rng)

        def tell(how, seconds, line, gallery, kills=0):
            same = digest(folder / gallery) == digest(folder / "whole")
            rows.append({"pictures": args.pictures, "how": how, "kills": kills, "seconds": round(seconds, 1), "line": line,
                         "same_bytes": same} | versions)  # fmt: skip
            print(rows[-1], flush=True)

        seconds, line = undisturbed(folder, "whole")
        tell("undisturbed", seconds, line, "whole")
        tell("killed", *killed(folder, "killed", args.kills, seconds, rng), "killed", args.kills)
        tell("two processes", *undisturbed(folder, "two", TWO), "two")
        change(folder / "pictures", rng)
        tell("undisturbed, then changed", *undisturbed(folder, "whole"), "whole")
        tell("killed, then changed", *undisturbed(folder, "killed"), "killed")
    path = args.results_dir / f"gallery_kills-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    main()
