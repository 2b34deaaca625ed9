"""Hub datasets, local folders that ``load_dataset`` reads, and single table files, given an image and a caption column.

Pictures may be embedded (parquet) or paths. Rows that repeat a picture (the same path) become one row with all its
captions. ``image_id`` is the stored file name; where none is stored, or names do not tell pictures apart, it is
``{split}/{row:08d}``.
"""

import hashlib
import logging
import os
import posixpath
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets

from imagedex.corpora.forms.imagefolder import SPLIT_FOLDERS
from imagedex.corpora.forms.tables import (
    SUFFIXES,
    captions_of,
    choose_caption_columns,
    choose_image_column,
    first_line,
    holds_pictures,
    is_path,
    pictures_of,
    read_table,
    sources_of,
)
from imagedex.corpora.paths import image_extensions, require_folder
from imagedex.corpora.schema import COLUMNS, FormContents, Picture, clean_captions, report_empty
from imagedex.errors import UserError
from imagedex.hub import hub_reason

logger = logging.getLogger(__name__)


def find(folder: Path) -> Path | None:
    """``folder``, when it holds what ``datasets.load_dataset`` or ``load_from_disk`` reads."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return folder
    suffixes = {*SUFFIXES, ".arrow"}
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(os.path.splitext(name)[1].lower() in suffixes and not name.startswith(".") for name in names):
            return folder
    return None


def read(
    name: str | Path,
    *,
    config_name: str | None = None,
    image_dir: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    num_proc: int | None = None,
) -> FormContents:
    """Loads dataset ``name`` (a Hub id, or a local folder as a Path) and brings each split to the schema.

    Raises:
        UserError: it cannot be loaded, or a column is missing.
    """
    loaded = _load(name, config_name, num_proc)
    splits = {}
    for split, table in _named_splits(loaded, str(name)).items():
        root = require_folder(image_dir, "--image_dir") if image_dir else (name if isinstance(name, Path) else None)
        where = f"{name} ({split})"
        splits[split] = read_split(table, split, where, root, image_column, caption_column)
    return FormContents(f"dataset {name}" + (f" ({config_name})" if config_name else ""), splits)


def read_files(
    train_file: str,
    validation_file: str | None = None,
    *,
    image_dir: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> FormContents:
    """``--train_file`` / ``--validation_file``: picture paths relative to ``image_dir``, else to the file's folder."""
    splits = {}
    for split, file in (("train", train_file), ("validation", validation_file)):
        if file:
            table = read_table(file, f"--{split}_file")
            root = require_folder(image_dir, "--image_dir") if image_dir else Path(file).expanduser().parent
            splits[split] = read_split(table, split, str(file), root, image_column, caption_column)
    return FormContents(f"table {Path(train_file).name}", splits)


def read_split(
    table: Dataset, split: str, where: str, root: Path | None, image_column: str | None, caption_column: str | None
) -> list[Picture] | Dataset:
    """One split to records (the image column holds paths below ``root``) or to a dataset (it holds pictures)."""
    image = choose_image_column(table.features, image_column, where)
    captions = choose_caption_columns(table.features, caption_column, where)
    logger.info("%s: pictures from column %s, captions from %s", where, image, ", ".join(captions))
    feature = table.features[image]
    if not holds_pictures(feature):
        raise UserError(f"{where}: column {image!r} holds no pictures but {feature}")
    if not is_path(feature):
        return embedded_pictures(table, split, image, captions)
    if root is None:
        raise UserError(f"{where}: column {image!r} holds file names; give their folder with --image_dir")
    return pictures_of(table, image, captions, root, root, where)


def embedded_pictures(table: Dataset, split: str, image_column: str, caption_columns: list[str]) -> Dataset:
    """A table whose image column holds pictures, in the schema. The pictures themselves are not copied."""
    stored = table.select_columns([image_column])
    if image_column != "image":
        stored = stored.rename_column(image_column, "image")
    stored = stored.cast_column("image", Image(decode=False))
    groups, image_ids = _group_rows(stored, split)
    captions = captions_of(table, caption_columns)
    sources = sources_of(table, [image_column, *caption_columns])
    columns = {"image_id": [""] * len(table), "captions": [[]] * len(table), "source_id": sources}
    empty, bare = 0, []
    for rows, image_id in zip(groups, image_ids, strict=True):
        kept, dropped = clean_captions(caption for row in rows for caption in captions[row])
        empty += dropped
        if not kept:
            bare.append(image_id)
        columns["image_id"][rows[0]] = image_id
        columns["captions"][rows[0]] = kept
    report_empty(empty, bare, split)
    text = Dataset.from_dict(
        columns,
        features=Features(
            {"image_id": Value("string"), "captions": List(Value("string")), "source_id": Value("string")}
        ),
    )
    # Beside each other, not row by row: columns are joined without reading a picture, and only then rows are chosen.
    joined = concatenate_datasets([stored.cast_column("image", Image()), text], axis=1).select_columns(list(COLUMNS))
    return joined if len(groups) == len(joined) else joined.select([rows[0] for rows in groups])


def unique_across_splits(splits: dict[str, list[Picture] | Dataset]) -> dict[str, list[Picture] | Dataset]:
    """Puts the split's name before each embedded ``image_id`` when two splits use one name for different pictures."""
    ids = {split: set(_ids(contents)) for split, contents in splits.items()}
    if sum(map(len, ids.values())) == len(set().union(*ids.values())):
        return splits
    if not all(isinstance(contents, Dataset) for contents in splits.values()):
        return splits  # paths: the same picture is in two splits, which is for the corpus to decide
    logger.warning("Splits share picture names; image_ids are written as split/name")
    return {split: _prefixed(contents, split) for split, contents in splits.items()}


def _ids(contents: list[Picture] | Dataset) -> list[str]:
    return contents["image_id"][:] if isinstance(contents, Dataset) else [row.image_id for row in contents]


def _prefixed(contents: Dataset, split: str) -> Dataset:
    ids = Dataset.from_dict({"image_id": [f"{split}/{image_id}" for image_id in contents["image_id"]]})
    return concatenate_datasets([contents.remove_columns("image_id"), ids], axis=1).select_columns(list(COLUMNS))


def _load(name: str | Path, config_name: str | None, num_proc: int | None) -> Dataset | DatasetDict:
    try:
        if isinstance(name, Path):
            if (name / "dataset_dict.json").is_file() or (name / "state.json").is_file():
                return datasets.load_from_disk(str(name))
            return datasets.load_dataset(str(name), config_name, num_proc=num_proc)
        return datasets.load_dataset(name, config_name, num_proc=num_proc)
    except Exception as error:  # noqa: BLE001  builders, the Hub client and file systems each raise their own
        where, reason = (f"the folder {name}", None) if isinstance(name, Path) else (name, hub_reason(error, "dataset"))
        raise UserError(f"{where} cannot be loaded: {reason or first_line(error)}") from error


def _named_splits(loaded: Dataset | DatasetDict, name: str) -> dict[str, Dataset]:
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    named = {SPLIT_FOLDERS[split]: table for split, table in loaded.items() if split in SPLIT_FOLDERS}
    others = [split for split in loaded if split not in SPLIT_FOLDERS]
    if "train" not in named and len(loaded) == 1:
        only = next(iter(loaded))
        logger.warning("%s has only a %s split; it is taken for training", name, only)
        return {"train": loaded[only]}
    if "train" not in named:
        raise UserError(f"{name} has no train split; its splits are {', '.join(loaded)}")
    if others:
        logger.warning("%s: splits not used: %s", name, ", ".join(others))
    return named


def _group_rows(stored: Dataset, split: str) -> tuple[list[list[int]], list[str]]:
    """Rows of the same picture, in the order of their first row, and the ``image_id`` of each group."""
    paths: list[str | None] = []
    for table in stored.with_format("arrow").iter(batch_size=1000):
        paths += table["image"].combine_chunks().field("path").to_pylist()
    by_path: dict[object, list[int]] = {}
    for row, path in enumerate(paths):
        by_path.setdefault(path or row, []).append(row)
    repeated = [rows for rows in by_path.values() if len(rows) > 1]
    if not all(_same_picture(stored, rows) for rows in repeated):
        logger.warning("%s split: one file name stands for different pictures; every row is its own picture", split)
        by_path = {row: [row] for row in range(len(paths))}
    groups = list(by_path.values())
    names = [_stored_name(paths[rows[0]]) for rows in groups]
    if not all(names) or len(set(names)) < len(names):
        names = [f"{split}/{rows[0]:08d}" for rows in groups]
        logger.info(
            "%s split: pictures have no file names that tell them apart; image_ids are %s, ...", split, names[0]
        )
    return groups, names


def _same_picture(stored: Dataset, rows: list[int]) -> bool:
    """Whether rows with the same path really hold the same bytes (some datasets call every picture ``image.jpg``)."""
    contents = (stored[row]["image"]["bytes"] for row in rows)
    return len({hashlib.blake2b(value or b"").digest() for value in contents}) == 1


def _stored_name(path: str | None) -> str:
    """The part of a stored path that is the same on every machine: a relative path as it is, else the file name."""
    if not path:
        return ""
    path = path.replace(os.sep, "/")
    if "://" in path or posixpath.isabs(path) or path.startswith(".."):
        path = posixpath.basename(path.split("::")[0])
    name = posixpath.normpath(path)
    return name if posixpath.splitext(name)[1].lower() in image_extensions() else ""
