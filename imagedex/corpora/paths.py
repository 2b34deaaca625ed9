"""Pictures on disk: where a caption file's pictures lie, and what a picture's ``image_id`` is."""

import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import PIL.Image

from imagedex.corpora.schema import Picture, counted, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

# The names under which Flickr8k, Flickr30k and their mirrors unpack, tried in this order below the corpus's folder.
IMAGE_FOLDERS = (
    "images",
    "Images",
    "flickr30k_images",
    "flickr30k-images",
    "flickr30k_images/flickr30k_images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "imgs",
    "",
)
# What lies beside the pictures of a corpus anyway.
_BESIDE_PICTURES = (".txt", ".caption", ".token", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".md", ".tar", ".zip")


@lru_cache(maxsize=1)
def image_extensions() -> frozenset[str]:
    """The file extensions that Pillow can open as pictures, lower case with the dot."""
    return frozenset(
        extension for extension, form in PIL.Image.registered_extensions().items() if form in PIL.Image.OPEN
    ) - {".pdf", ".mpg", ".mpeg"}


def is_picture(name: str | os.PathLike) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def list_files(folder: str | os.PathLike) -> list[str]:
    """POSIX paths, relative to ``folder``, of all files in it and below, sorted; hidden files and folders aside.

    Links to folders are followed, after the folders themselves, and each real folder is read once: links that lead back up,
    or to a folder that has been read, are passed over.

    Raises:
        UserError: a folder that cannot be listed.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    for start in waiting:  # grows by the links that are met
        for parent, folders, names in os.walk(start, onerror=_cannot_list):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [link for name in folders if os.path.islink(link := os.path.join(parent, name))]
            found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """As :func:`list_files`, of the pictures alone. Raises `UserError` for a picture whose name is not UTF-8, too."""
    names = [name for name in list_files(folder) if is_picture(name)]
    _check_names(names, folder)
    return names


def _cannot_list(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be listed: {error.strerror}") from error


def _check_names(names: Sequence[str], folder: str | os.PathLike) -> None:
    odd = [name for name in names if not name.isascii() and os.fsencode(name).decode(errors="ignore") != name]
    if odd:
        what = "a file name that is" if len(odd) == 1 else f"{len(odd)} file names that are"
        raise UserError(f"{folder}: {what} not UTF-8: {listed(odd, 3)}; rename them")


def report_unused(root: str, used: Iterable[str], files: Sequence[str]) -> None:
    """Says which pictures below ``root`` no caption names, and which files are no pictures by their ending."""
    rest = sorted({name for name in files if is_picture(name)} - set(used))
    if rest:
        logger.warning(
            "%s: %s without a row in the captions, not used: %s", root, counted(len(rest), "picture"), listed(rest)
        )
    report_passed_over(root, [name for name in files if not name.lower().endswith(_BESIDE_PICTURES)])


def report_passed_over(root: str | os.PathLike, files: Sequence[str]) -> None:
    """Says which files of a folder are no pictures by their ending."""
    others = [name for name in files if not is_picture(name)]
    if others:
        logger.info(
            "%s: %s passed over, no pictures by their ending: %s", root, counted(len(others), "file"), listed(others)
        )


def require_folder(folder: str | os.PathLike, flag: str) -> Path:
    """``folder`` as a Path; UserError that names ``flag`` when it is missing, not a folder, or empty."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise UserError(f"{flag} {folder}: there is no such folder")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: this is a file, a folder is needed")
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        _cannot_list(error)
    if empty:
        raise UserError(f"{flag} {folder}: the folder is empty")
    return folder


def on_disk(folder: str | os.PathLike, name: str) -> str:
    """The path of ``name`` below ``folder``, as the disk writes it where only Unicode's form differs (``é`` as one
    character or as two: file systems and tables disagree on it)."""
    place = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(place, name))
    if name.isascii() or os.path.exists(path) or not path.startswith(os.path.join(place, "")):
        return path
    for part in os.path.relpath(path, place).split(os.sep):
        there = os.path.join(place, part)
        place = there if os.path.exists(there) else os.path.join(place, _normal_names(place).get(_normal(part), part))
    return place


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _normal_names(folder: str) -> dict[str, str]:
    """Of each file in a folder: its name in Unicode's composed form -> as it is on the disk."""
    try:
        return _listing(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=16)
def _listing(folder: str, changed: int) -> dict[str, str]:
    """Args: changed, when the folder was last changed, so that another state of it is listed anew."""
    return {_normal(name): name for name in os.listdir(folder) if not name.isascii()}


def _best_root(names: Sequence[str], candidates: Iterable[Path], sample: int = 100) -> Path | None:
    names = list(dict.fromkeys(names))[:sample]
    candidates = list(dict.fromkeys(candidates))
    hits = [sum(os.path.isfile(on_disk(folder, name)) for name in names) for folder in candidates]
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
    path = on_disk(root, name)
    if not path.startswith(os.path.join(root, "")):
        raise UserError(
            f"{asked_by or 'the corpus'} names {name[:200]}, which is not below {root}; "
            "give the folder that holds all its pictures with --image_dir"
        )
    return Picture(Path(path).relative_to(root).as_posix(), path, list(captions), source_id)
