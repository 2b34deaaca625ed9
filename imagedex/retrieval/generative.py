"""Models that write identifiers, asked for pictures."""

import logging
from collections.abc import Sequence

import torch

from imagedex.encoding.store import weights_fingerprint
from imagedex.encoding.vectors import UNKNOWN, count_unknown
from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking, short_float
from imagedex.identifiers.generative_model import GenerativeModel
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_list
from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.retrieval.retriever import Retriever, tokenizer_settings

logger = logging.getLogger(__name__)

BEAMS_AT_ONCE = 1024  # decoder rows of one batch


class GenerativeRetriever(Retriever):
    """A generative model over the pictures that have identifiers.

    Args:
        parts: the model and its tokenizer.
        identifiers: those that can be written, `parts.identifiers` or some of them or more.
        num_beams: of the search; no more pictures than that are found, and a right picture that is not among them has no rank.
        batch_size: queries at once, fewer where there are many beams.
    """

    queries_at_once = 256  # slower than vectors: a run that is killed loses no more than seconds

    def __init__(
        self,
        name: str,
        parts: GenerativeModel,
        identifiers: Identifiers | None = None,
        num_beams: int = 10,
        batch_size: int = 64,
    ):
        self.identifiers = parts.identifiers if identifiers is None else identifiers
        super().__init__(name, self.identifiers.image_ids)
        self.parts, self.num_beams = parts, num_beams
        self.batch_size = max(1, min(batch_size, BEAMS_AT_ONCE // num_beams))
        self.asked = self.cut = self.unknown = 0

    def fingerprint(self) -> str:
        own, parts = self.identifiers, self.parts
        sequences = torch.from_numpy(own.tokens), torch.from_numpy(own.offsets)
        settings = tokenizer_settings(parts.processor), own.image_ids, sequences, own.eos_token_id, self.num_beams
        return weights_fingerprint(parts.model, *settings)

    def remarks(self) -> list[str]:
        limit = self.parts.processor.max_text_length
        cut = [f"{self.cut} of {self.asked} sentences are longer than {limit} tokens and were cut"] if self.cut else []
        return cut + ([UNKNOWN % (self.unknown, self.asked)] if self.unknown else [])

    def written(self, queries: Sequence[str]) -> list[dict]:
        """One {"input_ids", "attention_mask"} a query; those that are cut are counted."""
        tokens, cut = self.parts.processor.tokens(queries)
        self.asked, self.cut = self.asked + len(queries), self.cut + sum(cut)
        self.unknown += count_unknown(self.parts.processor.tokenizer, tokens["input_ids"])
        pairs = zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]

    def candidates(self, queries: Sequence[str]) -> list[Ranking]:
        """Everything that each query's beams found, best first; scores are log-probabilities in nats. Raises `UserError`: the
        model's weights are NaN."""
        model, processor = self.parts.model, self.parts.processor
        rows = self.written(queries)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
        rankings: list[Ranking] = [Ranking(query, [], []) for query in queries]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = processor.tokenizer.pad([rows[row] for row in batch], return_tensors="pt").to(model.device)
            try:
                scores, found = rank_identifiers(model, self.identifiers, dict(inputs), self.num_beams)
            except FloatingPointError as error:
                raise UserError(f"{self.name}: {error}") from error
            for row, own_scores, own_rows in zip(batch, scores.tolist(), found.tolist(), strict=True):
                images = [self.image_ids[place] for place in own_rows if place >= 0]
                rankings[row].images = images
                rankings[row].scores = [short_float(score) for score in own_scores[: len(images)]]
        return rankings

    def search(self, queries: Sequence[str], k: int, targets: Sequence[Sequence[str]] | None = None) -> list[Ranking]:
        return judged(self.candidates(queries), k, targets)


def judged(rankings: list[Ranking], k: int, targets: Sequence[Sequence[str]] | None) -> list[Ranking]:
    """Ranks from the whole lists, which are then cut to the k best."""
    for place, ranking in enumerate(rankings):
        if targets is not None:
            ranking.targets = list(targets[place])
            ranking.rank = rank_from_list(ranking.images, ranking.targets, ranking.scores)
        ranking.images, ranking.scores = ranking.images[:k], ranking.scores[:k]
    return rankings
