"""Reranking against cosines that are known by hand."""

import math

import pytest
import torch

from imagedex.evaluation.rankings import Ranking
from imagedex.retrieval.generative import GenerativeRetriever
from imagedex.retrieval.rerank import RerankedRetriever
from imagedex.retrieval.retriever import VectorRetriever

PICTURES = ["north.jpg", "east.jpg", "north-east.jpg", "south.jpg", "east copy.jpg"]
DIRECTIONS = [[0, 1], [1, 0], [0.6, 0.8], [0, -1], [1, 0]]


class Beams(GenerativeRetriever):
    """Finds what it is told to find."""

    def __init__(self, found):
        self.name, self.image_ids, self.found = "beams", PICTURES, found

    def candidates(self, queries):
        return [
            Ranking(query, list(images), [-float(place) for place in range(len(images))])
            for query, images in zip(queries, self.found, strict=True)
        ]


class Compass(VectorRetriever):
    """Knows two sentences."""

    def __init__(self, bias=None):
        self.name, self.image_ids, self.vectors = "compass", PICTURES, torch.tensor(DIRECTIONS)
        self.bias = bias

    def encode(self, queries):
        return torch.tensor([{"go north": [0.0, 1.0], "go east": [1.0, 0.0]}[query] for query in queries])


def test_what_the_beams_found_comes_in_the_order_of_its_cosines():
    found = [
        ["south.jpg", "east.jpg", "north-east.jpg", "north.jpg"],
        ["north.jpg", "east copy.jpg", "south.jpg", "east.jpg"],
        [],
    ]
    retriever = RerankedRetriever(Beams(found), Compass())
    assert retriever.name == "beams reranked by compass" and retriever.image_ids == PICTURES
    targets = [("north-east.jpg",), ("east.jpg",), ("east.jpg",)]
    first, second, third = retriever.search(["go north", "go east", "go east"], 3, targets)
    assert first.images == ["north.jpg", "north-east.jpg", "east.jpg"]
    assert first.scores == pytest.approx([1, 0.8, 0]) and first.rank == 2
    # two copies tie: the better beam is shown first, and the tie counts against the right one
    assert second.images == ["east copy.jpg", "east.jpg", "north.jpg"]
    assert second.scores == pytest.approx([1, 1, 0]) and second.rank == 2
    assert third.images == [] and third.rank == math.inf


def test_the_right_picture_counts_when_it_is_beyond_k_and_not_when_no_beam_found_it():
    beams = [["south.jpg", "north.jpg", "east.jpg"]] * 2
    first, second = RerankedRetriever(Beams(beams), Compass()).search(
        ["go north"] * 2, 1, [("south.jpg",), ("north-east.jpg",)]
    )
    assert first.images == second.images == ["north.jpg"]
    assert first.rank == 3 and second.rank == math.inf


def test_a_hub_goes_down_here_too():
    beams = [["north.jpg", "north-east.jpg", "east.jpg"]]
    bias = torch.zeros(len(PICTURES))
    bias[PICTURES.index("north.jpg")] = 0.5  # near to every sentence
    (plain,) = RerankedRetriever(Beams(beams), Compass()).search(["go north"], 3)
    (ranking,) = RerankedRetriever(Beams(beams), Compass(bias)).search(["go north"], 3)
    assert plain.images[0] == "north.jpg" and plain.cosines is None
    assert ranking.images == ["north-east.jpg", "north.jpg", "east.jpg"]
    assert ranking.scores[1] == 0.5 and ranking.cosines[1] == 1.0
