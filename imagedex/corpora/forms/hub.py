"""Hub datasets, local folders that ``load_dataset`` reads, and single table files, given an image and a caption column.

Pictures may be embedded (parquet) or paths. Rows that repeat a picture (the same path) become one row with all its
captions. ``image_id`` is the stored file name; where none is stored, or names do not tell pictures apart, it is
``{split}/{row:08d}``.
"""

import logging
import os
import re
from pathlib import Path

import datasets
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets

from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.forms.contents import FOUND, Columns, Place, read_splits
from imagedex.corpora.forms.tables import SUFFIXES, first_line, read_table
from imagedex.corpora.paths import list_files, require_folder
from imagedex.corpora.reading import read_text
from imagedex.corpora.schema import COLUMNS, FormContents, Picture, cut, listed
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
    splits = {}
    try:
        tables = _named_splits(_load(name, config_name, num_proc), str(name))
        for split, table in tables.items():
            own = columns if len(tables) == 1 else columns._replace(put_aside="the data set itself")
            splits |= read_splits(table, f"{name} ({split})", Place(root, root, remote=not local), own, split)
    except UserError as error:
        raise UserError(f"{error}{_tables_seen(name) if local else ''}") from error
    return FormContents(f"dataset {name}" + (f" ({config_name})" if config_name else ""), splits)


def _tables_seen(folder: Path) -> str:
    """What else could have been meant by a folder, for the end of a message."""
    names = list_files(folder)
    tables = [name for name in names if name.lower().endswith(SUFFIXES)]
    shards = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    seen = f"; tables seen: {listed(tables, 5)}; name the one with the captions with --train_file" if tables else ""
    return seen + (f"; tar shards ({listed(shards, 2)}) are read with --streaming" if shards else "")


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
            return _load_folder(name, config_name, num_proc)
        return datasets.load_dataset(name, config_name, num_proc=num_proc)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  builders, the Hub client and file systems each raise their own
        where, reason = (f"the folder {name}", None) if isinstance(name, Path) else (name, hub_reason(error, "dataset"))
        raise UserError(f"{where} cannot be loaded: {reason or first_line(error)}") from error


def _load_folder(folder: Path, config_name: str | None, num_proc: int | None) -> Dataset | DatasetDict:
    """`datasets` says which files there are for which split; tables of text are read by our own hand, as everywhere."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return datasets.load_from_disk(str(folder))
    _check_card(folder)
    builder = datasets.load_dataset_builder(str(folder), config_name)
    files = {split: [Path(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    if builder.info.builder_name not in ("csv", "json") or {
        file.suffix.lower() for found in files.values() for file in found
    } - set(SUFFIXES):
        return datasets.load_dataset(str(folder), config_name, num_proc=num_proc)
    return DatasetDict(
        {
            split: concatenate_datasets([read_table(file, "--dataset_name") for file in found])
            for split, found in files.items()
        }
    )


def _check_card(folder: Path) -> None:
    """The head of a README.md can name a data set's files; in a folder of one's own they lie in it, too."""
    card = folder / "README.md"
    found = re.match(r"---\r?\n(.*?)\r?\n---", read_text(card), re.DOTALL) if card.is_file() else None
    if not found:
        return
    try:
        waiting = [(yaml.safe_load(found[1]) or {}).get("configs")]
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{card} has a head that is no YAML mapping: {first_line(error)}") from error
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and ("://" in value or os.path.isabs(value) or ".." in Path(value).parts):
            raise UserError(f"{card} names data outside its folder ({cut(value, 100)}); none is read from there")


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
