"""Hub datasets, local folders that ``load_dataset`` reads, and single table files, given an image and a caption column.

Pictures may be embedded (parquet) or paths. Rows that repeat a picture (the same path) become one row with all its
captions. ``image_id`` is the stored file name; where none is stored, or names do not tell pictures apart, it is
``{split}/{row:08d}``.
"""

import logging
import os
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, concatenate_datasets

from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.forms.contents import FOUND, Columns, Place, read_splits
from imagedex.corpora.forms.tables import SUFFIXES, first_line, read_table
from imagedex.corpora.paths import require_folder
from imagedex.corpora.schema import COLUMNS, FormContents, Picture
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
    columns: Columns = FOUND,
    num_proc: int | None = None,
) -> FormContents:
    """Loads dataset ``name`` (a Hub id, or a local folder as a Path) and brings each split to the schema.

    Raises:
        UserError: it cannot be loaded, or a column is missing.
    """
    local = isinstance(name, Path)
    root = require_folder(image_dir, "--image_dir") if image_dir else (name if local else None)
    tables = _named_splits(_load(name, config_name, num_proc), str(name))
    splits = {}
    for split, table in tables.items():
        own = columns if len(tables) == 1 else columns._replace(put_aside="the data set itself")
        splits |= read_splits(table, f"{name} ({split})", Place(root, root, remote=not local), own, split)
    return FormContents(f"dataset {name}" + (f" ({config_name})" if config_name else ""), splits)


def read_files(
    train_file: str, validation_file: str | None = None, *, image_dir: str | None = None, columns: Columns = FOUND
) -> FormContents:
    """``--train_file`` / ``--validation_file``: picture paths relative to ``image_dir``, else to the file's folder."""
    splits = {}
    for split, file in (("train", train_file), ("validation", validation_file)):
        if file:
            table = read_table(file, f"--{split}_file", columns.caption)
            root = require_folder(image_dir, "--image_dir") if image_dir else Path(file).expanduser().parent
            own = columns._replace(put_aside="--validation_file") if validation_file else columns
            splits |= read_splits(table, str(file), Place(root, root), own, split)
    return FormContents(f"table {Path(train_file).name}", splits)


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
    named = {SPLIT_NAMES[split]: table for split, table in loaded.items() if split in SPLIT_NAMES}
    others = [split for split in loaded if split not in SPLIT_NAMES]
    if "train" not in named and len(loaded) == 1:
        only = next(iter(loaded))
        logger.warning("%s has only a %s split; it is taken for training", name, only)
        return {"train": loaded[only]}
    if "train" not in named:
        raise UserError(f"{name} has no train split; its splits are {', '.join(loaded)}")
    if others:
        logger.warning("%s: splits not used: %s", name, ", ".join(others))
    return named
