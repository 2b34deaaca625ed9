"""What run_retrieval.py asks of a model: sentences in, rankings out. Each kind of model brings its own `Retriever`."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from imagedex.encoding.store import bytes_of, weights_fingerprint
from imagedex.encoding.vectors import UNKNOWN, count_unknown, encode_texts
from imagedex.evaluation import int8_codes
from imagedex.evaluation.best_rows import Rows, best_rows, error_bound
from imagedex.evaluation.exact import ranks_by_blocks, similarity, top_k, with_bias
from imagedex.evaluation.rankings import Ranking, short_float
from imagedex.modeling.processing_retrieval import SentenceProcessor

QUICKER_FROM = 4096  # vectors; among fewer, float64 products of all are as quick
VECTORS_A_FOUND = 400  # and so they are where more than one in so many is to be found


class Retriever(ABC):
    """A model over one gallery.

    Attributes:
        name: the model as the user named it, for headings.
        image_ids: the gallery.
        queries_at_once: how many are asked in one call of `search` where there are very many.
    """

    queries_at_once = 1024

    def __init__(self, name: str, image_ids: Sequence[str]):
        self.name = name
        self.image_ids = list(image_ids)

    @abstractmethod
    def fingerprint(self) -> str:
        """Of model and gallery: what has another one gives other answers."""

    def remarks(self) -> list[str]:
        """What is to be said once of all queries that were asked."""
        return []

    @abstractmethod
    def search(self, queries: Sequence[str], k: int, targets: Sequence[Sequence[str]] | None = None) -> list[Ranking]:
        """The k best pictures of each query (fewer when the gallery has fewer).

        Args:
            targets: of each query the right pictures' image_ids, all of them in the gallery. With them each ranking has the
                `rank` of the best of them:
                the place in the whole gallery where the model can tell it, else in the list it gave (`rank_from_list`).
        """


class VectorRetriever(Retriever):
    """A dual encoder and the unit vectors of the gallery; exact search by cosine, less each picture's bias where there is one.

    Args:
        model, tokenizer: see `encode_texts`.
        vectors: (N, D) float32 unit vectors, in the order of `image_ids`.
        bias: (N,) float32, see `CaptionBank`; None: scores are cosines.
        device: where the texts are encoded and the vectors are searched.
        text_kwargs: for the tokenizer call, see `encode_texts`.
    """

    def __init__(
        self,
        name: str,
        image_ids: Sequence[str],
        vectors: torch.Tensor,
        model,
        tokenizer,
        bias: torch.Tensor | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 256,
        text_kwargs: dict | None = None,
    ):
        super().__init__(name, image_ids)
        if len(vectors) != len(self.image_ids):
            raise ValueError(f"{len(vectors)} vectors for {len(self.image_ids)} pictures")
        self.model, self.tokenizer = model, tokenizer
        self.device, self.batch_size, self.text_kwargs = torch.device(device), batch_size, text_kwargs
        # scores are computed in float64, which Apple's GPUs do not have
        self.vectors = vectors.to("cpu" if self.device.type == "mps" else self.device)
        self.bias = None if bias is None else bias.to(self.vectors.device)
        self.asked = self.unknown = 0

    def remarks(self) -> list[str]:
        return [UNKNOWN % (self.unknown, self.asked)] if self.unknown else []

    def encode(self, queries: Sequence[str]) -> torch.Tensor:
        """(Q, D) float32 unit vectors, on the device of the gallery's."""
        tokenizer, written = self.tokenizer, list(queries)
        if isinstance(tokenizer, SentenceProcessor):
            tokenizer, written = tokenizer.tokenizer, [tokenizer.written(sentence) for sentence in queries]
        self.asked += len(written)
        self.unknown += count_unknown(tokenizer, tokenizer(written, verbose=False)["input_ids"])
        options = {"batch_size": self.batch_size, "device": self.device, "text_kwargs": self.text_kwargs}
        return encode_texts(self.model, self.tokenizer, queries, **options).to(self.vectors.device)

    def fingerprint(self) -> str:
        words = tokenizer_settings(self.tokenizer), self.text_kwargs
        digest = hashlib.blake2b(weights_fingerprint(self.model, *words, self.image_ids).encode(), digest_size=16)
        for tensor in (self.vectors, self.bias):
            digest.update(b"" if tensor is None else bytes_of(tensor))
        return digest.hexdigest()

    def search(self, queries: Sequence[str], k: int, targets: Sequence[Sequence[str]] | None = None) -> list[Ranking]:
        plain = self.encode(queries)
        scores, rows = self._quick_top_k(plain, k) or top_k(*with_bias(plain, self.vectors, self.bias), k)
        rankings = [
            Ranking(query, [self.image_ids[row] for row in found], [short_float(score) for score in own])
            for query, found, own in zip(queries, rows.tolist(), scores.tolist(), strict=True)
        ]
        if self.bias is not None:
            for ranking, vector, found in zip(rankings, plain, rows, strict=True):
                cosines = similarity(vector[None], self.vectors[found.to(vector.device)])[0]
                ranking.cosines = [short_float(cosine) for cosine in cosines.tolist()]
        if targets is not None:
            self.judge(rankings, targets, *with_bias(plain, self.vectors, self.bias), "rank")
            if self.bias is not None:
                self.judge(rankings, targets, plain, self.vectors, "cosine_rank")
        return rankings

    def _quick_top_k(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `top_k` gives, sooner; None where it would not be."""
        least = max(QUICKER_FROM, k * VECTORS_A_FOUND)
        if self.vectors.device.type != "cpu" or len(self.vectors) < least or not self.are_numbers:
            return None  # and `top_k` says what is no number
        pay = int8_codes.pay(len(self.vectors), self.asked) and self.codes.of_use
        found = best_rows(queries.numpy(), self.rows, k, codes=self.codes if pay else None, rounded=True)
        scores, rows = ([[pair[at] for pair in own] for own in found] for at in (1, 0))
        return torch.tensor(scores, dtype=torch.float32), torch.tensor(rows, dtype=torch.int64)

    @cached_property
    def rows(self) -> Rows:
        longest = float(self.vectors.norm(dim=1).max()) * (1 + error_bound(self.vectors.shape[1]))
        return Rows.of(self.vectors.numpy(), bias=None if self.bias is None else self.bias.numpy(), longest=longest)

    @cached_property
    def are_numbers(self) -> bool:
        return bool(np.isfinite(self.rows.longest)) and (self.bias is None or not bool(self.bias.isnan().any()))

    @cached_property
    def codes(self) -> int8_codes.Int8Codes:
        return int8_codes.Int8Codes(self.rows.read, len(self.rows), self.rows.bias)

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    def judge(self, rankings: Sequence[Ranking], targets: Sequence[Sequence[str]], asked, searched, field: str) -> None:
        """Sets each ranking's right pictures, and the best one's rank in the whole gallery under the given name."""
        rows = [[self.row_of[target] for target in own] for own in targets]
        for ranking, own, rank in zip(rankings, targets, ranks_by_blocks(asked, searched, rows).tolist(), strict=True):
            ranking.targets = list(own)
            setattr(ranking, field, rank)


def tokenizer_settings(processor) -> list:
    """What decides how a sentence is read, as JSON values: of a tokenizer, or of a processor that has one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    style = {name: getattr(processor, name, None) for name in ("prompt", "clean_text", "max_text_length", "padding")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [style, str(tokenizer)]
    return [
        style,
        json.loads(backend.to_str()) | {"truncation": None, "padding": None},
    ]  # these two change with each call
