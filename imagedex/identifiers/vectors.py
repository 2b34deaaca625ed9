"""One vector an item, for identifiers that say something of it (`semantic`, `rq`), and where they may come from."""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd
from tqdm.auto import tqdm

from imagedex.checkpoints import read_model_type
from imagedex.corpora.indexed import IndexedSplits
from imagedex.corpora.provenance import differences
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.files import RUN_RECORD
from imagedex.words import words

logger = logging.getLogger(__name__)

LSA_DIMENSIONS = 128


def latent_semantic_vectors(texts: Sequence[str], dimensions: int = LSA_DIMENSIONS, seed: int = 0) -> np.ndarray:
    """Latent semantic analysis (Deerwester et al., 1990): TF-IDF, then a truncated singular value decomposition.

    A text's words weigh (1 + log tf) * (1 + log((1 + N) / (1 + df))), rows have length 1.

    Returns: (N, at most `dimensions`) float32, rows of length 1; a text without words is zero.
    """
    weights = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit_transform(texts)  # (N, V), sparse
    return normalize(truncated_svd(weights, dimensions, seed)).astype(np.float32)


def truncated_svd(matrix, dimensions: int, seed: int) -> np.ndarray:
    """U * S of a sparse (N, V) matrix: (N, min(dimensions, N, V)), each column's sign such that its sum is positive."""
    width = min(dimensions, *matrix.shape)
    left, values, _ = randomized_svd(matrix, width, n_oversamples=10, n_iter=6, random_state=seed)
    vectors = left * values
    return vectors * np.where(vectors.sum(0) < 0, -1.0, 1.0)


def check_same_split(folder: Path, arguments: dict, flag: str = "identifier_vectors_from") -> None:
    """Raises `UserError` unless the model in `folder` was trained by us on the split that `arguments` describe.

    Its vectors would else carry what held-out captions say, and whatever is made of them would give their answers away.

    Args: flag, which argument named it.
    """
    flag = f"--{flag} {folder}"
    try:
        before = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{flag}: no {RUN_RECORD} says which captions it was trained on, so held-out ones could leak; give the output "
            "folder of run_xmatching.py"
        ) from None

    other = differences(before, arguments)
    if other:
        raise UserError(f"{flag} was trained on another split, so held-out captions could leak: {other}")


def xmatching_vectors(
    folder: str, splits: IndexedSplits, arguments: dict, batch_size: int, device, num_workers: int = 0, progress=False
) -> np.ndarray:
    """(N, D) float32: the pictures of the gallery as an XMatchingModel embeds them.

    Args: arguments, of the corpus, which must be those that the model was trained with. Raises `UserError`.
    """
    if splits.documents:
        raise UserError("--identifier_vectors_from embeds pictures; the identifiers of documents come from their texts")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--identifier_vectors_from {folder}: there is no such folder")
    kind = read_model_type(str(path))
    if kind != "xmatching":
        raise UserError(f"--identifier_vectors_from {folder} is a {kind} model; give an xmatching one")
    check_same_split(path, arguments)
    encoder = load_dual_encoder(str(path), device=device)
    options = (batch_size, device, num_workers, progress)
    return encode_images(encoder.model, encoder.image_processor, splits.gallery, *options).numpy()


@torch.no_grad()
def mean_vision_states(model, batches: Iterable[dict], device, progress: bool = False) -> np.ndarray:
    """(N, width) float32: the mean of the vision tower's states of each picture.

    Args: batches, with `pixel_values` (B, 3, height, width).
    """
    model.to(device).eval()
    dtype, means = next(model.vision_model.parameters()).dtype, []
    for batch in tqdm(batches, desc="Vectors of pictures", disable=not progress, dynamic_ncols=True):
        states = model.vision_states(batch["pixel_values"].to(device, dtype))
        means.append(states.mean(1).float().cpu())
    return torch.cat(means).numpy()


def choose_source(wanted: str, splits: IndexedSplits, tower_is_trained: bool) -> str:
    """ "text" or "vision", for --identifier_vectors. Raises `UserError` where there is nothing to make vectors of."""
    silent = sum(not words(text) for text in splits.item_texts())
    noun = splits.nouns[1]
    if wanted == "text" or (wanted == "auto" and not silent):
        if silent:
            raise UserError(
                f"--identifier_vectors text: {silent} of {len(splits.gallery)} {noun} have no trained caption; give "
                "--identifier_vectors_from an XMatchingModel, or a scheme without vectors (atomic, naive)"
            )
        return "text"
    if not tower_is_trained:
        raise UserError(
            f"this identifier scheme needs vectors and there are none: {silent} of {len(splits.gallery)} {noun} have no "
            "trained caption, and no vision tower here was trained; give --identifier_vectors_from an XMatchingModel, "
            "--vision_model_name_or_path, or a scheme without vectors (atomic, naive)"
        )
    return "vision"
