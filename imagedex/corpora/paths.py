"""Pictures on disk: where a caption file's pictures lie, and what a picture's ``image_id`` is."""

import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import PIL.Image

from imagedex.corpora.schema import Picture, listed
from imagedex.errors import UserError

# The names under which Flickr8k, Flickr30k and their mirrors unpack, tried in this order below the corpus's folder.
IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k_images",
    "flickr30k-images",
    "flickr30k_images/flickr30k_images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "",
)


@lru_cache(maxsize=1)
def image_extensions() -> frozenset[str]:
    """The file extensions that Pillow can open as pictures, lower case with the dot."""
    return frozenset(
        extension for extension, form in PIL.Image.registered_extensions().items() if form in PIL.Image.OPEN
    ) - {".pdf", ".mpg", ".mpeg"}


def is_picture(name: str | os.PathLike) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """POSIX paths, relative to ``folder``, of all pictures in it and below, sorted; hidden files and folders aside."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in names if not name.startswith(".") and is_picture(name)]
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def read_json(file: Path) -> object:
    """What a JSON file holds; UserError when it is no JSON."""
    try:
        with open(file, encoding="utf-8") as content:
            return json.load(content)
    except ValueError as error:  # malformed, or not UTF-8
        raise UserError(f"{file} is no valid JSON: {error}") from error


def require_folder(folder: str | os.PathLike, flag: str) -> Path:
    """``folder`` as a Path; UserError that names ``flag`` when it is missing, not a folder, or empty."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(f"{flag} {folder}: there is no such folder")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: this is a file, a folder is needed")
    if not any(folder.iterdir()):
        raise UserError(f"{flag} {folder}: the folder is empty")
    return folder


def _best_root(names: Sequence[str], candidates: Iterable[Path], sample: int = 100) -> Path | None:
    names = list(dict.fromkeys(names))[:sample]
    candidates = list(dict.fromkeys(candidates))
    hits = [sum((folder / name).is_file() for name in names) for folder in candidates]
    return candidates[hits.index(max(hits))] if any(hits) else None


def find_image_root(names: Sequence[str], candidates: Sequence[Path], asked_by: str, flag: str = "--image_dir") -> Path:
    """The candidate folder that holds most of the first hundred names (the earlier one when equal).

    Raises:
        UserError: none of them is in any candidate.
    """
    root = _best_root(names, candidates)
    if root is None:
        looked = [str(folder) for folder in dict.fromkeys(candidates) if folder.is_dir()] or [str(candidates[0])]
        raise UserError(
            f"{asked_by} names pictures that are not there ({listed(list(dict.fromkeys(names)), 3)}); looked in "
            f"{listed(looked)}; say where they are with {flag}"
        )
    return root


def _usual_folders(folder: Path, image_dir: str | None) -> list[Path]:
    """Where a corpus's pictures may lie: below its own folder or beside it, or below ``image_dir`` when it is given."""
    if image_dir:
        base = require_folder(image_dir, "--image_dir")
        return [base, *(base / below for below in IMAGE_FOLDERS)]
    return [*(folder / below for below in IMAGE_FOLDERS), folder.parent, folder.parent / "images"]


def usual_root(names: Sequence[str], folder: Path, image_dir: str | None) -> Path | None:
    """The usual folder that holds the pictures, or None."""
    return _best_root(names, _usual_folders(folder, image_dir))


def corpus_image_root(names: Sequence[str], folder: Path, image_dir: str | None, asked_by: str) -> Path:
    """As :func:`find_image_root`, among the usual folders."""
    return find_image_root(names, _usual_folders(folder, image_dir), asked_by)


def picture_at(root: Path, name: str, captions: Sequence[str], source_id: str = "", asked_by: str = "") -> Picture:
    """The record of picture ``name``, a path relative to ``root`` (or absolute, but then below ``root``).

    Raises:
        UserError: the picture lies outside ``root``, so that it has no ``image_id``.
    """
    root = os.path.abspath(root)
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(os.path.join(root, "")):
        raise UserError(
            f"{asked_by or 'the corpus'} names {name}, which is not below {root}; "
            "give the folder that holds all its pictures with --image_dir"
        )
    return Picture(Path(path).relative_to(root).as_posix(), path, list(captions), source_id)
