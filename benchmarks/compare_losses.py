"""The five losses with the same budget: Hits@1/10 and MRR of held-out captions, several seeds, mean and spread.

    python benchmarks/compare_losses.py --corpus shape_scenes
    python benchmarks/compare_losses.py --corpus photos -- --dataset_name my_photos --text_model_name_or_path DIR

Each row is a real run of run_xmatching.py with the corpus's recipe, fewer epochs, another loss and another seed; the last
model is judged, not the best. The held-out captions are the same in every row. What follows `--` goes to every run. Rows
that a results file already holds are not run again, so a comparison that was stopped goes on.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from gradient_cache_memory import hardware

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"shape_scenes": ROOT / "recipes/quickstart/xmatching.yaml", "photos": ROOT / "recipes/photos/xmatching.yaml"}
EPOCHS = {"shape_scenes": 8, "photos": 60}
LOSSES = {  # each with the settings of its paper
    "paired_hinge": ["--loss_margin", "0.5"],
    "hinge": ["--loss_margin", "0.2"],
    "hardest_hinge": ["--loss_margin", "0.2"],
    "info_nce": [],
    "sigmoid": ["--logit_scale_init", "10", "--logit_bias_init", "-10"],
}
FIGURES = ("hits@1", "hits@10", "mrr")
COLUMNS = ("corpus", "loss", "seed", *FIGURES, "gallery_size", "epochs", "seconds", "hardware", "torch", "transformers")


def train_and_evaluate(command: list, folder: Path, threads: int, name: str) -> tuple[dict, float]:
    """(what a training script's run measured, seconds of training). Args: folder, its --output_dir."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
    metrics = json.loads((folder / "eval_results.json").read_text())
    return metrics, json.loads((folder / "train_results.json").read_text())["train_runtime"]


def run_once(corpus: str, loss: str, seed: int, epochs: int, extra: list[str], threads: int) -> dict:
    """Trains and evaluates one model in a fresh process; a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / "run_xmatching.py", RECIPES[corpus], "--loss_type", loss, *LOSSES[loss],
            "--num_train_epochs", epochs, "--seed", seed, "--eval_strategy", "no", "--save_strategy", "no",
            "--load_best_model_at_end", "false", "--compare_with_baselines", "false", "--disable_tqdm", "true",
            "--output_dir", f"{folder}/run", *extra,
        ]  # fmt: skip
        metrics, seconds = train_and_evaluate(command, Path(folder, "run"), threads, f"{loss}, seed {seed}")
    row = {"corpus": corpus, "loss": loss, "seed": seed, "epochs": epochs, "seconds": round(seconds, 1)}
    row |= {name: round(metrics[f"eval_{name}"], 4) for name in FIGURES} | {
        "gallery_size": metrics["eval_gallery_size"]
    }
    return row | {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}


def markdown(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds, a line a loss."""
    lines = ["| loss | Hits@1 | Hits@10 | MRR |", "|---|---|---|---|"]
    for loss in LOSSES:
        own = [row for row in rows if row["loss"] == loss]
        if own:
            values = [[float(row[name]) for row in own] for name in FIGURES]
            cells = (f"{mean(v):.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for v in values)
            lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=RECIPES, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="by default 8 of shape_scenes, 60 of photos")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, the cores shared among them")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv[:split])
    if args.corpus == "photos" and "--dataset_name" not in argv[split:]:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    epochs, threads = args.epochs or EPOCHS[args.corpus], max(1, (os.cpu_count() or 1) // args.jobs)
    path = args.results_dir / f"losses-{args.corpus}-{hardware()}.csv"
    rows = read(path)
    known = {(row["loss"], int(row["seed"]), int(row["epochs"])) for row in rows}
    todo = [(loss, seed) for seed in args.seeds for loss in LOSSES if (loss, seed, epochs) not in known]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_once, args.corpus, *item, epochs, argv[split + 1 :], threads) for item in todo]
        for job in jobs:
            rows.append(job.result())
            print({name: rows[-1][name] for name in ("loss", "seed", *FIGURES)}, flush=True)
            write(path, COLUMNS, sorted(rows, key=lambda row: (list(LOSSES).index(row["loss"]), int(row["seed"]))))
    print(f"\n{markdown(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
