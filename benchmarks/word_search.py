"""Searches for words, without a model: what a generative model with `--t5_start lexical` starts from, beside BM25 and stemming.

    pip install snowballstemmer
    python benchmarks/word_search.py --dataset_name my_photos

The documents are the trained captions of each picture, joined; the queries are the captions held out, those that every
script here holds out with the same flags. Ties count against the search.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imagedex.corpora.arguments import CorpusArguments  # noqa: E402
from imagedex.corpora.indexed import load_indexed_splits  # noqa: E402
from imagedex.corpora.splits import gallery_rows  # noqa: E402
from imagedex.evaluation.baselines import BM25  # noqa: E402
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_scores, summarize_ranks  # noqa: E402
from imagedex.training.generative.starts.lexical_weights import lexical_factors  # noqa: E402
from imagedex.words import words  # noqa: E402

FIGURES = ("hits@1", "hits@5", "hits@10", "mrr")


def weighted_scores(texts: list[str], pairs: list[tuple[str, str]], queries: list[str]) -> np.ndarray:
    """(Q, N): the weights of `--t5_start lexical`, of whole words and in as many dimensions as they have."""
    documents = [words(text) for text in texts]
    known = [(words(sentence), words(rest)) for sentence, rest in pairs]
    spelling = {word: word for text in (*documents, *(sentence for sentence, _ in known)) for word in text}
    vectors, items = lexical_factors(documents, known, spelling, min(len(spelling), len(texts)))
    empty = np.zeros(items.shape[1])
    sums = [sum((vectors[word].numpy() for word in words(query) if word in vectors), empty) for query in queries]
    return np.stack(sums) @ items.numpy().T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="a folder of captioned photographs, or another corpus")
    parser.add_argument("--held_out_captions_per_image", type=int, default=1)
    parser.add_argument("--split_seed", type=int, default=CorpusArguments.split_seed)
    args = parser.parse_args()
    try:
        import snowballstemmer
    except ImportError:
        raise SystemExit("error: the stemmer is missing; pip install snowballstemmer") from None
    stem = snowballstemmer.stemmer("english").stemWords

    splits = load_indexed_splits(CorpusArguments(**vars(args)))
    rows = zip(splits.evaluation["image_id"], splits.evaluation["captions"], strict=True)
    asked = [(caption, image_id) for image_id, captions in rows for caption in captions]
    queries, targets = [caption for caption, _ in asked], gallery_rows(splits.gallery, [name for _, name in asked])
    texts = splits.item_texts()

    def bm25(read, epsilon):
        return BM25([read(text) for text in texts], epsilon=epsilon).scores([read(query) for query in queries])

    searches = {
        "BM25, idf of rank_bm25": bm25(words, 0.25),
        "BM25, idf of Lucene": bm25(words, None),
        "BM25, idf of Lucene, English stems": bm25(lambda text: stem(words(text)), None),
        "relevance weights, words written alike": weighted_scores(texts, splits.known_pairs(), queries),
    }
    print("| search | Hits@1 | Hits@5 | Hits@10 | MRR |\n|---|---|---|---|---|")
    for name, scores in searches.items():
        found = summarize_ranks(rank_from_scores(scores, targets))
        print(f"| {name} | {' | '.join(f'{found[figure]:.3f}' for figure in FIGURES)} |")


if __name__ == "__main__":
    main()
