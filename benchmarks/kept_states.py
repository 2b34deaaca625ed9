r"""Epochs from kept states against epochs that read every picture anew: seconds, their ratio, and the same model at the end.

    python benchmarks/kept_states.py -- --dataset_name my_photos \
        --text_model_name_or_path DIR --vision_model_name_or_path DIR --max_train_samples 100

Each side is a real run of the recipe photos/xmatching_pretrained with heads from a random start, in a fresh process, with few and
with more epochs; the difference is what an epoch costs from the second one on. What follows `--` goes to every run.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path
from statistics import median

import safetensors.torch
from compare_losses import ROOT, train_and_evaluate, write
from gradient_cache_memory import hardware

EPOCHS = {"read anew": (1, 2), "kept": (2, 42)}
COLUMNS = ("side", "seconds_an_epoch", "ratio", "largest_difference", "hardware", "torch", "transformers")


def run(side: str, epochs: int, folder: Path, extra: list[str]) -> tuple[float, dict]:
    """(seconds of training, the heads) of one run."""
    output = folder / f"{side.replace(' ', '_')}-{epochs}"
    command = [
        sys.executable, ROOT / "run_xmatching.py", ROOT / "recipes/photos/xmatching_pretrained.yaml", "--head_start", "none",
        "--keep_states", str(side == "kept").lower(), "--keep_dir", folder / "kept", "--num_train_epochs", epochs,
        "--held_out_captions_per_image", 1, "--lr_scheduler_type", "constant", "--learning_rate", "1e-3",
        "--eval_strategy", "no", "--save_strategy", "no", "--compare_with_baselines", "false", "--disable_tqdm", "true",
        "--per_device_train_batch_size", 50, "--output_dir", output, *extra,
    ]  # fmt: skip
    _, seconds = train_and_evaluate(command, output, 2, f"{side}, {epochs} epochs")
    weights = safetensors.torch.load_file(output / "model.safetensors")
    return seconds, {name: value for name, value in weights.items() if "_head." in name}


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if "--dataset_name" not in extra:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    epochs, difference = {side: [] for side in EPOCHS}, 0.0
    for _ in range(args.repeat):
        for side, (few, more) in EPOCHS.items():
            with tempfile.TemporaryDirectory() as folder:
                (short, _), (long, heads) = (run(side, count, Path(folder), extra) for count in (few, more))
                epochs[side].append((long - short) / (more - few))
                print(f"{side}: {epochs[side][-1]:.3f} s an epoch", flush=True)
                if side == "read anew":  # two epochs, as many as the short run from kept states
                    anew = heads
                else:
                    _, kept = run(side, few, Path(folder) / "again", extra)
                    difference = max(difference, *((kept[name] - anew[name]).abs().max().item() for name in anew))
    seconds = {side: median(values) for side, values in epochs.items()}
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    ratio = seconds["read anew"] / seconds["kept"]
    rows = [
        {"side": side, "seconds_an_epoch": round(value, 4), "ratio": "", **versions} for side, value in seconds.items()
    ]
    rows[-1] |= {"ratio": round(ratio), "largest_difference": f"{difference:.1e}"}
    path = args.results_dir / f"kept_states-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(f"{ratio:.0f} times; the heads differ by at most {difference:.1e}\n{path}")


if __name__ == "__main__":
    main()
