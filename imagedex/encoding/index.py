"""The vectors of a gallery on disk: a stopped run goes on, new and changed pictures alone are encoded."""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from imagedex.encoding.store import (
    BROKEN,
    RECORD,
    ROWS_PER_SHARD,
    Store,
    picture_keys,
    read_checked,
    weights_fingerprint,
    with_checksum,
)
from imagedex.encoding.vectors import image_vector_batches
from imagedex.errors import UserError
from imagedex.files import write_atomically, writing
from imagedex.modeling.caption_bank import CaptionBank

logger = logging.getLogger(__name__)

GALLERY = "gallery.json"  # the image_ids in the gallery's order, and the keys of their vectors


def open_index(
    index_dir: str | Path, model: torch.nn.Module, image_processor, bank: CaptionBank | None = None
) -> Store:
    """The store of a model's vectors in that folder, empty where there is none yet. Writes nothing.

    Raises: `UserError` for an index of another model, bank or format.
    """
    maker = {"model": weights_fingerprint(model, image_processor.to_dict()), "bank": bank.fingerprint if bank else ""}
    return Store(index_dir, maker, "index")


def encode_gallery(
    store: Store,
    model: torch.nn.Module,
    image_processor,
    dataset,
    bank: CaptionBank | None = None,
    batch_size: int = 64,
    device=None,
    num_workers: int = 0,
    progress: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Vectors of a gallery, kept in the store; those that are there already are not encoded again.

    Args:
        store: see `open_index`.
        dataset: rows with `image_id` and `image`.
        bank: of the model's training captions; with it each picture gets its bias.

    Returns:
        (N, D) float32 unit vectors in the order of the rows, and (N,) float32 biases, None without a bank.

    Raises:
        UserError: see `encode_images`.
    """
    keys = picture_keys(dataset)
    if len(store):
        logger.info(
            "%d of %d pictures are in %s already", len(keys) - len(store.missing(keys)), len(keys), store.folder
        )

    def encode(batches):
        for vectors in image_vector_batches(model, image_processor, dataset, batches, device, num_workers, progress):
            yield {"vectors": vectors.numpy()} | ({"bias": bank.bias(vectors).numpy()} if bank else {})

    store.fill(keys, encode, batch_size, rows_per_shard=rows_per_shard)
    record = {"image_ids": list(dataset["image_id"]), "keys": [key.tobytes().hex() for key in keys]}
    with writing(store.folder):
        write_atomically(store.folder / GALLERY, json.dumps(with_checksum(record), ensure_ascii=False, indent=0))
    return _vectors(store, keys)


def _vectors(store: Store, keys: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = store.rows(keys)
    bias = torch.from_numpy(rows.array("bias")) if len(rows) and "bias" in store.shards[0].fields else None
    return torch.from_numpy(rows.array("vectors")), bias


def read_vectors(index_dir: str | Path) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
    """image_ids, their (N, D) float32 unit vectors and their (N,) biases (None: of a model without a bank), of a finished
    index. Raises `UserError`."""
    folder = Path(index_dir)
    try:
        record = read_checked(folder / GALLERY)
        store = Store(folder, read_checked(folder / RECORD)["maker"], "index")
        keys = np.frombuffer(bytes.fromhex("".join(record["keys"])), np.uint8).reshape(-1, 16)
        return record["image_ids"], *_vectors(store, keys)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished index: {GALLERY} is missing") from None
    except BROKEN as error:
        raise UserError(
            f"the index {folder} is damaged ({error}); the search that made it makes it whole again"
        ) from error
