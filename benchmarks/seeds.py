"""How much a figure depends on what was held out: one training for each split seed, mean and spread of every figure.

    python benchmarks/seeds.py recipes/quickstart/xmatching.yaml
    python benchmarks/seeds.py recipes/photos/xmatching.yaml --split_seeds 0 1 2 --work_dir runs/seeds/photos \
        -- --dataset_name my_photos --held_out_images 0.111

Each is a run of run_xmatching.py in a process of its own, into a folder of its own under --work_dir; what follows `--` goes
to all of them. A run that is finished is not trained again, and one that was stopped goes on. Models that the runs are
compared with have rows, too.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from statistics import mean, stdev

from compare_losses import ROOT, train_and_evaluate, write
from gradient_cache_memory import hardware

COLUMNS = ("figure", "mean", "standard_deviation", "min", "max", "split_seeds", "hardware", "torch", "transformers")
# how names end that are no figures of a model
NO_FIGURES = ("_low", "_high", "runtime", "_per_second", "queries", "gallery_size", "folds")


def figures_of(folder: Path) -> dict[str, float]:
    """What a run measured of its model, and under `name: figure` of what it was compared with."""
    figures = json.loads((folder / "eval_results.json").read_text())
    figures = {name.removeprefix("eval_"): value for name, value in figures.items() if name != "epoch"}
    if (folder / "baselines.json").exists():
        for name, row in json.loads((folder / "baselines.json").read_text()).items():
            figures |= {f"{name}: {figure}": value for figure, value in row.items()}
    return {name: float(value) for name, value in figures.items() if not name.endswith(NO_FIGURES)}


def run_once(recipe: str, split_seed: int, work: Path, extra: list[str], threads: int) -> dict[str, float]:
    """Trains and evaluates with one split, unless that was done before; what it measured."""
    folder = work / f"split_seed_{split_seed}"
    command = [sys.executable, ROOT / "run_xmatching.py", recipe, "--disable_tqdm", "true", *extra]
    command += ["--split_seed", split_seed, "--output_dir", folder]
    train_and_evaluate(command, folder, threads, f"split seed {split_seed}")
    return figures_of(folder)


def summary(runs: dict[int, dict[str, float]]) -> list[dict]:
    """A row a figure that every run has. Args: runs, split seed -> its figures."""
    rows, common = [], [name for name in next(iter(runs.values())) if all(name in own for own in runs.values())]
    for name in common:
        values = [own[name] for own in runs.values()]
        spread = stdev(values) if len(values) > 1 else 0.0
        numbers = {"mean": mean(values), "standard_deviation": spread, "min": min(values), "max": max(values)}
        rows.append({"figure": name} | {column: round(number, 4) for column, number in numbers.items()})
    return rows


def markdown(rows: list[dict]) -> str:
    lines = ["| figure | mean ± standard deviation | min to max |", "|---|---|---|"]
    for row in rows:
        spread = f"{row['mean']:.3f} ± {row['standard_deviation']:.3f}"
        lines.append(f"| {row['figure']} | {spread} | {row['min']:.3f} to {row['max']:.3f} |")
    return "\n".join(lines)


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="of run_xmatching.py")
    parser.add_argument("--split_seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/seeds"), help="keeps a folder for each run")
    parser.add_argument(
        "--output", type=Path, help="a CSV file for the table, such as benchmarks/results/seeds-NAME.csv"
    )
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]

    runs = {}
    for seed in args.split_seeds:
        runs[seed] = run_once(args.recipe, seed, args.work_dir, extra, args.threads)
        print(f"split seed {seed}: hits@1 {runs[seed]['hits@1']:.3f}, mrr {runs[seed]['mrr']:.3f}", flush=True)
    rows = summary(runs)
    print(f"\n{len(runs)} splits\n\n{markdown(rows)}")
    if args.output:
        made = {name: importlib.metadata.version(name) for name in COLUMNS[-2:]} | {"hardware": hardware()}
        made |= {"split_seeds": " ".join(map(str, runs))}
        write(args.output, COLUMNS, [row | made for row in rows])
        print(f"\n{args.output}")


if __name__ == "__main__":
    main()
