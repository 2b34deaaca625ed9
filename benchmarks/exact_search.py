"""Exact search by int8 codes beside what one would take instead, on the same vectors and in the same run.

    pip install faiss-cpu usearch
    python benchmarks/exact_search.py                                      # a million
    python benchmarks/exact_search.py --rows 50000 --repeats 3             # to try it

Two kinds of vectors of 384 numbers: at random on the sphere, and clustered ones, uneven in their directions and around a common
mean, as sentence encoders give them. Every repeat asks each engine in turn; each time is compared with that of torch's float32
product with topk in the same repeat: the medians, lowest and highest of the ratios. Recall is of the 10 best by float64 products.
usearch's graph takes most of the time. `--without` says which engines to leave out, by default FAISS's graph and usearch's exact
search, which takes twenty seconds for 1,000 queries in 50,000 rows.
"""

import argparse
import importlib.metadata
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from compare_losses import ROOT, write
from gradient_cache_memory import hardware

sys.path.insert(0, str(ROOT))

from imagedex.evaluation.best_rows import Rows, best_rows  # noqa: E402
from imagedex.evaluation.int8_codes import Int8Codes, fast_products  # noqa: E402

K = 10
QUERIES_AT_ONCE, ROWS_AT_ONCE = 256, 2**16
COLUMNS = ("vectors", "rows", "queries", "engine", "made_s", "mib", "ms", "ms_low", "ms_high", "ratio", "ratio_low",
           "ratio_high", "recall@10", "int8_instructions", "hardware", "threads", "torch", "faiss-cpu", "usearch")  # fmt: skip


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def draw(kind: str, rows: int, queries: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, size), (queries, size) unit vectors."""
    rng = np.random.default_rng(0)

    def normal(count: int) -> np.ndarray:
        return rng.standard_normal((count, size), np.float32)

    if kind == "random":
        return unit(normal(rows)), unit(normal(queries))
    spread = (np.arange(1, size + 1) ** -0.5).astype(np.float32)  # a power law, as spectra of embeddings have
    turn = np.linalg.qr(normal(size))[0]
    centers, common = normal(rows // 50 + 1) * spread, normal(1)
    common *= 0.7 * np.linalg.norm(spread) / np.linalg.norm(common)

    def around(count: int, noise: float) -> np.ndarray:
        own = centers[rng.integers(0, len(centers), count)]
        return unit((own + noise * normal(count) * spread + common) @ turn)

    return around(rows, 0.7), around(queries, 1.0)


def torch_float32(vectors: np.ndarray):
    held = torch.from_numpy(vectors)

    def search(queries: np.ndarray) -> np.ndarray:
        found = []
        for part in torch.from_numpy(queries).split(QUERIES_AT_ONCE):
            best, rows = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
            for start in range(0, len(held), ROWS_AT_ONCE):
                top = (part @ held[start : start + ROWS_AT_ONCE].T).topk(K, dim=1)
                best, rows = torch.cat([best, top.values], 1), torch.cat([rows, top.indices + start], 1)
            found.append(rows.gather(1, best.topk(K, dim=1).indices))
        return torch.cat(found).numpy()

    return search, vectors.nbytes


def imagedex(vectors: np.ndarray, coded: bool):
    rows = Rows.of(vectors, longest=1.001)
    codes = Int8Codes(rows.read, len(rows)) if coded else None

    def search(queries: np.ndarray) -> np.ndarray:
        return np.array([[row for row, _ in own] for own in best_rows(queries, rows, K, codes=codes)])

    if not coded:
        return search, vectors.nbytes
    return search, codes.codes.nbytes + (codes.rest.nbytes if codes.rest is not None else 0)


def faiss_engine(vectors: np.ndarray, kind: str):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    size = vectors.shape[1]
    if kind == "flat":
        index, more = faiss.IndexFlatIP(size), 0
    elif kind == "graph":
        index = faiss.IndexHNSWFlat(size, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch, more = 64, len(vectors) * 64 * 4
    else:
        lists = max(1, min(4096, int(4 * len(vectors) ** 0.5), len(vectors) // 39))  # faiss asks for 39 rows a list
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[: 64 * lists]])
        index.nprobe, more = max(1, lists // 64), lists * size * 4 + len(vectors) * 8
    index.add(vectors)
    return (lambda queries: index.search(queries, K)[1]), vectors.nbytes + more


def usearch_engine(vectors: np.ndarray, exact: bool):
    from usearch.index import Index, search

    threads = torch.get_num_threads()
    if exact:
        return (
            lambda queries: search(vectors, queries, K, "ip", exact=True, threads=threads).keys.reshape(-1, K)
        ), vectors.nbytes
    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32")
    index.add(np.arange(len(vectors)), vectors, threads=threads)
    return (lambda queries: index.search(queries, K, threads=threads).keys.reshape(-1, K)), index.memory_usage


ENGINES = {
    "torch_float32": torch_float32,
    "imagedex_float32": lambda vectors: imagedex(vectors, False),
    "imagedex_int8": lambda vectors: imagedex(vectors, True),
    "faiss_flat": lambda vectors: faiss_engine(vectors, "flat"),
    "faiss_ivf": lambda vectors: faiss_engine(vectors, "ivf"),
    "faiss_graph": lambda vectors: faiss_engine(vectors, "graph"),
    "usearch_exact": lambda vectors: usearch_engine(vectors, True),
    "usearch_graph": lambda vectors: usearch_engine(vectors, False),
}


def true_best(vectors: np.ndarray, queries: np.ndarray) -> list[set[int]]:
    wide, best = torch.from_numpy(queries).double(), []
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        top = (wide @ torch.from_numpy(vectors[start : start + ROWS_AT_ONCE]).double().T).topk(
            min(K, len(vectors) - start)
        )
        best.append((top.values, top.indices + start))
    values, rows = (torch.cat(part, 1) for part in zip(*best, strict=True))
    return [set(own) for own in rows.gather(1, values.topk(K, dim=1).indices).tolist()]


def seconds(call) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(kind: str, args, names: list[str]) -> list[dict]:
    vectors, queries = draw(kind, args.rows, max(args.queries), args.dimension)
    right = true_best(vectors, queries)
    engines = {}
    for name in names:
        made, (search, held) = seconds(lambda name=name: ENGINES[name](vectors))
        engines[name] = search, made, held
        print(f"{kind}: {name} made in {made:.1f} s", flush=True)
    rows = []
    for count in args.queries:
        times, recall = {name: [] for name in names}, {}
        for repeat in range(args.repeats + 1):  # the first warms up
            asked = queries[:count] if count > 1 else queries[repeat : repeat + 1]
            for name, (search, *_) in engines.items():
                took, found = seconds(lambda search=search, asked=asked: search(asked))
                own = right[:count] if count > 1 else right[repeat : repeat + 1]
                hits = [len(best & set(row)) / K for best, row in zip(own, found.tolist(), strict=True)]
                recall.setdefault(name, []).append(statistics.mean(hits))
                if repeat:
                    times[name].append(took)
        for name, (_, made, held) in engines.items():
            ratios = [base / own for base, own in zip(times["torch_float32"], times[name], strict=True)]
            rows.append(
                {"vectors": kind, "rows": args.rows, "queries": count, "engine": name, "made_s": round(made, 2)}
                | {"mib": round(held / 2**20, 1), "recall@10": round(statistics.mean(recall[name]), 4)}
                | dict(zip(("ms", "ms_low", "ms_high"), spread([1000 * own for own in times[name]]), strict=True))
                | dict(zip(("ratio", "ratio_low", "ratio_high"), spread(ratios), strict=True))
            )
            print({name: value for name, value in rows[-1].items()}, flush=True)
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    return tuple(round(value, 2) for value in (statistics.median(values), min(values), max(values)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--vectors", nargs="+", default=["clustered", "random"], choices=["clustered", "random"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--without", nargs="*", default=["faiss_graph", "usearch_exact"], choices=list(ENGINES)[1:])
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    names = [name for name in ENGINES if name not in args.without]
    versions = {name: importlib.metadata.version(name) for name in COLUMNS[-3:]}
    versions |= {"int8_instructions": fast_products(), "hardware": hardware(), "threads": torch.get_num_threads()}
    rows = [row | versions for kind in args.vectors for row in measure(kind, args, names)]
    path = args.results_dir / f"exact_search-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    main()
