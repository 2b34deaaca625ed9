"""The ``imagefolder`` of datasets: pictures beside a ``metadata.csv``, ``.jsonl`` or ``.parquet`` with ``file_name``.

The metadata lies in the folder itself, or in one sub folder a split (``train/``, ``validation/``, ``test/``), with
paths relative to it. Rows that repeat a ``file_name`` are one picture with several captions.
"""

from pathlib import Path

from imagedex.corpora.forms.tables import (
    choose_caption_columns,
    choose_image_column,
    is_path,
    pictures_of,
    read_table,
)
from imagedex.corpora.paths import require_folder
from imagedex.corpora.schema import FormContents
from imagedex.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# The names that datasets understands in its folders, and what it calls them.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def find(folder: Path) -> Path | None:
    """``folder``, when it or a split's folder in it holds a metadata file."""
    return folder if _metadata_files(folder) else None


def read(
    folder: Path, *, image_dir: str | None = None, image_column: str | None = None, caption_column: str | None = None
) -> FormContents:
    """Reads the metadata of each split; ``image_id`` is relative to ``folder`` (``train/0001.jpg``).

    Raises:
        UserError: two metadata files for one split, no image or caption column, or no train split.
    """
    root = require_folder(image_dir, "--image_dir") if image_dir else folder
    splits = {}
    for split, files in _metadata_files(folder).items():
        if len(files) > 1:
            raise UserError(f"{folder}: several metadata files for the {split} split: {', '.join(map(str, files))}")
        file = files[0]
        table = read_table(file, "metadata")
        image = choose_image_column(
            table.features, image_column or ("file_name" if "file_name" in table.features else None), str(file)
        )
        if not is_path(table.features[image]):
            raise UserError(f"{file}: column {image!r} holds no file names")
        captions = choose_caption_columns(table.features, caption_column, str(file))
        splits[split] = pictures_of(table, image, captions, root if image_dir else file.parent, root, str(file))
    if "train" not in splits:
        raise UserError(f"{folder} has metadata for {', '.join(splits)} but none for train")
    return FormContents(f"imagefolder with {file.name}", splits)


def _metadata_files(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    places = {folder: "train"}
    for name, split in SPLIT_FOLDERS.items():
        places[folder / name] = split
    for place, split in places.items():
        for name in METADATA:
            if (place / name).is_file():
                found.setdefault(split, []).append(place / name)
    return found
