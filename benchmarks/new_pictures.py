"""Pictures added without training: Hits@k on the trained pictures and on 100 that no model has seen.

    python benchmarks/new_pictures.py --corpus shape_scenes
    python benchmarks/new_pictures.py --corpus photos -- --dataset_name my_photos --text_model_name_or_path DIR
    python benchmarks/new_pictures.py --corpus pretrained --identifier_scheme atomic --t5 T5 \
        -- --dataset_name my_photos --text_model_name_or_path MINILM --vision_model_name_or_path TOWER

The new pictures are chosen by hash. XMatchingModel, then CodebookT5, learn the others, all captions but one each; then all are
the gallery and one more caption of each picture is asked. New pictures get their identifiers from XMatchingModel's vectors of
their pixels, or, for comparison, of their other captions. Beside them: XMatchingModel itself in the same gallery, and what
CodebookT5 finds of the trained pictures before any is added. What follows `--` goes to the training of XMatchingModel; its
--dataset_name is the corpus. The folder given as --work_dir keeps the two models.
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

# the recipes of XMatchingModel and CodebookT5
RECIPES = {
    "shape_scenes": ("quickstart/xmatching.yaml", "quickstart/codebook_t5.yaml"),
    "photos": ("photos/xmatching.yaml", "photos/codebook_t5.yaml"),
    "pretrained": ("photos/xmatching_pretrained.yaml", "photos/codebook_t5_pretrained.yaml"),
}
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
    """`first` without the new pictures, `all` with them, and a held-out caption of each, in `seen.csv` and `new.csv`."""
    rows = load_corpus(name).splits["train"]
    by_hash = sorted(range(len(rows)), key=lambda row: order(rows[row]["image_id"]))
    write_corpus(work / "first", rows.select(sorted(by_hash[new:])))
    write_corpus(work / "all", rows)
    asked = split_corpus(load_corpus(str(work / "all")), held_out_captions_per_image=1).evaluation
    added = {f"{Path(rows[row]['image_id']).stem}.png" for row in by_hash[:new]}
    for group in GROUPS:
        with open(work / f"{group}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["caption", "image"])
            for row in asked:
                if (row["image_id"] in added) == (group == "new"):
                    writer.writerows([caption, row["image_id"]] for caption in row["captions"])


def run(command: list, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed")


def train(
    script: str, recipe: str, output: Path, corpus: Path, epochs: int | None, options: list, threads: int
) -> None:
    """Trains the recipe on the corpus into `output`, unless that was done before."""
    if (output / "eval_results.json").exists():
        return
    command = [ROOT / script, ROOT / "recipes" / recipe, "--dataset_name", corpus, "--output_dir", output]
    command += ["--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no"]
    command += ["--compare_with_baselines", "false", *options]
    run(command + (["--num_train_epochs", epochs] if epochs else []), threads)


def ask(work: Path, name: str, model: str, gallery: str, group: str, options: list, threads: int) -> dict:
    """The metrics of a model for the sentences of one group, over a gallery (`first` or `all`)."""
    output = work / f"{name}_{group}"
    command = [ROOT / "run_retrieval.py", "--model_name_or_path", work / model, "--queries", work / f"{group}.csv"]
    command += ["--dataset_name", work / gallery, "--output_dir", output, *options]
    run(command, threads)
    metrics = json.loads((output / "metrics.json").read_text())
    return metrics.get(group, metrics)


def answers(work: Path, num_beams: int, threads: int) -> dict[str, dict]:
    """Who answered -> group -> metrics."""
    beams = ["--num_beams", num_beams]
    found = {"CodebookT5 before": {"seen": ask(work, "before", "codebook_t5", "first", "seen", beams, threads)}}
    adding = [*beams, "--add_new_images", "--identifier_vectors_from", work / "xmatching"]
    by_captions = ["--new_image_vectors", "captions", "--held_out_captions_per_image", 1]
    for source, more in (("pixels", []), ("captions", by_captions)):
        options = ("codebook_t5", "all")
        found[f"CodebookT5, new ones from {source}"] = {
            group: ask(work, f"with_{source}", *options, group, adding + more, threads) for group in GROUPS
        }
    found["XMatchingModel"] = {
        group: ask(work, "xmatching", "xmatching", "all", group, [], threads) for group in GROUPS
    }
    return found


def markdown(found: dict[str, dict]) -> str:
    lines = ["| who answers | group | queries | Hits@1 | Hits@5 | Hits@10 | MRR |", "|---|---|---|---|---|---|---|"]
    for who, groups in found.items():
        for group, metrics in groups.items():
            cells = " | ".join(f"{metrics[name]:.3f}" for name in FIGURES)
            lines.append(f"| {who} | {group} | {metrics['queries']} | {cells} |")
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
    parser.add_argument("--identifier_scheme", choices=("rq", "semantic", "atomic"), default="rq")
    parser.add_argument("--t5", help="pretrained: the T5 that CodebookT5 starts from")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/new_pictures"))
    args, extra = parser.parse_args(argv[:split]), argv[split + 1 :]
    if args.corpus != "shape_scenes" and "--dataset_name" not in extra:
        parser.error("which photographs? End the command with: -- --dataset_name FOLDER")
    name = args.corpus
    if "--dataset_name" in extra:
        place = extra.index("--dataset_name")
        _, name = extra[place : place + 2]
        del extra[place : place + 2]
    work, (dual_encoder, generative) = args.work_dir, RECIPES[args.corpus]

    write_corpora(work, name, args.new)
    common = ["--load_best_model_at_end", "false"]
    options = work / "first", args.xmatching_epochs, common + extra, args.threads
    train("run_xmatching.py", dual_encoder, work / "xmatching", *options)
    common += ["--identifier_scheme", args.identifier_scheme]
    if args.identifier_scheme != "atomic":
        common += ["--identifier_vectors_from", work / "xmatching"]
    if args.t5:
        common += ["--text_model_name_or_path", args.t5]
    train("run_dsi.py", generative, work / "codebook_t5", work / "first", args.epochs, common, args.threads)
    print(f"\n{markdown(answers(work, args.num_beams, args.threads))}")


if __name__ == "__main__":
    main()
