"""What a generative model's beams found, put in the order of a dual encoder's cosines."""

from collections.abc import Sequence

import torch

from imagedex.evaluation.exact import similarity
from imagedex.evaluation.rankings import Ranking, short_float
from imagedex.retrieval.generative import GenerativeRetriever, judged
from imagedex.retrieval.retriever import Retriever, VectorRetriever


class RerankedRetriever(Retriever):
    """Two stages: beams of a generative model, then the cosine of each picture they found.

    Scores are those of the dual encoder: cosines, less a picture's bias where it has one. A right picture that the beams did
    not find has no rank.

    Args: vectors, over the same gallery or more.
    """

    def __init__(self, generative: GenerativeRetriever, vectors: VectorRetriever):
        super().__init__(f"{generative.name} reranked by {vectors.name}", generative.image_ids)
        self.generative, self.vectors = generative, vectors
        self.row_of = {image_id: row for row, image_id in enumerate(vectors.image_ids)}

    @property
    def queries_at_once(self) -> int:
        return self.generative.queries_at_once

    def fingerprint(self) -> str:
        return f"{self.generative.fingerprint()} {self.vectors.fingerprint()}"

    def remarks(self) -> list[str]:
        return [*self.generative.remarks(), *self.vectors.remarks()]

    def search(self, queries: Sequence[str], k: int, targets: Sequence[Sequence[str]] | None = None) -> list[Ranking]:
        rankings = self.generative.candidates(queries)
        asked = self.vectors.encode(queries)
        for ranking, vector in zip(rankings, asked, strict=True):
            rows = torch.tensor([self.row_of[image_id] for image_id in ranking.images], dtype=torch.int64)
            rows = rows.to(vector.device)
            cosines = similarity(vector[None], self.vectors.vectors[rows])[0]
            scores = cosines if self.vectors.bias is None else cosines - self.vectors.bias[rows]
            order = scores.argsort(descending=True, stable=True).tolist()  # of equal scores the better beam is first
            ranking.images = [ranking.images[place] for place in order]
            ranking.scores = [short_float(scores[place].item()) for place in order]
            if self.vectors.bias is not None:
                ranking.cosines = [short_float(cosines[place].item()) for place in order]
        return judged(rankings, k, targets)
