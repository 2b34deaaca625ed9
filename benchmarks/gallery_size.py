"""What a question costs as the gallery grows, from 1,000 to 1,000,000 pictures: time and memory, on one plot.

    pip install faiss-cpu usearch
    python benchmarks/gallery_size.py                                      # up to a million
    python benchmarks/gallery_size.py --sizes 1000 10000 --repeats 3       # a minute, to try it

Vectors are clustered ones of 384 numbers, searched as in `benchmarks/exact_search.py`. The generative model is a T5 with random
weights (t5-small's width, 2 + 2 layers) that writes identifiers with 10 beams: `atomic`, a token and a row of weights a picture;
`rq`, four codes of 64 and a suffix. One question at a time, the median of the repeats. Memory is that of what is searched: the
vectors, codes or index; of a generative model the weights and the identifiers.
"""

import argparse
import importlib.metadata
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from compare_losses import ROOT, write
from exact_search import ENGINES, draw, seconds
from gradient_cache_memory import hardware

sys.path.insert(0, str(ROOT))

from transformers import T5Config, T5ForConditionalGeneration  # noqa: E402

from imagedex.modeling.constrained_decoding import rank_identifiers  # noqa: E402
from imagedex.modeling.identifiers import Identifiers  # noqa: E402

COLUMNS = ("engine", "pictures", "made_s", "ms", "ms_low", "ms_high", "mib", "hardware", "threads", "torch", "transformers",
           "faiss-cpu")  # fmt: skip
VECTOR_ENGINES = ("torch_float32", "imagedex_int8", "faiss_ivf")
SCHEMES = ("atomic", "rq")
GRAPH = "faiss_graph"  # last: it is built row by row, which takes long
WORDS, LEVELS, CODES, SUFFIX, END = 32_100, 4, 64, 256, 1
TOKENS, BEAMS = 16, 10


def written(scheme: str, pictures: int) -> tuple[list[list[int]], int]:
    """A sequence a picture, all different, and how many tokens the vocabulary has with them."""
    if scheme == "atomic":
        return [[WORDS + number] for number in range(pictures)], WORDS + pictures
    codes = np.random.default_rng(0).integers(0, CODES, (pictures, LEVELS))
    codes = codes[np.lexsort(codes.T[::-1])]
    new = np.r_[True, (np.diff(codes, axis=0) != 0).any(1)]
    first = np.flatnonzero(new)
    suffix = np.arange(pictures) - np.repeat(first, np.diff(np.r_[first, pictures]))
    starts = WORDS + CODES * np.arange(LEVELS)
    rows = np.c_[codes + starts, suffix + WORDS + CODES * LEVELS]
    return rows.tolist(), WORDS + CODES * LEVELS + max(SUFFIX, int(suffix.max()) + 1)


def generative(scheme: str, pictures: int):
    """search(question's number), and the bytes that it needs."""
    sequences, vocabulary = written(scheme, pictures)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0, eos_token_id=END
    )
    model = T5ForConditionalGeneration(config).eval()
    identifiers = Identifiers.from_sequences(scheme, [str(row) for row in range(pictures)], sequences, END)
    words = torch.randint(2, WORDS, (64, TOKENS), generator=torch.Generator().manual_seed(1))

    def search(number: int):
        asked = words[number % len(words)][None]
        inputs = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
        return rank_identifiers(model, identifiers, inputs, num_beams=min(BEAMS, pictures))

    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return search, weights + identifiers.tokens.nbytes + identifiers.offsets.nbytes


def vectors_of(name: str, pictures: int):
    vectors, queries = draw("clustered", pictures, 64, 384)
    search, held = ENGINES[name](vectors)
    return (lambda number: search(queries[number % 64][None])), held


def measure(engine: str, pictures: int, repeats: int) -> dict:
    make = generative if engine in SCHEMES else vectors_of
    made, (search, held) = seconds(lambda: make(engine, pictures))
    with torch.inference_mode():
        times = [1000 * seconds(lambda number=number: search(number))[0] for number in range(repeats + 1)][1:]
    found = {"ms": statistics.median(times), "ms_low": min(times), "ms_high": max(times), "mib": held / 2**20}
    return {"engine": engine, "pictures": pictures, "made_s": round(made, 2)} | {
        name: round(value, 2) for name, value in found.items()
    }


def draw_plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "imagedex"  # the same drawing is the same file
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9.6, 4.2))
    for axes, column, what in zip(both, ("ms", "mib"), ("ms a question", "MiB searched"), strict=True):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            own = [(row["pictures"], row[column]) for row in rows if row["engine"] == engine]
            axes.plot(
                *zip(*own, strict=True), "--" if engine in SCHEMES else "-", marker="o", markersize=4, label=engine
            )
        axes.set(xscale="log", yscale="log", xlabel="pictures", ylabel=what)
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--engines", nargs="+", default=[*VECTOR_ENGINES, *SCHEMES, GRAPH], choices=[*ENGINES, *SCHEMES]
    )
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    versions = {"hardware": hardware(), "threads": torch.get_num_threads()}
    versions |= {name: importlib.metadata.version(name) for name in COLUMNS[-3:]}
    rows, path = [], args.results_dir / f"gallery_size-{hardware()}.csv"
    for engine in args.engines:
        for pictures in args.sizes:
            rows.append(measure(engine, pictures, args.repeats) | versions)
            print(rows[-1], flush=True)
            write(path, COLUMNS, rows)  # after each: the last of them take long
            draw_plot(rows, path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
