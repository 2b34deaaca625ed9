"""Gallery vectors on disk, in shards: a stopped run goes on where it was, and shards of another model are refused.

index/
  index.json                  model and gallery fingerprints, rows a shard, the image_ids in the order of the rows
  vectors-00000.safetensors   "vectors": (rows, D) float32 unit vectors
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from imagedex.encoding.vectors import image_vector_batches
from imagedex.errors import UserError
from imagedex.files import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "index.json"
FORMAT = 1
ROWS_PER_SHARD = 2048


def model_fingerprint(model: torch.nn.Module, image_processor) -> str:
    """Hash of every weight and of the preprocessing: another checkpoint, precision or picture size has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(json.dumps(image_processor.to_dict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def gallery_fingerprint(dataset) -> str:
    """Hash of the image_ids and of what betrays a changed picture: its file's size and time, or its length in bytes."""
    digest = hashlib.blake2b(digest_size=16)
    columns = dataset.select_columns(["image_id", "image"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        image = table["image"].combine_chunks()
        stored, paths = image.field("bytes"), image.field("path").to_pylist()
        for row, (image_id, path) in enumerate(zip(table["image_id"].to_pylist(), paths, strict=True)):
            if stored[row].is_valid:
                state = len(stored[row].as_buffer())
            else:
                stat = Path(path).stat() if path and Path(path).is_file() else None
                state = (stat.st_size, stat.st_mtime_ns) if stat else path
            digest.update(f"{image_id}\0{state}\n".encode())
    return digest.hexdigest()


def check_index(index_dir: str | Path, model_hash: str, gallery_hash: str) -> dict | None:
    """The manifest in `index_dir`, or None where there is no index yet. Writes nothing.

    Raises:
        UserError: an index of another model, gallery or format, or one that cannot be read.
    """
    path = Path(index_dir) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {name: manifest[name] for name in ("format", "model", "gallery", "rows_per_shard", "image_ids")}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not an index that can be read; delete {path.parent} or give another folder"
        ) from error
    for name, expected, what in (
        ("format", FORMAT, "format"),
        ("model", model_hash, "model (other weights or another preprocessing)"),
        ("gallery", gallery_hash, "gallery (other or changed pictures)"),
    ):
        if found[name] != expected:
            raise UserError(f"{path.parent} is the index of another {what}; delete it or give another folder")
    return manifest


def encode_gallery(
    model: torch.nn.Module,
    image_processor,
    dataset,
    index_dir: str | Path,
    batch_size: int = 64,
    device=None,
    num_workers: int = 0,
    progress: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
    fingerprints: tuple[str, str] | None = None,
) -> torch.Tensor:
    """Vectors of a gallery, kept in `index_dir`; shards that are there already are not encoded again.

    Args:
        dataset: rows with `image_id` and `image`.
        rows_per_shard: for a new index; an index that is there keeps its own.
        fingerprints: of model and gallery, where the caller has them already.

    Returns:
        (N, D) float32 unit vectors in the order of the rows.

    Raises:
        UserError: see `check_index` and `encode_images`.
    """
    index_dir = Path(index_dir)
    model_hash, gallery_hash = fingerprints or (model_fingerprint(model, image_processor), gallery_fingerprint(dataset))
    manifest = check_index(index_dir, model_hash, gallery_hash)
    if manifest is None:
        manifest = {"format": FORMAT, "model": model_hash, "gallery": gallery_hash, "rows_per_shard": rows_per_shard}
        manifest["image_ids"] = list(dataset["image_id"])
        write_atomically(index_dir / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=0))
    shards = list(_shards(len(dataset), manifest["rows_per_shard"]))
    missing = [shard for shard in shards if _read_shard(index_dir, manifest, *shard) is None]
    if len(missing) < len(shards):
        logger.info("%d of %d shards of %s are there already", len(shards) - len(missing), len(shards), index_dir)
    # A batch never crosses a shard's border: a run that was stopped and went on has the batches of one that was not.
    batches = [
        range(first, min(first + batch_size, stop))
        for _, start, stop in missing
        for first in range(start, stop, batch_size)
    ]
    pending = []
    vectors = image_vector_batches(model, image_processor, dataset, batches, device, num_workers, progress)
    for rows, batch in zip(batches, vectors, strict=True):
        pending.append(batch)
        number, start, stop = missing[0]
        if rows.stop == stop:
            _write_shard(index_dir, manifest, number, start, torch.cat(pending))
            pending.clear()
            missing.pop(0)
    return read_vectors(index_dir)[1]


def read_vectors(index_dir: str | Path) -> tuple[list[str], torch.Tensor]:
    """image_ids and their (N, D) float32 unit vectors, of a finished index."""
    index_dir = Path(index_dir)
    try:
        manifest = json.loads((index_dir / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{index_dir} holds no index: {MANIFEST} is missing") from None
    parts = []
    for shard in _shards(len(manifest["image_ids"]), manifest["rows_per_shard"]):
        part = _read_shard(index_dir, manifest, *shard)
        if part is None:
            raise UserError(f"the index {index_dir} is not finished: {_shard_name(shard[0])} is missing or damaged")
        parts.append(part)
    return manifest["image_ids"], torch.cat(parts) if parts else torch.empty(0, 0)


def _shards(rows: int, rows_per_shard: int) -> Iterator[tuple[int, int, int]]:
    for number, start in enumerate(range(0, rows, rows_per_shard)):
        yield number, start, min(start + rows_per_shard, rows)


def _shard_name(number: int) -> str:
    return f"vectors-{number:05d}.safetensors"


def _write_shard(index_dir: Path, manifest: dict, number: int, start: int, vectors: torch.Tensor) -> None:
    metadata = {"model": manifest["model"], "gallery": manifest["gallery"], "start": str(start)}
    write_atomically(index_dir / _shard_name(number), safetensors.torch.save({"vectors": vectors}, metadata))


def _read_shard(index_dir: Path, manifest: dict, number: int, start: int, stop: int) -> torch.Tensor | None:
    """The shard's vectors, or None when it has to be encoded: not there, damaged, or copied from another index."""
    path = index_dir / _shard_name(number)
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as shard:
            metadata, vectors = shard.metadata() or {}, shard.get_tensor("vectors")
    except (safetensors.SafetensorError, OSError) as error:
        logger.warning("%s is damaged and encoded again (%s)", path, error)
        return None
    expected = {"model": manifest["model"], "gallery": manifest["gallery"], "start": str(start)}
    if metadata != expected or len(vectors) != stop - start:
        logger.warning("%s belongs to another index and is encoded again", path)
        return None
    return vectors
