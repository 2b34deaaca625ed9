r"""The engines of a gallery on made vectors: times, and the share of the true ten that each finds.

    python benchmarks/engines.py --size 20000 --engines exact faiss milvus --whole   # the same ranking; two minutes
    python benchmarks/engines.py --size 50000                                        # two minutes
    python benchmarks/engines.py --size 1000000                                      # a million

Vectors are clustered (around as many middles as the root of their number, at a cosine of about 0.7) or random, which is the worst
case: there are no clusters to be found. Questions are sentences, drawn at a cosine of 0.3 from a picture in the directions in
which pictures differ, and pictures, at a cosine of 0.8. Each engine answers them one at a time without a filter, under filters
that 10 % and 1 % of the pictures pass, and again after a tenth of the pictures has left and as many others have come; what is
right says exact search.

An engine decides as it does in a gallery, where few pictures are always searched exactly. With `--whole` its index answers all,
and visits all of its cells: then rankings have to be the same.
"""

import argparse
import importlib.metadata
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from compare_losses import ROOT, write
from gradient_cache_memory import hardware

sys.path.insert(0, str(ROOT))

from imagedex.encoding.store import ROWS_PER_SHARD, Store  # noqa: E402
from imagedex.gallery import exact  # noqa: E402
from imagedex.gallery.engines.index import Pictures  # noqa: E402
from imagedex.gallery.engines.searcher import Searcher  # noqa: E402

COLUMNS = ("vectors", "size", "dimensions", "engine", "when", "asked", "filter", "recall_at_10", "same_rankings",
           "ms_a_question", "made_s", "changed_s", "opened_s", "disk_mb", "cells", "visited", "hardware", "torch")  # fmt: skip
K = 10
SHARES = (1.0, 0.1, 0.01)


def made(kind: str, count: int, size: int, rng: np.random.Generator, middles: np.ndarray) -> np.ndarray:
    """(count, size) float32 of length 1."""
    vectors = rng.standard_normal((count, size), np.float32)
    if kind == "clustered":
        vectors += middles[rng.integers(0, len(middles), count)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(folder: Path, kind: str, count: int, size: int) -> tuple[Store, np.ndarray]:
    """A store of made vectors, and their keys."""
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((int(count**0.5), size), np.float32)
    keys, store = rng.integers(0, 256, (count, 16), dtype=np.uint8), Store(folder, {"model": kind})
    for at in range(0, count, ROWS_PER_SHARD):
        part = keys[at : at + ROWS_PER_SHARD]
        store.write(part, vectors=made(kind, len(part), size, rng, middles))
    store.reload()
    return store, keys


def pictures_of(store: Store, keys: np.ndarray) -> Pictures:
    return Pictures(keys, store.rows(keys), [key.tobytes().hex() for key in keys], None, store.fingerprint)


def questions(pictures: Pictures, cosine: float, count: int) -> np.ndarray:
    """(count, D): at this cosine from a picture, otherwise a mixture of others with random signs."""
    rng = np.random.default_rng(5)
    near = pictures.rows.array("vectors", rng.choice(len(pictures), count))
    rest = np.stack(
        [rng.choice([-1, 1], 64) @ pictures.rows.array("vectors", rng.choice(len(pictures), 64)) for _ in range(count)]
    )
    rest -= (rest * near).sum(1, keepdims=True) * near
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    return (cosine * near + (1 - cosine**2) ** 0.5 * rest).astype(np.float32)


def disk(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measured(engine: Searcher, pictures: Pictures, args, shared: dict) -> list[dict]:
    """One row for each kind of question and each filter."""
    rows = []
    for asked, cosine in (("sentences", 0.3), ("pictures", 0.8)):
        queries = questions(pictures, cosine, args.questions)
        for share in SHARES:
            allowed = None if share == 1 else np.random.default_rng(9).random(len(pictures)) < share
            engine.search(queries[:1], pictures, K, allowed)
            started = time.perf_counter()
            found = [engine.search(query[None], pictures, K, allowed)[0] for query in queries]
            seconds = time.perf_counter() - started
            true = exact.search(queries, pictures.rows, pictures.names, K, allowed)
            pairs = [({row for row, _ in a}, {row for row, _ in b}) for a, b in zip(found, true, strict=True)]
            rows.append(shared | {
                "asked": asked, "filter": share, "ms_a_question": round(1000 * seconds / len(queries), 2),
                "recall_at_10": round(float(np.mean([len(a & b) / len(b) for a, b in pairs])), 4),
                "same_rankings": sum(a == b for a, b in zip(found, true, strict=True)) / len(queries),
            })  # fmt: skip
            print(*(f"{rows[-1][name]}" for name in COLUMNS[3:10]), sep="\t", flush=True)
    return rows


def run(kind: str, name: str, store: Store, keys: np.ndarray, folder: Path, args) -> list[dict]:
    """An engine's index made, asked, changed and asked again."""
    first, rng = pictures_of(store, keys[: args.size]), np.random.default_rng(4)
    engine, started = Searcher(folder / name, name), time.perf_counter()
    (folder / name).mkdir()
    index = engine.follow(first)
    seen = {"made_s": round(time.perf_counter() - started, 2), "disk_mb": round(disk(folder / name), 1)}
    if name == "faiss":
        seen |= {"cells": index.index.nlist, "visited": int(index.visited[4])}
        if args.whole:
            index.visited[:] = index.index.nlist
    shared = {"vectors": kind, "size": args.size, "dimensions": args.dimensions, "engine": name}
    rows = measured(engine, first, args, shared | {"when": "made"} | seen)
    stay = np.sort(rng.permutation(args.size)[: args.size - args.size // 10])
    second = pictures_of(store, np.concatenate([keys[stay], keys[args.size :]]))
    started = time.perf_counter()
    engine.follow(second)
    changed = {"changed_s": round(time.perf_counter() - started, 2), "disk_mb": round(disk(folder / name), 1)}
    if name == "faiss":
        started = time.perf_counter()
        engine = Searcher(folder / name, name)
        engine.follow(second)
        changed["opened_s"] = round(time.perf_counter() - started, 2)
    return rows + measured(engine, second, args, shared | {"when": "a tenth exchanged"} | changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000, help="pictures")
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--vectors", nargs="+", choices=("clustered", "random"), default=["clustered", "random"])
    parser.add_argument("--engines", nargs="+", choices=("exact", "faiss", "milvus"), default=["exact", "faiss"])
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--whole", action="store_true", help="indexes answer all, and visit all of their cells")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.whole:
        from imagedex.gallery.engines import milvus
        from imagedex.gallery.engines.index import Index

        Index.few, milvus.VISITED = 0, milvus.CELLS
    rows = []
    about = {"hardware": hardware(), "torch": importlib.metadata.version("torch")}
    for kind in args.vectors:
        with tempfile.TemporaryDirectory() as folder:
            store, keys = fill(Path(folder) / "vectors", kind, args.size + args.size // 10, args.dimensions)
            for name in args.engines:
                rows += [row | about for row in run(kind, name, store, keys, Path(folder), args)]
    name = f"engines-{args.size}{'-whole' if args.whole else ''}-{hardware()}.csv"
    write(args.output / name, COLUMNS, rows)


if __name__ == "__main__":
    main()
