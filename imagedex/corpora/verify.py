"""Every picture is decoded once before anything is trained on it; one that cannot be read is named, never replaced."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from datasets import Dataset, Image

from imagedex.corpora.schema import Picture, counted, listed
from imagedex.errors import UserError
from imagedex.modeling.picture_reading import as_rgb

logger = logging.getLogger(__name__)

UNREADABLE_CHOICES = ("error", "skip")
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock


def check_choice(unreadable_images: str) -> None:
    if unreadable_images not in UNREADABLE_CHOICES:
        raise UserError(f"--unreadable_images {unreadable_images}: choose one of {', '.join(UNREADABLE_CHOICES)}")


def drop_missing(pictures: Sequence[Picture], *, unreadable_images: str, split: str) -> tuple[list[Picture], list[str]]:
    """Separates the pictures whose file is there from the names of those whose file is not.

    Raises:
        UserError: a file is missing and ``unreadable_images`` is ``"error"``, or all of them are missing.
    """
    there = [picture for picture in pictures if os.path.isfile(picture.path)]
    missing = [picture.path for picture in pictures if not os.path.isfile(picture.path)]
    _report(missing, len(pictures), "named by the captions but not there", unreadable_images, split)
    return there, missing


def verify_images(
    dataset: Dataset, *, unreadable_images: str = "error", num_proc: int | None = None, split: str = "train"
) -> tuple[Dataset, list[str]]:
    """Decodes every picture of ``dataset`` (columns of the schema) to RGB once.

    The outcome is cached by datasets under the path, size and modification time of each file. Pictures that fail are
    tried again on every run, so that a file that was mended in between is taken up.

    Returns:
        the rows whose picture can be read, and the names of the others.

    Raises:
        UserError: a picture cannot be read and ``unreadable_images`` is ``"error"``, or none can be read.
    """
    check_choice(unreadable_images)
    stored = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    paths, stamp = _paths_and_stamp(stored)
    outcome = stored.map(
        _problems_of_batch,
        batched=True,
        batch_size=64,
        remove_columns=["image"],
        fn_kwargs={"stamp": stamp},
        num_proc=min(num_proc, len(stored)) if num_proc and num_proc > 1 else None,
        desc=f"Checking the {split} pictures",
    )
    problems = {row: _problem(stored[row]["image"]) for row, text in enumerate(outcome["problem"]) if text}
    problems = {row: text for row, text in problems.items() if text}
    if not problems:
        return dataset, []
    image_ids = dataset["image_id"]
    names = [paths[row] or image_ids[row] for row in problems]
    reasons = [f"{name} ({text})" for name, text in zip(names, problems.values(), strict=True)]
    _report(reasons, len(dataset), "unreadable", unreadable_images, split)
    return dataset.select([row for row in range(len(dataset)) if row not in problems]), names


def _report(names: Sequence[str], total: int, what: str, unreadable_images: str, split: str) -> None:
    if not names:
        return
    if len(names) == total:
        raise UserError(
            f"all {counted(total, 'picture')} of the {split} split {'is' if total == 1 else 'are'} "
            f"{what}: {listed(names)}"
        )
    if unreadable_images == "error":
        raise UserError(
            f"{counted(len(names), 'picture')} of the {split} split {what}: {listed(names)}; "
            "mend or remove them, or leave them out with --unreadable_images skip"
        )
    logger.warning("%s split: left out %s, %s: %s", split, counted(len(names), "picture"), what, ", ".join(names))


def _paths_and_stamp(stored: Dataset) -> tuple[list[str | None], str]:
    """The local path of each picture (None where it is embedded), and a digest of all sizes and modification times."""
    paths: list[str | None] = []
    digest = hashlib.blake2b(digest_size=16)
    for table in stored.with_format("arrow").iter(batch_size=1000):
        column = table["image"].combine_chunks()
        embedded = column.field("bytes").is_valid().to_pylist()
        paths += [
            path if path and not inside and os.path.isfile(path) else None
            for path, inside in zip(column.field("path").to_pylist(), embedded, strict=True)
        ]
    for path in paths:
        if path:
            status = os.stat(path)
            digest.update(f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
    return paths, digest.hexdigest()


def _problems_of_batch(batch: dict[str, list], stamp: str) -> dict[str, list[str]]:
    """``stamp`` is not used: it is an argument so that it enters the fingerprint of the cached outcome."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return {"problem": list(pool.map(_problem, batch["image"]))}


def _problem(stored: dict) -> str:
    """Why a picture cannot be read, in one line; empty when it can. Decodes just as training will."""
    try:
        as_rgb(Image().decode_example(stored))
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise anything from SyntaxError to struct.error
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:200]
    return ""
