"""COCO's own annotations (arXiv 1504.00325): ``annotations/captions_train2017.json`` and ``captions_val2017.json``.

``{"images": [{"id": 391895, "file_name": "000000391895.jpg", ...}], "annotations": [{"image_id": 391895, "caption": "..."}]}``.
Other corpora write their captions in this form too; any file named ``captions_*.json`` or ``*_captions.json`` is read.
"""

import logging
import os
import re
from pathlib import Path

from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.paths import corpus_image_root, on_disk, picture_at, require_folder
from imagedex.corpora.reading import name_in, read_json
from imagedex.corpora.schema import FormContents, Picture, counted, cut, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

FILES = ("captions_*.json", "*_captions.json")


def find(folder: Path) -> Path | None:
    """The folder with the annotation files: ``folder`` or its ``annotations``."""
    return next((place for place in (folder, folder / "annotations") if _files(place)), None)


def read(found: Path, *, config_name: str | None = None, image_dir: str | None = None) -> FormContents:
    """Reads the annotations in a folder, or one file of them.

    Args:
        config_name: the year, where the folder holds several (``2017``).

    ``image_id`` is ``train2017/000000391895.jpg`` where the pictures lie in such folders, else the file name; ``source_id``
    is COCO's id.

    Raises:
        UserError: a file of another form, several years, no train split, or pictures that cannot be found.
    """
    files = _chosen(found, config_name) if found.is_dir() else {"train": found}
    base = next(iter(files.values())).parent
    base = base.parent if base.name == "annotations" else base
    rows = {split: _read_rows(file) for split, file in files.items()}
    splits = {split: _located(rows[split], file, base, image_dir) for split, file in files.items()}
    return FormContents(f"COCO {', '.join(file.name for file in files.values())}", splits)


def _files(folder: Path) -> list[Path]:
    return sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})


def _chosen(folder: Path, config_name: str | None) -> dict[str, Path]:
    """Split -> file."""
    files = [file for file in _files(folder) if not config_name or config_name in file.name]
    chosen: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        chosen.setdefault(next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train"), []).append(file)
    several = [file.name for found in chosen.values() if len(found) > 1 for file in found]
    if several or not files:
        names = listed([file.name for file in _files(folder)])
        raise UserError(
            f"{folder} holds {names}: choose with --dataset_config_name the year, or a part of the names that only the wanted "
            "ones have"
        )
    if "train" not in chosen:
        raise UserError(
            f"{folder} holds captions for {', '.join(chosen)} but none for train; give one file itself as --dataset_name"
        )
    return {split: found[0] for split, found in chosen.items()}


def _read_rows(file: Path) -> list[tuple[str, list[str], str]]:
    """(file name, captions, id) of each picture."""
    content = read_json(file)
    try:
        names = {image["id"]: name_in(image["file_name"], file) for image in content["images"]}
        captions: dict[object, list[str]] = {image: [] for image in names}
        unknown = [row["image_id"] for row in content["annotations"] if row["image_id"] not in names]
        for row in content["annotations"]:
            captions.get(row["image_id"], []).append(row["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not COCO's form ({cut(str(error), 80)}): images with id and file_name, annotations with image_id and "
            "caption are expected; other tables are given with --train_file"
        ) from error
    if len(names) < len(content["images"]):
        raise UserError(
            f"{file}: {counted(len(content['images']) - len(names), 'picture')} with an id that another one has"
        )
    if not names:
        raise UserError(f"{file} names no picture")
    if unknown:
        what = counted(len(unknown), "caption")
        raise UserError(
            f"{file}: {what} of pictures that it does not list: image_id {listed(list(dict.fromkeys(unknown)), 5)}"
        )
    return [(name, captions[image], str(image)) for image, name in names.items()]


def _located(rows: list[tuple], file: Path, base: Path, image_dir: str | None) -> list[Picture]:
    """The pictures, in a folder of the split's own (``train2017``) or all in one."""
    part = re.sub(r"captions|_", "", file.stem)
    roots = [require_folder(image_dir, "--image_dir")] if image_dir else []
    roots += [] if image_dir else [base, base / "images"]
    for root in roots:
        if any(os.path.isfile(on_disk(root / part, str(name))) for name, *_ in rows[:100]):
            return [picture_at(root, f"{part}/{name}", *rest, asked_by=str(file)) for name, *rest in rows]
    root = corpus_image_root([name for name, *_ in rows], base, image_dir, str(file))
    return [picture_at(root, name, *rest, asked_by=str(file)) for name, *rest in rows]
