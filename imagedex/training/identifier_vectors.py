"""One vector an item, for identifiers that say something of it (`semantic`, `rq`), and where they may come from."""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from imagedex.errors import UserError
from imagedex.retrieval.baselines import words
from imagedex.retrieval.encode import encode_images
from imagedex.retrieval.loading import load_dual_encoder, read_model_type
from imagedex.training.dsi_data import IndexedSplits
from imagedex.training.dsi_rows import DSIRows
from imagedex.training.lifecycle import RECORD

logger = logging.getLogger(__name__)

LSA_DIMENSIONS = 128
# What decides which captions a run has trained on; a path by its last part, since it may be written in several ways.
SPLIT_FIELDS = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "held_out_captions_per_image",
    "held_out_images", "split_seed",
)  # fmt: skip


def latent_semantic_vectors(texts: Sequence[str], dimensions: int = LSA_DIMENSIONS, seed: int = 0) -> np.ndarray:
    """Latent semantic analysis (Deerwester et al., 1990): TF-IDF, then a truncated singular value decomposition.

    A text's words weigh (1 + log tf) * (1 + log((1 + N) / (1 + df))), rows have length 1. The decomposition is randomised
    (Halko et al., 0909.4061, algorithm 4.4), so that only products with the sparse matrix are needed.

    Returns: (N, at most `dimensions`) float32, rows of length 1; a text without words is zero.
    """
    counts = [Counter(words(text)) for text in texts]
    frequency = Counter(word for count in counts for word in count)
    column = {word: place for place, word in enumerate(sorted(frequency))}
    rows = [row for row, count in enumerate(counts) for _ in count]
    columns = [column[word] for count in counts for word in count]
    weights = [
        (1 + math.log(times)) * (1 + math.log((1 + len(texts)) / (1 + frequency[word])))
        for count in counts
        for word, times in count.items()
    ]
    weights = torch.tensor(weights, dtype=torch.float64)
    rows_, squares = torch.tensor(rows, dtype=torch.int64), torch.zeros(len(texts), dtype=torch.float64)
    norms = squares.index_add_(0, rows_, weights**2).sqrt()
    places = torch.stack([rows_, torch.tensor(columns, dtype=torch.int64)])
    shape = len(texts), len(column)
    matrix = torch.sparse_coo_tensor(places, weights / norms[rows_], shape, check_invariants=True).coalesce()
    vectors = truncated_svd(matrix, dimensions, seed)
    return F.normalize(vectors, dim=1).float().numpy()


def truncated_svd(matrix: torch.Tensor, dimensions: int, seed: int, oversampling: int = 10, rounds: int = 6):
    """U * S of a sparse (N, V) matrix: (N, min(dimensions, N, V)), each column's sign such that its sum is positive."""
    width = min(dimensions + oversampling, *matrix.shape)
    basis = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ basis).Q  # (N, width)
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, _ = torch.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    vectors = (basis @ left * values)[:, : min(dimensions, *matrix.shape)]
    return vectors * torch.where(vectors.sum(0) < 0, -1.0, 1.0)


def check_same_split(folder: Path, arguments: dict) -> None:
    """Raises `UserError` unless the model in `folder` was trained by us on the split that `arguments` describe.

    Its vectors would else carry what held-out captions say, and the identifiers would give their answers away.
    """
    flag = f"--identifier_vectors_from {folder}"
    try:
        before = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{flag}: no {RECORD} says which captions it was trained on, so held-out ones could leak; give the output "
            "folder of run_xmatching.py"
        ) from None

    def plain(record, name):
        value = record.get(name) or None
        return Path(value).name if isinstance(value, str) else value

    other = [name for name in SPLIT_FIELDS if plain(before, name) != plain(arguments, name)]
    if other:
        shown = ", ".join(f"{name} ({before.get(name)} there, {arguments.get(name)} here)" for name in other)
        raise UserError(f"{flag} was trained on another split, so held-out captions could leak: {shown}")


def xmatching_vectors(folder: str, rows: DSIRows) -> np.ndarray:
    """(N, D) float32: the pictures of the gallery as an XMatchingModel embeds them. Raises `UserError`."""
    if rows.splits.documents:
        raise UserError("--identifier_vectors_from embeds pictures; the identifiers of documents come from their texts")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--identifier_vectors_from {folder}: there is no such folder")
    kind = read_model_type(str(path))
    if kind != "xmatching":
        raise UserError(f"--identifier_vectors_from {folder} is a {kind} model; give an xmatching one")
    check_same_split(path, asdict(rows.data))
    args, encoder = rows.args, load_dual_encoder(str(path), device=rows.args.device)
    options = (args.per_device_eval_batch_size, args.device, args.dataloader_num_workers, not args.disable_tqdm)
    return encode_images(encoder.model, encoder.image_processor, rows.splits.gallery, *options).numpy()


@torch.no_grad()
def vision_vectors(rows: DSIRows) -> np.ndarray:
    """(N, width) float32: the mean of the vision tower's states of each picture."""
    args, model = rows.args, rows.model.to(rows.args.device).eval()
    loader = DataLoader(
        rows.inputs,
        args.per_device_eval_batch_size,
        collate_fn=rows.collator,
        num_workers=args.dataloader_num_workers,
    )
    means = []
    for batch in tqdm(loader, desc="Vectors for identifiers", disable=args.disable_tqdm):
        batch = {name: value.to(args.device) for name, value in batch.items()}
        states = batch["image_states"] if "image_states" in batch else model.vision_states(**batch)
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
