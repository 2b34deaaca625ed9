"""A dual encoder's search by quick products against float64 products of all."""

import pytest
import torch

from imagedex.evaluation import best_rows, int8_codes
from imagedex.retrieval import retriever as retriever_module
from imagedex.retrieval.retriever import VectorRetriever


class Encoded(VectorRetriever):
    """Queries are rows of a table, by their number."""

    def encode(self, queries):
        self.asked += len(queries)
        return self.model[[int(query) for query in queries]]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_the_rankings_are_the_same_to_the_last_digit(monkeypatch, biased, k):
    generator = torch.Generator().manual_seed(0)
    vectors, asked = torch.randn(300, 40, generator=generator), torch.randn(20, 40, generator=generator)
    vectors, asked = (torch.nn.functional.normalize(part, dim=1) for part in (vectors, asked))
    vectors[100:200] = vectors[:100]  # pictures that are there twice
    bias = torch.rand(300, generator=generator) if biased else None
    if biased:
        bias[100:200] = bias[:100]
    monkeypatch.setattr(best_rows, "BLOCK_SCORES", 200)
    monkeypatch.setattr(int8_codes, "CODED_FROM", 1)
    monkeypatch.setattr(int8_codes, "ASKED", 20)
    monkeypatch.setattr(retriever_module, "VECTORS_A_FOUND", 0)
    if not int8_codes.fast_products():
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: out.copy_(a.int() @ b.int()))
    answers = []
    for least, fast in ((1, True), (1, False), (1000, False)):  # by codes, by float32 products, all in float64
        monkeypatch.setattr(retriever_module, "QUICKER_FROM", least)
        monkeypatch.setattr(int8_codes, "fast_products", lambda fast=fast: fast)
        retriever = Encoded("model", [f"{row}.jpg" for row in range(300)], vectors, asked, None, bias)
        answers.append(retriever.search([str(number) for number in range(20)], k, [["7.jpg"]] * 20))
        assert ("codes" in vars(retriever)) == fast
    assert answers[0] == answers[1] == answers[2]


def test_a_vector_that_is_no_number_is_said_with_codes_too(monkeypatch):
    monkeypatch.setattr(int8_codes, "CODED_FROM", 1)
    monkeypatch.setattr(int8_codes, "ASKED", 0)
    monkeypatch.setattr(retriever_module, "QUICKER_FROM", 1)
    monkeypatch.setattr(retriever_module, "VECTORS_A_FOUND", 1)
    monkeypatch.setattr(int8_codes, "fast_products", lambda: True)
    vectors = torch.nn.functional.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    names, none = [str(row) for row in range(200)], float("nan")
    bias = torch.zeros(200).index_fill(0, torch.tensor([3]), none)
    with pytest.raises(ValueError, match="NaN"):
        Encoded("model", names, vectors, torch.eye(8), None, bias).search(["0"], 3)
    vectors[3, 2] = none  # one alone is a stray among codes that are of use
    with pytest.raises(ValueError, match="NaN"):
        Encoded("model", names, vectors, torch.eye(8), None).search(["0"], 3)


def test_where_many_are_to_be_found_all_are_multiplied(monkeypatch):
    monkeypatch.setattr(retriever_module, "QUICKER_FROM", 1)
    searched = []
    quick = retriever_module.best_rows
    monkeypatch.setattr(
        retriever_module, "best_rows", lambda *args, **kwargs: searched.append(1) or quick(*args, **kwargs)
    )
    vectors = torch.nn.functional.normalize(torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    retriever = Encoded("model", [str(row) for row in range(2000)], vectors, torch.eye(8), None)
    few, many = (retriever.search(["0", "5"], k) for k in (5, 6))
    assert len(searched) == 1
    assert [ranking.images[:5] for ranking in many] == [ranking.images for ranking in few]
