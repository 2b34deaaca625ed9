"""Vectors for identifiers: latent semantic analysis against dense arithmetic, and where vectors may come from."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.sparse import csr_matrix

from imagedex.corpora.indexed import IndexedSplits
from imagedex.errors import UserError
from imagedex.identifiers.vectors import (
    check_same_split,
    choose_source,
    latent_semantic_vectors,
    truncated_svd,
)

TEXTS = ["a red dog", "red red cats run", "the sea , blue sea", "blue waves at sea", "a dog runs", "!!"]


def dense_lsa(texts, dimensions):
    """The same in plain numpy: a dense matrix and the full decomposition."""
    split = [text.replace(",", " ").replace("!", " ").lower().split() for text in texts]
    vocabulary = sorted({word for words in split for word in words})
    matrix = np.zeros((len(texts), len(vocabulary)))
    for column, word in enumerate(vocabulary):
        documents = sum(word in words for words in split)
        for row, words in enumerate(split):
            if word in words:
                times = words.count(word)
                matrix[row, column] = (1 + math.log(times)) * (1 + math.log((1 + len(texts)) / (1 + documents)))
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix = matrix / np.where(norms == 0, 1, norms)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    vectors = (left * values)[:, :dimensions]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms < 1e-9, 1, norms)


@pytest.mark.parametrize("dimensions", [2, 3, 100])
def test_latent_semantic_vectors_are_those_of_the_dense_decomposition(dimensions):
    found, expected = latent_semantic_vectors(TEXTS, dimensions), dense_lsa(TEXTS, dimensions)
    assert found.dtype == np.float32 and len(found) == len(TEXTS)
    # up to the signs of the columns, so compared by the cosines between texts
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-4)
    assert (found[-1] == 0).all(), "a text without words"


def test_truncated_svd_of_a_larger_matrix_is_torchs_own():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 20, dtype=torch.float64)).Q for size in (60, 90))
    matrix = left * 2.0 ** -torch.arange(20) @ right.T
    left, values, _ = torch.linalg.svd(matrix)
    expected = left[:, :4] * values[:4]
    found = truncated_svd(csr_matrix(matrix.numpy()), 4, seed=0)
    assert (found.sum(0) >= 0).all()
    np.testing.assert_allclose(np.abs(found), expected.abs().numpy(), atol=1e-6, rtol=1e-6)


def splits_of(captions, documents=None):
    ids = [f"{row}.jpg" for row in range(len(captions))]
    rows = {"image_id": ids, "captions": captions}
    gallery = Dataset.from_dict(rows if documents is None else {"image_id": ids, "text": documents})
    train = Dataset.from_dict(rows).filter(lambda row: bool(row["captions"]))
    return IndexedSplits(train, gallery, None, documents=documents is not None)


def test_where_vectors_come_from():
    captioned, silent = splits_of([["a dog"], ["a cat"]]), splits_of([["a dog"], ["a cat"], []])
    documents = splits_of([["where"], []], documents=["one text", "another"])
    assert choose_source("auto", captioned, tower_is_trained=False) == "text"
    assert choose_source("auto", documents, tower_is_trained=False) == "text"
    assert choose_source("auto", silent, tower_is_trained=True) == "vision"
    assert choose_source("vision", captioned, tower_is_trained=True) == "vision"
    with pytest.raises(UserError, match="needs vectors and there are none: 1 of 3 pictures have no trained caption"):
        choose_source("auto", silent, tower_is_trained=False)
    with pytest.raises(UserError, match="no vision tower here was trained"):
        choose_source("vision", captioned, tower_is_trained=False)
    with pytest.raises(UserError, match="1 of 3 pictures have no trained caption"):
        choose_source("text", silent, tower_is_trained=True)


SPLIT = {
    "dataset_name": "../photos", "dataset_config_name": None, "train_file": None, "validation_file": None,
    "held_out_captions_per_image": 1, "held_out_images": 0.0, "split_seed": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"split_seed": 1}, {"held_out_captions_per_image": 0}, {"dataset_name": "others"}, {"held_out_images": 0.2}],
)
def test_an_xmatching_model_of_another_split_is_refused(tmp_path, change):
    (tmp_path / "run_arguments.json").write_text(json.dumps(SPLIT | {"learning_rate": 1.0} | change))
    with pytest.raises(UserError, match=f"another split.*{next(iter(change))}"):
        check_same_split(tmp_path, SPLIT)


def test_the_same_split_may_be_written_in_another_way(tmp_path):
    (tmp_path / "run_arguments.json").write_text(json.dumps(SPLIT | {"dataset_name": "/data/photos/"}))
    check_same_split(tmp_path, SPLIT)


def test_a_model_that_does_not_say_its_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="held-out ones could leak"):
        check_same_split(tmp_path, SPLIT)
