r"""Memory of a search with a million queries, and what is left of one that is killed on the way.

    python benchmarks/million_queries.py                      # minutes on two cores
    python benchmarks/million_queries.py --queries 100000

A small XMatchingModel with random weights (BERT of 1 layer x 16) answers so many sentences, each with its right picture, from 300
drawn pictures, by the real command line. One run goes through; another is killed (SIGKILL) as often as asked and continued by the
same command. The memory of the process (of Linux: its resident set) is read after the first block of queries, half way and at
the last one; the rankings and figures of both must be the same bytes.
"""

import argparse
import csv
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
from PIL import Image

COLUMNS = ("format", "queries", "start_mib", "middle_mib", "end_mib", "kills", "lines", "same_bytes",
           "hardware", "torch", "transformers")  # fmt: skip
PICTURES = 300
THINGS = ("dog", "cat", "boat", "tree", "girl", "man", "bicycle", "ball", "house", "bird")
PLACES = ("on the grass", "in the water", "beside a wall", "under the sky", "near two others", "at night")


def save_model(folder: Path, projection_dim: int = 16) -> None:
    import torch

    from imagedex.configuration.configuration_xmatching import XMatchingConfig
    from imagedex.modeling.modeling_xmatching import XMatchingModel
    from imagedex.modeling.processing_retrieval import RetrievalProcessor
    from imagedex.training.image_processor import build_image_processor
    from imagedex.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([f"the {thing} number 0 {place}" for thing in THINGS for place in PLACES], 300)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = XMatchingConfig(
        text_config={"model_type": "bert", "vocab_size": len(tokenizer), "initializer_range": 0.5, **sizes},
        vision_config={"model_type": "vit", "image_size": 32, "patch_size": 16, "initializer_range": 0.5, **sizes},
        text_pooling="mean", text_pooling_layers=1, vision_pooling="mean", text_head="linear", vision_head="linear",
        projection_dim=projection_dim,
    )  # fmt: skip
    XMatchingModel(config).save_pretrained(folder)
    RetrievalProcessor(build_image_processor({"size": {"height": 32, "width": 32}}), tokenizer).save_pretrained(folder)


def draw_pictures(folder: Path) -> list[str]:
    folder.mkdir()
    rng, names = random.Random(0), [f"{number:03d}.png" for number in range(PICTURES)]
    for name in names:
        coarse = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(folder / name)
    return names


def write_queries(path: Path, count: int, names: list[str]) -> None:
    rng = random.Random(1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        for number in range(count):
            writer.writerow([f"the {rng.choice(THINGS)} number {number} {rng.choice(PLACES)}", rng.choice(names)])


def answered(output: Path) -> int:
    """Queries that a run has answered so far."""
    try:
        return json.loads((output / "unfinished/progress.json").read_text())["done"]
    except (OSError, ValueError):
        return 0


def resident(pid: int) -> float:
    """MiB of a process in memory; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, IndexError):
        return 0


def run(command: list, output: Path, stop_at: int | None = None) -> dict[int, float]:
    """Queries answered -> MiB of the resident set; ends by itself, or killed once so many are answered."""
    process = subprocess.Popen([*map(str, command), "--output_dir", str(output)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    memory = {}
    while process.poll() is None:
        done = answered(output)
        memory[done] = resident(process.pid) or memory.get(done, 0)
        if stop_at is not None and done >= stop_at:
            process.kill()
        time.sleep(0.05)
    errors = process.communicate()[1].decode()
    if process.returncode and stop_at is None:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{errors[-2000:]}")
    return memory


def digest(output: Path, output_format: str) -> list[str]:
    paths = [output / f"rankings.{output_format}", output / "metrics.json"]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def lines_of(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    with path.open("rb") as file:
        return sum(1 for _ in file)


def measure(folder: Path, count: int, output_format: str, kills: int) -> dict:
    model, pictures, queries = folder / "model", folder / "pictures", folder / "queries.csv"
    command = [
        sys.executable, ROOT / "run_retrieval.py", "--model_name_or_path", model, "--image_dir", pictures, "--queries",
        queries, "--device", "cpu", "--output_format", output_format, "--contact_sheet_queries", 5,
    ]  # fmt: skip
    whole, killed = folder / f"whole-{output_format}", folder / f"killed-{output_format}"
    memory = run(command, whole)
    for kill in range(1, kills + 1):
        run(command, killed, stop_at=kill * count // (kills + 1))
        print(f"killed after {answered(killed):,} queries", flush=True)
    run(command, killed)
    known = [done for done in memory if done and memory[done]]
    start, middle, end = (min(known, key=lambda done: abs(done - wanted)) for wanted in (0, count / 2, count))
    return {
        "format": output_format, "queries": count, "start_mib": round(memory[start]), "middle_mib": round(memory[middle]),
        "end_mib": round(memory[end]), "kills": kills,
        "lines": lines_of(killed / f"rankings.{output_format}"),
        "same_bytes": digest(whole, output_format) == digest(killed, output_format),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--formats", nargs="+", default=["jsonl"], choices=["jsonl", "parquet", "tsv"])
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"))
        write_queries(Path(folder, "queries.csv"), args.queries, draw_pictures(Path(folder, "pictures")))
        for output_format in args.formats:
            rows.append(measure(Path(folder), args.queries, output_format, args.kills) | versions)
            print(rows[-1], flush=True)
    path = args.results_dir / f"million_queries-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    main()
