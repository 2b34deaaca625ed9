"""What a trained model has to beat: what captions alone find, and a model that was not trained here.

BM25 over the captions of each picture joined, and the mean of each picture's caption vectors under a text encoder.
Neither sees a pixel. `baseline_rows` gives both rows for a set of queries, to be printed beside a model's figures;
`model_row` that of a dual encoder as it is, such as a CLIP.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from imagedex.checkpoints import is_empty_tokenizer, loading
from imagedex.encoding.dual_encoder import DualEncoder
from imagedex.encoding.vectors import encode_images, encode_texts
from imagedex.errors import UserError
from imagedex.evaluation.exact import BLOCK_SCORES, metrics_by_gallery, right_columns, similarity
from imagedex.evaluation.intervals import intervals
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_scores, summarize_ranks
from imagedex.words import words


class BM25:
    """Okapi BM25 over inverted lists.

    score(q, d) = sum over the query's words w, repeated words counted again, of
        idf(w) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |d| / mean |d|))
    with idf(w) = log((N - n + 0.5) / (n + 0.5)), n the documents that have w. Words in more than half of the documents
    would score below zero; they get `epsilon` times the mean idf instead, as in the rank_bm25 package. Robertson and
    Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; the floor: Trotman et al., 2014.

    Args:
        documents: one list of words a document. Documents without words score 0.
        epsilon: of the floor; None: no floor but Lucene's idf, log(1 + (N - n + 0.5) / (n + 0.5)), which stays above zero.
    """

    def __init__(
        self, documents: Iterable[Sequence[str]], k1: float = 1.5, b: float = 0.75, epsilon: float | None = 0.25
    ):
        counts = [Counter(document) for document in documents]
        self.num_documents = len(counts)
        lengths = np.array([count.total() for count in counts], dtype=np.float64)
        mean_length = lengths.mean() if lengths.any() else 1.0
        norms = k1 * (1 - b + b * lengths / mean_length)  # (N,)

        occurrences: dict[str, tuple[list[int], list[int]]] = {}
        for row, count in enumerate(counts):
            for word, frequency in count.items():
                rows, frequencies = occurrences.setdefault(word, ([], []))
                rows.append(row)
                frequencies.append(frequency)
        odds = {
            word: (self.num_documents - len(rows) + 0.5) / (len(rows) + 0.5) for word, (rows, _) in occurrences.items()
        }
        idf = {word: math.log(odd if epsilon is not None else 1 + odd) for word, odd in odds.items()}
        floor = epsilon * sum(idf.values()) / len(idf) if idf and epsilon is not None else 0.0
        # word -> documents that have it, and what it adds to the score of each
        self.postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, (rows, frequencies) in occurrences.items():
            rows, tf = np.array(rows), np.array(frequencies, dtype=np.float64)
            weight = idf[word] if idf[word] >= 0 else floor
            self.postings[word] = rows, weight * tf * (k1 + 1) / (tf + norms[rows])

    def scores(self, queries: Sequence[Sequence[str]]) -> np.ndarray:
        """(Q, N) float64 scores of queries given as words."""
        scores = np.zeros((len(queries), self.num_documents))
        for row, query in zip(scores, queries, strict=True):
            for word in query:
                if word in self.postings:
                    documents, added = self.postings[word]
                    row[documents] += added  # a document stands once in a list, so += loses nothing
        return scores


class TextEncoder:
    """A text encoder folder or Hub id: AutoModel, mean of the last states over the tokens that are not padding.

    Raises:
        UserError: the name cannot be loaded as a text encoder.
    """

    def __init__(self, name_or_path: str | Path):
        with loading(f"a text encoder from {name_or_path}"):
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(name_or_path, trust_remote_code=False)
        if is_empty_tokenizer(self.tokenizer):
            raise UserError(f"{name_or_path} brings no tokenizer; save it beside the model")
        kind = self.model.config.model_type
        # by what was built: the config of a T5 encoder saved alone denies its decoder, which AutoModel adds all the same
        if hasattr(self.model, "decoder") or getattr(self.model.config, "text_config", None) is not None:
            raise UserError(
                f"{name_or_path} is a {kind} model, not a text encoder alone; give a BERT, MiniLM, MPNet or the like"
            )

    def encode(
        self, sentences: Sequence[str], batch_size: int = 256, device=None, progress: bool = False
    ) -> torch.Tensor:
        """(Q, D) float32 unit vectors on the CPU."""
        return encode_texts(_MeanPooled(self.model).eval(), self.tokenizer, sentences, batch_size, device, progress)


class _MeanPooled(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_text_features(self, input_ids, attention_mask, token_type_ids=None):
        optional = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **optional
        ).last_hidden_state  # (B, T, D)
        weights = attention_mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def caption_vectors(encoder: TextEncoder, captions: Sequence[Sequence[str]], **options):
    """All captions' vectors (M, D), the row of each one's picture (M,), and their sum for each picture (N, D)."""
    owners = torch.tensor([row for row, own in enumerate(captions) for _ in own], dtype=torch.long)
    if len(owners):
        vectors = encoder.encode([caption for own in captions for caption in own], **options)
    else:
        vectors = torch.empty(0, encoder.model.config.hidden_size)
    return vectors, owners, torch.zeros(len(captions), vectors.shape[1]).index_add_(0, owners, vectors)


def mean_vectors(sums: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """(N, D) of length 1, of what `caption_vectors` gives; NaN where a picture has no caption."""
    without = torch.bincount(owners, minlength=len(sums)) == 0
    return torch.nn.functional.normalize(sums, dim=1).masked_fill(without[:, None], torch.nan)


def mean_caption_vectors(encoder: TextEncoder, captions: Sequence[Sequence[str]], **options) -> torch.Tensor:
    """(N, D) float32: each picture's caption vectors averaged and normalised; NaN where a picture has no caption."""
    _, owners, sums = caption_vectors(encoder, captions, **options)
    return mean_vectors(sums, owners)


def baseline_rows(
    train_captions: Mapping[str, Sequence[str]],
    queries: Sequence[tuple[str, str | Sequence[str]]],
    text_encoder: str | Path | None = None,
    *,
    gallery: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 256,
    device=None,
    progress: bool = False,
    block_scores: int = BLOCK_SCORES // 2,
) -> dict[str, dict[str, float]]:
    """Both baselines on the same captions and queries.

    Args:
        train_captions: image_id -> the captions that may be used; the queries must not be among them.
        queries: (sentence, image_id of the right picture, or of several, of which the best counts).
        text_encoder: folder or Hub id of a text encoder; without it there is only the BM25 row.
        gallery: the image_ids that can be found, default those of `train_captions`. A picture without captions scores 0
            with BM25 and -infinity with caption vectors.

    Returns:
        row name -> `hits@k`, `mrr`, their intervals, `median_rank`, `gallery_size`; names "BM25" and "caption vectors".

    Raises:
        ValueError: no queries, or a query whose picture is not in the gallery.
        UserError: the text encoder cannot be loaded.
    """
    image_ids = list(train_captions if gallery is None else gallery)
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    right = [(own,) if isinstance(own, str) else tuple(own) for _, own in queries]
    strangers = [image_id for own in right for image_id in own if image_id not in row_of]
    if strangers or not queries:
        raise ValueError(
            f"{len(strangers)} of {len(queries)} queries ask for pictures outside the gallery: {strangers[:3]}"
        )
    captions = [list(train_captions.get(image_id, ())) for image_id in image_ids]
    sentences = [sentence for sentence, _ in queries]
    targets = [tuple(row_of[image_id] for image_id in own) for own in right]

    def figures(blocks: Iterator[tuple[slice, np.ndarray]]) -> dict[str, float]:
        ranks = np.concatenate(
            [rank_from_scores(scores, right_columns(targets[rows], len(image_ids))) for rows, scores in blocks]
        )
        return summarize_ranks(ranks, ks=ks) | intervals((ranks, targets), ks=ks) | {"gallery_size": len(image_ids)}

    blocks = _slices(len(queries), max(1, block_scores // len(image_ids)))
    bm25 = BM25(words(" ".join(own)) for own in captions)
    asked = [words(sentence) for sentence in sentences]
    rows = {"BM25": figures((block, bm25.scores(asked[block])) for block in blocks)}
    if text_encoder is not None:
        encoder = TextEncoder(text_encoder)
        options = {"batch_size": batch_size, "device": device, "progress": progress}
        vectors = mean_caption_vectors(encoder, captions, **options)
        query_vectors = encoder.encode(sentences, **options)
        cosines = (similarity(query_vectors[block], vectors).nan_to_num(nan=-torch.inf).numpy() for block in blocks)
        rows["caption vectors"] = figures(zip(blocks, cosines, strict=True))
    return rows


def model_row(
    encoder: DualEncoder,
    sentences: Sequence[str],
    pictures,
    targets,
    galleries: Mapping[str, np.ndarray],
    *,
    batch_size: int = 64,
    device=None,
    num_workers: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Another dual encoder, as it is, on the same sentences: its figures as `metrics_by_gallery` gives them.

    Args: pictures, rows with `image_id` and `image`, each embedded once; targets and galleries, rows of them. Raises
    `UserError`, see `encode_images`.
    """
    model, options = encoder.model, {"device": device, "progress": progress}
    texts = encode_texts(model, encoder.tokenizer, sentences, text_kwargs=encoder.text_kwargs, **options)
    images = encode_images(model, encoder.image_processor, pictures, batch_size, num_workers=num_workers, **options)
    figures = {"both_directions": False, "with_intervals": True}
    figures["bias"] = None if encoder.bank is None else encoder.bank.bias(images)
    return metrics_by_gallery(texts, images, targets, galleries, **figures)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
