"""Tables of any name beside their pictures: ``metadata1000.jsonl``, or ``train.csv`` and ``val.csv``."""

import re
from pathlib import Path

from imagedex.corpora.forms.addresses import is_address
from imagedex.corpora.forms.cells import SPLIT_NAMES, is_base64_picture
from imagedex.corpora.forms.contents import FOUND, Columns, Place, read_splits
from imagedex.corpora.forms.tables import SUFFIXES, choose_image_column, is_path, names_of, read_table
from imagedex.corpora.paths import corpus_image_root, list_pictures, require_folder
from imagedex.corpora.schema import FormContents, listed
from imagedex.errors import UserError

_OTHERS = re.compile(r"dataset_infos?|dataset_dict|state|config|package|.*_stats|.*_info", re.IGNORECASE)


def find(folder: Path) -> Path | None:
    """``folder``, when tables and pictures lie in it. Tables without pictures are left to `datasets`."""
    return folder if tables_in(folder) and list_pictures(folder) else None


def tables_in(folder: Path) -> list[Path]:
    """The files directly in a folder that may be a table of captions."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and not _OTHERS.fullmatch(file.stem)
        and file.is_file()
    )


def read(folder: Path, *, image_dir: str | None = None, columns: Columns = FOUND) -> FormContents:
    """Raises `UserError`: several tables that are no splits of one corpus, or one that is no table of captions."""
    files = _by_split(folder)
    splits = {}
    for split, file in files.items():
        try:
            table = read_table(file, "table", columns.caption)
            image = choose_image_column(table.features, columns.image, str(file))
        except UserError as error:
            raise UserError(f"{error}; if another file holds the captions, give it with --train_file") from error
        root = require_folder(image_dir, "--image_dir") if image_dir else folder
        first = table[0][image]
        if is_path(table.features[image]) and not is_base64_picture(first or "") and not is_address(first):
            root = corpus_image_root(names_of(table, image, str(file)), folder, image_dir, str(file))
        own = columns._replace(put_aside=columns.put_aside or ("its file" if len(files) > 1 else ""))
        splits |= read_splits(table, str(file), Place(root, root), own, split)
    return FormContents(f"pictures with {', '.join(file.name for file in files.values())}", splits)


def _by_split(folder: Path) -> dict[str, Path]:
    files = tables_in(folder)
    if len(files) == 1:
        return {"train": files[0]}
    found: dict[str | None, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        found.setdefault(next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None), []).append(file)
    if "train" not in found or None in found or any(len(same) > 1 for same in found.values()):
        raise UserError(
            f"--dataset_name {folder} holds several tables ({listed([file.name for file in files], 5)}); name the one with the "
            "captions with --train_file, and with --image_dir the pictures' folder"
        )
    return {split: same[0] for split, same in found.items()}
