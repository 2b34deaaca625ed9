"""Karpathy's caption files, ``dataset_coco.json`` and likewise for Flickr8k and Flickr30k (arXiv 1412.2306); older
archives call each of them ``dataset.json``.

``{"dataset": "coco", "images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
"imgid": 0, "split": "test", "sentences": [{"raw": "...", ...}, ...]}, ...]}``; Flickr's pictures have no ``filepath``.
The split ``restval`` (pictures of COCO's validation half that are trained on) is joined to train.
"""

import logging
from pathlib import Path

from imagedex.corpora.paths import corpus_image_root, picture_at
from imagedex.corpora.reading import name_in, read_json
from imagedex.corpora.schema import FormContents, Picture, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

FILES = ("dataset_*.json", "dataset.json")
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def find(folder: Path) -> Path | None:
    """The one file of this form in ``folder``, or ``folder`` itself when there are several to choose from."""
    files = _files(folder)
    return (files[0] if len(files) == 1 else folder) if files else None


def read(found: Path, *, config_name: str | None = None, image_dir: str | None = None) -> FormContents:
    """Reads ``found``, or in a folder of several the one that ``config_name`` names (``coco`` for dataset_coco.json).

    ``image_id`` is ``val2014/COCO_val2014_000000391895.jpg`` for COCO, the file name for Flickr; ``source_id`` is the
    cocoid, or the imgid where there is none.

    Raises:
        UserError: the file is of another form, names an unknown split, or the pictures cannot be found.
    """
    file = _chosen(found, config_name) if found.is_dir() else found
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    if not images:
        raise UserError(f"{file} is not Karpathy's form: it lists no images")
    try:
        rows = [
            (
                image["split"],
                name_in(_name(image), file),
                [sentence["raw"] for sentence in image["sentences"]],
                _source(image),
            )
            for image in images
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not Karpathy's form (a picture without {error}); "
            "expected are split, filename and sentences with raw"
        ) from error
    unknown = sorted({str(split) for split, *_ in rows if not isinstance(split, str) or split not in SPLITS})
    if unknown:
        raise UserError(f"{file} has unknown splits {listed(unknown)}; known are {', '.join(SPLITS)}")
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
    files = [file for pattern in FILES for file in folder.glob(pattern)]
    return sorted(file for file in files if file.is_file() and _lists_images(file))


def _lists_images(file: Path) -> bool:
    """Others name their files so too (dataset_info.json of datasets); the beginning tells, the whole may be large."""
    with open(file, encoding="utf-8", errors="replace") as content:
        start = content.read(4096)
    return '"images"' in start or '"sentences"' in start


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
