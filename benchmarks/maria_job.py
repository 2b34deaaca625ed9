r"""Maria's job at its size: pictures from 500,000 for a million dialogues, in constant memory, killed and continued.

    python benchmarks/maria_job.py                                          # her size: long
    python benchmarks/maria_job.py --dialogues 20000 --pictures 20000       # to try it

Neither Open Images nor the Reddit corpus is needed. Dialogues are drawn, three turns and a response on a line, separated by tabs
as hers are. Pictures are links to a few tiny files, listed and checked like any others; their vectors are made (random, unit
length) and lie in the index of the search, as vectors of pictures do that were encoded before. A small XMatchingModel with random
weights (BERT of 1 layer x 16) reads the sentences. All else is the command of docs/maria.md: five pictures a line, as .tsv.

One run goes through; another is killed (SIGKILL) and continued by the same command. The memory of the process (its resident
set) is read after the first block of queries, half way and at the last; both files of rankings must be the same bytes.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from million_queries import PLACES, THINGS, answered, draw_pictures, lines_of, run, save_model

COLUMNS = ("turns", "dialogues", "queries", "pictures", "projection_dim", "seconds", "queries_a_second", "start_mib",
           "middle_mib", "end_mib", "kills", "lines", "same_bytes", "hardware", "torch", "transformers")  # fmt: skip
LINKS = 1000  # pictures in a folder; a file takes some ten thousand links


def write_dialogues(path: Path, count: int) -> None:
    rng = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [f"the {rng.choice(THINGS)} number {number} {rng.choice(PLACES)}" for _ in range(3)]
            file.write("\t".join([*turns, "so it is"]) + "\n")


def link_pictures(folder: Path, count: int, drawn: Path) -> None:
    files = [drawn / name for name in draw_pictures(drawn)]
    for number in range(count):
        if number % LINKS == 0:
            below = folder / f"{number // LINKS:04d}"
            below.mkdir(parents=True)
        os.link(files[number % len(files)], below / f"{number:07d}.png")


def prepare(output: Path, command: list[str]) -> None:
    """The output folder as a search leaves it that was stopped when all pictures were encoded, with made vectors."""
    import numpy as np

    from imagedex import command_line, run_retrieval
    from imagedex.encoding.dual_encoder import load_dual_encoder
    from imagedex.encoding.index import open_index
    from imagedex.encoding.store import ROWS_PER_SHARD, picture_keys
    from imagedex.retrieval import answering
    from imagedex.retrieval.gallery import read_gallery

    args, generative = command_line.parse_arguments(
        run_retrieval.ARGUMENTS, "", [*command, "--output_dir", str(output)]
    )
    output.mkdir()
    (output / answering.RECORD).write_text(json.dumps(answering.recorded(args, generative)))
    encoder = load_dual_encoder(args.model_name_or_path[0], False, "cpu")
    store = open_index(output / "index", encoder.model, encoder.image_processor, encoder.bank)
    keys, rng = picture_keys(read_gallery(args.image_dir)), np.random.default_rng(0)
    for start in range(0, len(keys), ROWS_PER_SHARD):
        part = keys[start : start + ROWS_PER_SHARD]
        vectors = rng.standard_normal((len(part), encoder.model.config.projection_dim), dtype=np.float32)
        store.write(part, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def measure(folder: Path, args) -> dict:
    queries, pictures, model = folder / "train.txt", folder / "pictures", folder / "model"
    save_model(model, args.projection_dim)
    write_dialogues(queries, args.dialogues)
    link_pictures(pictures, args.pictures, folder / "drawn")
    words = [
        "--model_name_or_path", model, "--image_dir", pictures, "--queries", queries, "--turns", args.turns,
        "--last_turn_is_response", "true", "--top_k", 5, "--output_format", "tsv", "--contact_sheet_queries", 0,
        "--device", "cpu",
    ]  # fmt: skip
    words = [str(word) for word in words]
    whole, killed = folder / "whole", folder / "killed"
    prepare(whole, words)
    shutil.copytree(whole, killed)
    print(f"{args.pictures:,} pictures are listed, checked and have vectors", flush=True)
    command, count = (
        [sys.executable, ROOT / "run_retrieval.py", *words],
        args.dialogues * (3 if args.turns == "each" else 1),
    )
    started = time.perf_counter()
    memory = run(command, whole)
    seconds = time.perf_counter() - started
    print(f"{count:,} queries in {seconds:.0f} s", flush=True)
    for kill in range(1, args.kills + 1):
        run(command, killed, stop_at=kill * count // (args.kills + 1))
        print(f"killed after {answered(killed):,} queries", flush=True)
    run(command, killed)
    known = [done for done in memory if done and memory[done]]
    start, middle, end = (round(memory[min(known, key=lambda done: abs(done - at))]) for at in (0, count / 2, count))
    rankings = [output / "rankings.tsv" for output in (whole, killed)]
    same = len({hashlib.sha256(path.read_bytes()).hexdigest() for path in rankings}) == 1
    return {
        "turns": args.turns, "dialogues": args.dialogues, "queries": count, "pictures": args.pictures,
        "projection_dim": args.projection_dim, "seconds": round(seconds), "queries_a_second": round(count / seconds),
        "start_mib": start, "middle_mib": middle, "end_mib": end, "kills": args.kills, "lines": lines_of(rankings[1]),
        "same_bytes": same,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=500_000)
    parser.add_argument("--projection_dim", type=int, default=32)
    parser.add_argument("--turns", default="context", choices=("last", "each", "context"))
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/hub"  # what is kept of the checked pictures goes with them
        row = measure(Path(folder), args)
    row |= {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    print(row)
    path = args.results_dir / f"maria_job-{hardware()}.csv"
    write(path, COLUMNS, [row])
    print(path)


if __name__ == "__main__":
    main()
