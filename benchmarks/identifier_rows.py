"""Where identifier rows start beside pretrained words: held-out captions found, with the same few epochs.

    python benchmarks/identifier_rows.py --t5 T5 -- --dataset_name my_photos

Each row is a real run of run_dsi.py from the pretrained T5 with atomic identifiers whose rows start in one of the ways of
--identifier_rows, learning the captions of all pictures or of the first hundred (ten times the epochs), and of the other schemes;
the schemes whose tokens stand at every place for something else learn ten times the epochs, too, with --long (an hour each).
T5 alone reads captions; `--model_type` with its flags, after `--`, takes another model. VisionGroundedT5 learns the pictures
first, in step 1 of its recipe; the figures are of step 2. Rows that a results file already holds are not run again.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

from compare_losses import read, train_and_evaluate, write
from gradient_cache_memory import hardware

ROOT = Path(__file__).resolve().parents[1]
BASE = ("hits@1", "hits@10", "mrr")
FIGURES = (*BASE, "start_hits@1", "start_hits@10")
COLUMNS = ("model", "trained", "scheme", "rows", *FIGURES, "epochs", "seconds", "hardware", "torch", "transformers")
# scheme, start of the rows, pictures trained (None: all), times the epochs
RUNS = [
    ("atomic", rows, size, times) for size, times in ((100, 10), (None, 1)) for rows in ("mean", "random", "sentences")
]
RUNS += [(scheme, "sentences", None, 1) for scheme in ("rq", "semantic", "naive")]
LONG_RUNS = [(scheme, "sentences", None, 10) for scheme in ("semantic", "naive")]

TRAINING = (
    sys.executable, ROOT / "run_dsi.py", "--held_out_captions_per_image", 1, "--caption_prompt", "", "--do_train", "true",
    "--do_eval", "true", "--learning_rate", 3e-4, "--warmup_steps", 0.05, "--per_device_train_batch_size", 64,
    "--per_device_eval_batch_size", 64, "--save_strategy", "no", "--eval_on_start", "true", "--disable_tqdm", "true",
)  # fmt: skip
STEP_1 = (
    sys.executable, ROOT / "run_image_indexing.py", ROOT / "recipes/photos/vision_grounded_t5_indexing_pretrained.yaml",
)  # fmt: skip
PARTS = ("--model_type", "--vision_model_name_or_path", "--vision_projection")  # which the model of step 1 has


def without(flags: list[str], *names: str) -> list[str]:
    """The flags, each with one value, less those of these names."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in names for part in pair]


def run_once(t5: str, scheme: str, rows: str, size: int | None, epochs: int, extra: list[str], threads: int) -> dict:
    """Trains in a fresh process and evaluates before the first step and after the last; a row of the table."""
    model = extra[extra.index("--model_type") + 1] if "--model_type" in extra else "t5"
    start = ["--text_model_name_or_path", t5, "--identifier_scheme", scheme, "--identifier_rows", rows]
    start += [] if "--model_type" in extra else ["--model_type", "t5"]
    sizes = ["--max_train_samples", size, "--max_eval_samples", size] if size else []
    name = f"{model}, {scheme}, {rows}, {size or 'all'}"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        if model == "vision_grounded_t5":
            first = Path(folder, "first")
            command = [*STEP_1, *sizes, *start, *without(extra, "--indexing_ratio"), "--output_dir", first]
            train_and_evaluate(command, first, threads, f"{name}, step 1")
            start, extra = ["--model_name_or_path", first], without(extra, *PARTS)
        whole = [*TRAINING, *sizes, *start, "--num_train_epochs", epochs, *extra, "--output_dir", output]
        metrics, seconds = train_and_evaluate(whole, output, threads, name)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    start = next(entry for entry in history if "eval_hits@1" in entry)
    found = {
        f"{name}{figure}": round(own[f"eval_{figure}"], 4)
        for name, own in (("start_", start), ("", metrics))
        for figure in BASE
    }
    row = {"model": model, "trained": size or "all", "scheme": scheme, "rows": rows, "epochs": epochs}
    row |= {name: found[name] for name in FIGURES} | {"seconds": round(seconds, 1), "hardware": hardware()}
    return row | {name: importlib.metadata.version(name) for name in COLUMNS[-2:]}


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | pictures trained | epochs | scheme | rows start | before: Hits@1 | Hits@10 | after: Hits@1 | Hits@10 |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [f"{float(row[name]):.3f}" for name in ("start_hits@1", "start_hits@10", "hits@1", "hits@10")]
        names = [str(row[name]) for name in ("model", "trained", "epochs", "scheme", "rows")]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join(lines)


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t5", required=True, help="a pretrained T5, as benchmarks/pretrain_t5.py makes one")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--long", action="store_true", help="also semantic and naive identifiers with ten times the epochs"
    )
    parser.add_argument("--schemes", nargs="+", default=["atomic", "rq", "semantic", "naive"], help="default: all four")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if "--dataset_name" not in extra:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    path = args.results_dir / f"identifier_rows-{hardware()}.csv"
    rows = read(path)
    kind = extra[extra.index("--model_type") + 1] if "--model_type" in extra else "t5"
    runs = RUNS + (LONG_RUNS if args.long else [])
    for scheme, start, size, times in (run for run in runs if run[0] in args.schemes):
        epochs = args.epochs * times
        known = [(row["model"], row["scheme"], row["rows"], str(row["trained"]), int(row["epochs"])) for row in rows]
        if (kind, scheme, start, str(size or "all"), epochs) not in known:
            rows.append(run_once(args.t5, scheme, start, size, epochs, extra, args.threads))
            print({name: rows[-1][name] for name in ("trained", "scheme", "rows", *FIGURES)}, flush=True)
            write(path, COLUMNS, rows)
    print(f"\n{markdown(rows)}\n\n{path}")


if __name__ == "__main__":
    main()
