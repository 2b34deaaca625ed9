"""Rows on disk in the cache of `datasets`, with a checksum of ours beside each file: what has changed since is made anew."""

import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset

from imagedex.errors import UserError
from imagedex.files import A_DAY, clear_leftovers, write_atomically

logger = logging.getLogger(__name__)

CHECKSUM = ".blake2b"  # how the name of a file's checksum ends
LARGE = 2**28  # bytes
_UNUSABLE = (OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)


def cached_rows(generator: Callable, features, gen_kwargs: dict, fingerprint: str) -> Dataset:
    """`Dataset.from_generator`, from the cache where it lies there whole. Raises `UserError` where there can be no cache."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "generator", f"default-fingerprint={fingerprint}")

    def build() -> Dataset:
        return Dataset.from_generator(generator, features=features, gen_kwargs=gen_kwargs, fingerprint=fingerprint)

    was_there = folder.exists()
    clear_leftovers(folder, older_than=A_DAY)
    try:
        rows = build()
        if is_whole_folder(folder):
            return rows
    except _UNUSABLE as error:
        if not was_there:
            raise UserError(unusable(folder, error)) from error
    logger.warning("%s is damaged; it is made anew", folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        rows = build()
        is_whole_folder(folder)
        return rows
    except _UNUSABLE as error:
        raise UserError(unusable(folder, error)) from error


def is_whole_folder(folder: Path) -> bool:
    """Of the rows and of what `map` made of them in earlier runs. Kept pixels, which are large, carry checksums of their own."""
    return all(is_whole(path) for path in sorted(folder.rglob("*.arrow")) if path.stat().st_size < LARGE)


def is_whole(path: Path) -> bool:
    """Whether a file is what it was when this was asked first."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    beside = path.with_name(path.name + CHECKSUM)
    with suppress(FileNotFoundError):
        return beside.read_bytes() == digest.encode()
    with suppress(OSError):  # a cache that is only read
        write_atomically(beside, digest)
    return True


def unusable(folder: Path, error: Exception) -> str:
    why = error.__cause__ or error
    return f"the cache {folder} cannot be used: {' '.join(str(why).split())[:300]}; name another with HF_DATASETS_CACHE"
