"""BLIP's caption files (arXiv 2201.12086): ``flickr30k_train.json`` with its ``_val`` and ``_test``, likewise for COCO.

Train rows have one caption each, ``{"image": "flickr30k-images/1000092795.jpg", "caption": "...", "image_id": ...}``;
the rows of val and test have the list of their captions, ``{"image": "...", "caption": ["...", ...]}``.
"""

from pathlib import Path, PurePosixPath

from imagedex.corpora.paths import corpus_image_root, picture_at, usual_root
from imagedex.corpora.reading import name_in, read_json
from imagedex.corpora.schema import FormContents, Picture, merge_by_picture
from imagedex.errors import UserError

STEMS = ("flickr30k", "coco_karpathy")
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def find(folder: Path) -> Path | None:
    """The one train file of this form in ``folder``, or ``folder`` itself when there are several to choose from."""
    files = _train_files(folder)
    return (next(iter(files.values())) if len(files) == 1 else folder) if files else None


def read(found: Path, *, config_name: str | None = None, image_dir: str | None = None) -> FormContents:
    """Reads a train file and the ``_val`` and ``_test`` files beside it.

    ``found`` is the train file, or a folder of several, of which ``config_name`` names one (``coco_karpathy``).

    ``image_id`` is the path as written, relative to the folder that holds ``flickr30k-images``; where the pictures lie
    in a folder of another name, it is the file name.

    Raises:
        UserError: a file is of another form, or the pictures cannot be found.
    """
    file = _chosen(found, config_name) if found.is_dir() else found
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


def _train_files(folder: Path) -> dict[str, Path]:
    files = {stem: folder / f"{stem}_train.json" for stem in STEMS}
    return {stem: file for stem, file in files.items() if file.is_file()}


def _chosen(folder: Path, config_name: str | None) -> Path:
    files = _train_files(folder)
    if config_name not in files:
        raise UserError(f"{folder} holds several BLIP files; choose with --dataset_config_name: {', '.join(files)}")
    return files[config_name]


def _read_rows(file: Path) -> list[tuple[str, list[str], str]]:
    """(picture, captions, source id) of each row."""
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} is not BLIP's form: a list of rows with image and caption is expected")
    try:
        return [
            (
                name_in(row["image"], file),
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
