"""The one schema behind every corpus: one row a picture, its captions beside it.

Forms (:mod:`.flickr`, :mod:`.imagefolder`, ...) only read what is written down and return :class:`Picture` records;
turning records into a :class:`datasets.Dataset`, with the checks that hold for all of them, happens here.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from imagedex.corpora.cached import cached_rows
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "image_id": Value("string"),  # POSIX path relative to the image root, extension kept
        "image": Image(),  # decoded when read; local pictures stay paths
        "captions": List(Value("string")),
        "source_id": Value("string"),  # the corpus's own id, "" when it has none
    }
)
COLUMNS = tuple(FEATURES)
LONGEST_CAPTION = (
    20_000  # characters; what is longer is a file misread or damaged, and would cost minutes and gigabytes
)


@dataclass(frozen=True)
class Picture:
    """One row of the schema, the picture still being a path on disk."""

    image_id: str
    path: str
    captions: list[str]
    source_id: str = ""


@dataclass
class FormContents:
    """What a form has read: per split either records (pictures on disk) or a finished dataset (embedded pictures)."""

    form: str
    splits: dict[str, list[Picture] | Dataset]
    captioned: bool = True  # a plain folder of pictures is not, and nothing is missing there


@dataclass
class Corpus:
    """A captioned corpus.

    Attributes:
        form: what was recognised, e.g. ``"Flickr8k captions.txt"``.
        splits: ``"train"`` always; ``"validation"`` / ``"test"`` only where the corpus brings them. Each has exactly
            the columns of :data:`FEATURES`, one row a picture, with unique ``image_id``.
        left_out: the unreadable or missing pictures that were left out on request.
    """

    form: str
    splits: DatasetDict
    left_out: list[str] = field(default_factory=list)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """``a, b, c and 5 more``: the first ``limit`` names and how many follow, for messages of one line."""
    shown = ", ".join(cut(str(name)) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def cut(text: str, length: int = 300) -> str:
    """The beginning of what a user wrote, for a message: printable, and not longer than a line or two."""
    text = text if len(text) <= length else f"{text[:length]}..."
    return text.encode("utf-8", "backslashreplace").decode()


def counted(number: int, noun: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clean_captions(captions: Iterable[str | None]) -> tuple[list[str], int]:
    """Strips each caption; returns those with text, in order, and how many were empty. Raises `UserError`: no caption at all."""
    captions = [(caption or "").strip() for caption in captions if _is_caption(caption)]
    kept = [caption for caption in captions if caption]
    return kept, len(captions) - len(kept)


def _is_caption(caption: object) -> bool:
    """True, or `UserError`: what a file has written there is no text, or is no sentence any more."""
    if caption is None:
        return True
    if not isinstance(caption, str):
        raise UserError(f"a caption is no text but {cut(repr(caption), 80)}; write it in quotation marks")
    if len(caption) > LONGEST_CAPTION:
        raise UserError(
            f"a caption has {len(caption):,} characters, {LONGEST_CAPTION:,} is the most: {cut(caption, 60)}; is it a "
            "caption, and does it end where it should?"
        )
    if not caption.isascii() and cut(caption, LONGEST_CAPTION) != caption:
        raise UserError(f"a caption holds half of a character (a lone surrogate): {cut(caption, 60)}")
    return True


def report_empty(empty: int, bare: Sequence[str], split: str) -> None:
    """Says how many captions were empty, and which pictures have none left (they can be found, but never taught)."""
    if empty:
        logger.warning("%s split: left out %s", split, counted(empty, "empty caption"))
    if bare:
        logger.warning(
            "%s split: %s without any caption (in the gallery, never trained on): %s",
            split,
            counted(len(bare), "picture"),
            listed(bare),
        )


def merge_by_picture(rows: Iterable[Picture]) -> list[Picture]:
    """Joins rows that repeat a picture (same id and path) into one with all captions, in the order of first sight."""
    merged: dict[tuple[str, str], Picture] = {}
    for row in rows:
        key = (row.image_id, row.path)
        if key in merged:
            merged[key].captions.extend(row.captions)
        else:
            merged[key] = Picture(row.image_id, row.path, list(row.captions), row.source_id)
    return list(merged.values())


def check_unique(image_ids: Sequence[str], split: str) -> None:
    """Raises UserError when two rows carry one ``image_id``: a query could then not say which picture is right."""
    seen: set[str] = set()
    twice = [image_id for image_id in image_ids if image_id in seen or seen.add(image_id)]
    if twice:
        raise UserError(
            f"the {split} split names {counted(len(set(twice)), 'image_id')} more than once: "
            f"{listed(sorted(set(twice)))}; keep one row a picture"
        )


def build_dataset(pictures: Sequence[Picture], split: str, captioned: bool = True) -> Dataset:
    """Records to a :class:`datasets.Dataset` with the columns of :data:`FEATURES`.

    The table is written once to the datasets cache (paths and text only, no picture), so that every later ``map`` is
    cached across runs as well.

    Raises:
        UserError: no row at all, or an ``image_id`` used twice.
    """
    if not pictures:
        raise UserError(f"the {split} split holds no picture")
    check_unique([picture.image_id for picture in pictures], split)
    rows, empty, bare, repeated = [], 0, [], 0
    for picture in pictures:
        captions, dropped = clean_captions(picture.captions)
        empty += dropped
        repeated += len(captions) - len(set(captions))
        if not captions:
            bare.append(picture.image_id)
        if cut(picture.source_id) != picture.source_id:
            raise UserError(f"the id of a picture is no id: {cut(picture.source_id, 80)}")
        rows.append(
            {
                "image_id": picture.image_id,
                "image": picture.path,
                "captions": captions,
                "source_id": picture.source_id,
            }
        )
    report_empty(empty, bare if captioned else [], split)
    if repeated:
        logger.info("%s split: %s given twice to the same picture, kept", split, counted(repeated, "caption"))
    # A fingerprint of our own: datasets would pickle the records to make one, which takes seconds for COCO.
    digest = hashlib.blake2b(repr(FEATURES).encode(), digest_size=16)
    for row in rows:
        digest.update(repr(list(row.values())).encode())
    return cached_rows(_yield_rows, FEATURES, {"rows": rows}, f"pictures-{digest.hexdigest()}")


def _yield_rows(rows: list[dict]) -> Iterator[dict]:
    yield from rows


def validate(dataset: Dataset, split: str) -> Dataset:
    """Checks that a dataset has the schema exactly. Wrong columns are a defect of a form, hence no UserError."""
    if tuple(dataset.column_names) != COLUMNS:
        raise ValueError(f"{split}: columns {dataset.column_names}, expected {list(COLUMNS)}")
    if dataset.features != FEATURES:
        raise ValueError(f"{split}: features {dataset.features}, expected {FEATURES}")
    check_unique(dataset["image_id"][:], split)
    return dataset
