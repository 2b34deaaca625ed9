"""The four identifier schemes with the same budget: Hits@1/10 and MRR of held-out captions, and how many pictures are memorised.

    python benchmarks/compare_identifiers.py -- --dataset_name my_photos

Each row is a real run of run_dsi.py with recipes/photos/codebook_t5.yaml, another scheme and fewer epochs; the last model is
judged. The vectors of semantic and rq come from the training captions. What follows `--` goes to every run. Rows that a
results file already holds are not run again, so a comparison that was stopped goes on.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

from compare_losses import read, train_and_evaluate, write
from gradient_cache_memory import hardware

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/photos/codebook_t5.yaml"
SCHEMES = ("atomic", "naive", "semantic", "rq")
FIGURES = ("hits@1", "hits@10", "mrr", "memorised")
COLUMNS = (
    "scheme", "seed", *FIGURES, "gallery_size", "ms_per_query", "epochs", "seconds", "hardware", "torch", "transformers",
)  # fmt: skip


def run_once(scheme: str, seed: int, epochs: int, extra: list[str], threads: int) -> dict:
    """Trains and evaluates one model in a fresh process; a row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, ROOT / "run_dsi.py", RECIPE, "--identifier_scheme", scheme, "--num_train_epochs", epochs,
            "--seed", seed, "--eval_strategy", "no", "--save_strategy", "no", "--compare_with_baselines", "false",
            "--disable_tqdm", "true", "--output_dir", f"{folder}/run", *extra,
        ]  # fmt: skip
        metrics, seconds = train_and_evaluate(command, Path(folder, "run"), threads, f"{scheme}, seed {seed}")
    row = {"scheme": scheme, "seed": seed, "epochs": epochs, "seconds": round(seconds, 1)}
    row |= {name: round(metrics[f"eval_{name}"], 4) for name in (*FIGURES, "ms_per_query")}
    row |= {"gallery_size": metrics["eval_gallery_size"], "hardware": hardware()}
    return row | {name: importlib.metadata.version(name) for name in COLUMNS[-2:]}


def markdown(rows: list[dict]) -> str:
    lines = ["| scheme | Hits@1 | Hits@10 | MRR | memorised |", "|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['scheme']} | {' | '.join(f'{float(row[name]):.3f}' for name in FIGURES)} |")
    return "\n".join(lines)


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=10, help="a quarter of the recipe's")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv[:split])
    if "--dataset_name" not in argv[split:]:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    path = args.results_dir / f"identifiers-{hardware()}.csv"
    rows = read(path)
    known = {(row["scheme"], int(row["seed"]), int(row["epochs"])) for row in rows}
    for seed in args.seeds:
        for scheme in args.schemes:
            if (scheme, seed, args.epochs) in known:
                continue
            rows.append(run_once(scheme, seed, args.epochs, argv[split + 1 :], args.threads))
            print({name: rows[-1][name] for name in ("scheme", "seed", *FIGURES)}, flush=True)
            write(path, COLUMNS, sorted(rows, key=lambda row: (SCHEMES.index(row["scheme"]), int(row["seed"]))))
    print(f"\n{markdown(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
