"""BLIP's caption files (arXiv 2201.12086): ``flickr30k_train.json`` with its ``_val`` and ``_test``, likewise for COCO.

Train rows have one caption each, ``{"image": "flickr30k-images/1000092795.jpg", "caption": "...", "image_id": ...}``;
the rows of val and test have the list of their captions, ``{"image": "...", "caption": ["...", ...]}``.
"""

from pathlib import Path, PurePosixPath

from imagedex.corpora.paths import corpus_image_root, picture_at, read_json, usual_root
from imagedex.corpora.schema import FormContents, Picture, merge_by_picture
from imagedex.errors import UserError

STEMS = ("flickr30k", "coco_karpathy", "coco")
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def find(folder: Path) -> Path | None:
    """The train file of this form in ``folder``."""
    return next((folder / f"{stem}_train.json" for stem in STEMS if (folder / f"{stem}_train.json").is_file()), None)


def read(file: Path, *, image_dir: str | None = None) -> FormContents:
    """Reads the train file and the ``_val`` and ``_test`` files beside it.

    ``image_id`` is the path as written, relative to the folder that holds ``flickr30k-images``; where the pictures lie
    in a folder of another name, it is the file name.

    Raises:
        UserError: a file is of another form, or the pictures cannot be found.
    """
    rows = {}
    for ending, split in SPLITS.items():
        part = file.with_name(file.name.replace("_train.json", f"_{ending}.json"))
        if part.is_file():
            rows[split] = _read_rows(part)
    root, name_of = _locate([name for name, *_ in rows["train"]], file, image_dir)
    splits: dict[str, list[Picture]] = {
        split: merge_by_picture(
            picture_at(root, name_of(name), captions, source, asked_by=str(file)) for name, captions, source in part
        )
        for split, part in rows.items()
    }
    return FormContents(f"BLIP {file.name}", splits)


def _read_rows(file: Path) -> list[tuple[str, list[str], str]]:
    """(picture, captions, source id) of each row."""
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is not BLIP's form: a list of rows with image and caption is expected")
    try:
        return [
            (
                row["image"],
                [row["caption"]] if isinstance(row["caption"], str) else list(row["caption"]),
                str(row.get("image_id", "")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not BLIP's form: a row without {error}; expected are image and caption") from error


def _locate(names: list[str], file: Path, image_dir: str | None):
    """The image root, and how a written name becomes a path below it."""
    root = usual_root(names, file.parent, image_dir)
    if root is not None:
        return root, lambda name: name
    short = [PurePosixPath(name).name for name in names]
    return corpus_image_root(short, file.parent, image_dir, str(file)), lambda name: PurePosixPath(name).name
