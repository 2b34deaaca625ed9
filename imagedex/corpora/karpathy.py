"""Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json``, ``dataset_flickr30k.json`` (cs.stanford.edu/people/karpathy).

``{"dataset": "coco", "images": [{"filepath": "val2014", "filename": "COCO_val2014_....jpg", "cocoid": 391895, "imgid": 0,
"split": "test", "sentences": [{"raw": "...", ...}, ...]}, ...]}``; Flickr's pictures have no ``filepath``. The split
``restval`` (COCO validation pictures that Karpathy trains on) is joined to train.
"""

import logging
from pathlib import Path

from imagedex.corpora.paths import corpus_image_root, picture_at, read_json
from imagedex.corpora.schema import FormContents, Picture
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def find(folder: Path) -> Path | None:
    """The one ``dataset_*.json`` in ``folder``, or ``folder`` itself when there are several to choose from."""
    files = _files(folder)
    return (files[0] if len(files) == 1 else folder) if files else None


def read(found: Path, *, config_name: str | None = None, image_dir: str | None = None) -> FormContents:
    """Reads ``found``, or in a folder of several the one that ``config_name`` names (``coco`` for dataset_coco.json).

    ``image_id`` is ``filepath/filename`` (``val2014/COCO_val2014_000000391895.jpg``), ``source_id`` the cocoid or imgid.

    Raises:
        UserError: the file is of another form, names an unknown split, or the pictures cannot be found.
    """
    file = _chosen(found, config_name) if found.is_dir() else found
    images = read_json(file).get("images")
    if not images:
        raise UserError(f"{file} holds no pictures")
    try:
        rows = [
            (image["split"], _name(image), [sentence["raw"] for sentence in image["sentences"]], _source(image))
            for image in images
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not Karpathy's form: a picture without {error}; expected are split, filename and sentences with raw"
        ) from error
    unknown = sorted({split for split, *_ in rows} - set(SPLITS))
    if unknown:
        raise UserError(f"{file} has unknown splits {', '.join(unknown)}; known are {', '.join(SPLITS)}")
    root = corpus_image_root([name for _, name, *_ in rows], file.parent, image_dir, str(file))
    splits: dict[str, list[Picture]] = {}
    for split, name, captions, source in rows:
        splits.setdefault(SPLITS[split], []).append(picture_at(root, name, captions, source, asked_by=str(file)))
    if "train" not in splits:
        raise UserError(f"{file} has no train split; its splits are {', '.join(splits)}")
    restval = sum(split == "restval" for split, *_ in rows)
    if restval:
        logger.info("%s: %d restval pictures joined to train", file.name, restval)
    return FormContents(
        f"Karpathy {file.name}", {split: splits[split] for split in ("train", "validation", "test") if split in splits}
    )


def _files(folder: Path) -> list[Path]:
    # dataset_dict.json and dataset_info.json belong to datasets.
    return sorted(
        file for file in folder.glob("dataset_*.json") if file.name not in ("dataset_dict.json", "dataset_info.json")
    )


def _chosen(folder: Path, config_name: str | None) -> Path:
    files = {file.stem.removeprefix("dataset_"): file for file in _files(folder)}
    if config_name not in files:
        raise UserError(
            f"{folder} holds several Karpathy files; choose one with --dataset_config_name: {', '.join(files)}"
        )
    return files[config_name]


def _name(image: dict) -> str:
    return f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]


def _source(image: dict) -> str:
    return str(image.get("cocoid", image.get("imgid", "")))
