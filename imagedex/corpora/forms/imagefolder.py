"""The ``imagefolder`` of datasets: pictures beside a ``metadata.csv``, ``.jsonl`` or ``.parquet`` with ``file_name``.

The metadata lies in the folder itself, or in one sub folder a split (``train/``, ``validation/``, ``test/``), with
paths relative to it. Rows that repeat a ``file_name`` are one picture with several captions.
"""

from pathlib import Path

from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.forms.contents import FOUND, Columns, Place, read_splits
from imagedex.corpora.forms.tables import read_table
from imagedex.corpora.paths import require_folder
from imagedex.corpora.schema import FormContents
from imagedex.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def find(folder: Path) -> Path | None:
    """``folder``, when it or a split's folder in it holds a metadata file."""
    return folder if _metadata_files(folder) else None


def read(folder: Path, *, image_dir: str | None = None, columns: Columns = FOUND) -> FormContents:
    """Reads the metadata of each split; ``image_id`` is relative to ``folder`` (``train/0001.jpg``).

    Raises:
        UserError: two metadata files for one split, no image or caption column, or no train split.
    """
    root = require_folder(image_dir, "--image_dir") if image_dir else folder
    found = _metadata_files(folder)
    splits = {}
    for split, files in found.items():
        if len(files) > 1:
            raise UserError(f"{folder}: several metadata files for the {split} split: {', '.join(map(str, files))}")
        file = files[0]
        table = read_table(file, "metadata", columns.caption)
        named = columns.image or ("file_name" if "file_name" in table.features else None)
        own = columns._replace(image=named, put_aside=columns.put_aside or ("its folder" if len(found) > 1 else ""))
        place = Place(root if image_dir else file.parent, root)
        splits |= read_splits(table, str(file), place, own, split)
    if "train" not in splits:
        raise UserError(f"{folder} has metadata for {', '.join(splits)} but none for train")
    return FormContents(f"imagefolder with {file.name}", splits)


def _metadata_files(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    places = {folder: "train"}
    for name, split in SPLIT_NAMES.items():
        places[folder / name] = split
    for place, split in places.items():
        for name in METADATA:
            if (place / name).is_file():
                found.setdefault(split, []).append(place / name)
    return found
