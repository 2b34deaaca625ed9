"""Pictures added without training: Hits@k on the trained pictures and on 100 that no model has seen.

    python benchmarks/new_pictures.py --corpus shape_scenes
    python benchmarks/new_pictures.py --corpus photos -- --dataset_name my_photos --text_model_name_or_path DIR

The new pictures are chosen by hash. XMatchingModel, then CodebookT5 with rq identifiers made from its vectors, learn the
others, all captions but one each; then all are the gallery and one more caption of each picture is asked. New pictures
get their codes from their pixels, or, for comparison, from their other captions. What follows `--` goes to the training of
XMatchingModel; its --dataset_name is the corpus. The folder given as --work_dir keeps the two models.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from imagedex.corpora import load_corpus, split_corpus  # noqa: E402

RECIPES = {"shape_scenes": "quickstart", "photos": "photos"}
GROUPS = ("seen", "new")
FIGURES = ("hits@1", "hits@5", "hits@10", "mrr")


def order(image_id: str) -> str:
    return hashlib.sha256(f"new{image_id}".encode()).hexdigest()


def write_corpus(folder: Path, rows) -> None:
    """Rows of the schema as a folder in Flickr8k's layout."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.txt", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for row in rows:
            name = f"{Path(row['image_id']).stem}.png"
            row["image"].convert("RGB").save(folder / "images" / name)
            writer.writerows([name, caption] for caption in row["captions"])


def write_corpora(work: Path, name: str, new: int) -> None:
    """`first` without the new pictures, `all` with them, and `queries.csv`, a held-out caption of each."""
    rows = load_corpus(name).splits["train"]
    by_hash = sorted(range(len(rows)), key=lambda row: order(rows[row]["image_id"]))
    write_corpus(work / "first", rows.select(sorted(by_hash[new:])))
    write_corpus(work / "all", rows)
    asked = split_corpus(load_corpus(str(work / "all")), held_out_captions_per_image=1).evaluation
    with open(work / "queries.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        writer.writerows([caption, row["image_id"]] for row in asked for caption in row["captions"])


def run(command: list, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed")


def train(script: str, recipe: Path, work: Path, epochs: int | None, options: list, threads: int) -> None:
    """Trains `work / recipe's name` on the first pictures, unless that was done before."""
    output = work / recipe.stem
    if (output / "eval_results.json").exists():
        return
    command = [
        ROOT / script,
        recipe,
        "--dataset_name",
        work / "first",
        "--output_dir",
        output,
        "--disable_tqdm",
        "true",
    ]
    command += ["--save_strategy", "no", "--eval_strategy", "no", *options]
    run(command + (["--num_train_epochs", epochs] if epochs else []), threads)


def answer(work: Path, source: str, num_beams: int, threads: int) -> dict:
    """The metrics over all pictures, the codes of the new ones from `source`."""
    output = work / f"with_{source}"
    command = [ROOT / "run_retrieval.py", "--model_name_or_path", work / "codebook_t5", "--add_new_images"]
    command += ["--identifier_vectors_from", work / "xmatching", "--queries", work / "queries.csv"]
    command += ["--dataset_name", work / "all", "--num_beams", num_beams, "--output_dir", output]
    if source == "captions":
        command += ["--new_image_vectors", "captions", "--held_out_captions_per_image", 1]
    run(command, threads)
    return json.loads((output / "metrics.json").read_text())


def markdown(found: dict[str, dict]) -> str:
    lines = [
        "| codes of the new pictures from | group | queries | Hits@1 | Hits@5 | Hits@10 | MRR |",
        "|---|---|---|---|---|---|---|",
    ]
    for source, metrics in found.items():
        for group in GROUPS:
            cells = " | ".join(f"{metrics[group][name]:.3f}" for name in FIGURES)
            lines.append(f"| {source} | {group} | {metrics[group]['queries']} | {cells} |")
    return "\n".join(lines)


def main():
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=RECIPES, required=True)
    parser.add_argument("--new", type=int, default=100, help="pictures that are added without training")
    parser.add_argument("--xmatching_epochs", type=int, help="by default the recipe's")
    parser.add_argument("--epochs", type=int, help="of CodebookT5; by default the recipe's")
    parser.add_argument("--num_beams", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/new_pictures"))
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if args.corpus == "photos" and "--dataset_name" not in extra:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    name = args.corpus
    if "--dataset_name" in extra:
        place = extra.index("--dataset_name")
        _, name = extra[place : place + 2]
        del extra[place : place + 2]
    work, recipes = args.work_dir, ROOT / "recipes" / RECIPES[args.corpus]

    write_corpora(work, name, args.new)
    options = ["--load_best_model_at_end", "false", *extra]
    train("run_xmatching.py", recipes / "xmatching.yaml", work, args.xmatching_epochs, options, args.threads)
    options = ["--identifier_scheme", "rq", "--identifier_vectors_from", work / "xmatching"]
    train("run_dsi.py", recipes / "codebook_t5.yaml", work, args.epochs, options, args.threads)
    found = {source: answer(work, source, args.num_beams, args.threads) for source in ("pixels", "captions")}
    for model in ("xmatching", "codebook_t5"):
        results = json.loads((work / model / "eval_results.json").read_text())
        print(model, {figure: round(results[f"eval_{figure}"], 4) for figure in FIGURES})
    print(f"\n{markdown(found)}")


if __name__ == "__main__":
    main()
