"""Which pictures a folder holds now, and what has changed of them since they were last looked at."""

import datetime
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from PIL import ExifTags, Image

from imagedex.encoding.store import KEY_BYTES
from imagedex.encoding.vectors import progress_bar
from imagedex.errors import UserError
from imagedex.gallery.catalog import SCHEMA
from imagedex.gallery.pictures import PHONES, READS_PHONES, WITHIN, content_of, hash_of, of_the_machine, reason
from imagedex.gallery.rows import SUFFIXES

NOT_READ = bytes(KEY_BYTES)  # the key of a file that could not be opened
AT_ONCE = 8192  # files whose reading is under way or waits for its turn
NOT_LOOKED_AT = -1  # size of a picture within a table, before it is read
ROWS_AT_ONCE = 64  # pictures of tables, which are in memory then
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations in which width and height change places
LEADS_NOWHERE = "(a link that leads nowhere)"
NOT_UTF8 = "(a name that is not UTF-8)"


@dataclass
class Place:
    """A file that may hold a picture: its image_id, where it lies, its size and time. Of a picture within a table the size is not
    known before it is read."""

    image_id: str
    path: str
    root: str
    bytes: int
    changed: int
    captions: list[str] = field(default_factory=list)
    said: dict = field(default_factory=dict)  # what else lies beside it, see `imagedex.gallery.columns`

    def is_as(self, row: dict) -> bool:
        """Whether a row of the catalog is of this very file, unchanged by its size and time."""
        return (row["path"], row["changed"]) == (self.path, self.changed) and self.bytes in (
            row["bytes"],
            NOT_LOOKED_AT,
        )


@dataclass
class Changes:
    """What an update found, by image_id."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # and why; of those that were looked at this time
    passed_over: dict[str, int] = field(default_factory=dict)  # ending -> files that are no pictures here
    unchanged: int = 0

    def said_anew(self, image_ids: Sequence[str]) -> None:
        """Pictures of which the source says something else; those that are new are known."""
        known = {*self.added, *self.changed}
        more = [image_id for image_id in image_ids if image_id not in known]
        self.changed, self.unchanged = sorted([*self.changed, *more]), self.unchanged - len(more)
        self.added.sort()

    @property
    def line(self) -> str:
        parts = [f"{len(own)} {name}" for name in ("added", "changed", "removed") if (own := getattr(self, name))]
        return ", ".join([*parts, f"{self.unchanged} unchanged", f"{len(self.unreadable)} unreadable"])


def describe_all(places: Sequence[Place], threads: int, progress: bool) -> Iterator[dict]:
    """Rows of the catalog. Reading and hashing leave Python's lock, so threads help; tables are read forwards, by one."""
    files = [place for place in places if place.bytes >= 0]
    rows = sorted((place for place in places if place.bytes < 0), key=lambda place: place.path)
    with ThreadPoolExecutor(threads) as pool, progress_bar(len(places), "files", progress, "reading") as bar:
        for start in range(0, len(files), AT_ONCE):
            for row in pool.map(describe, files[start : start + AT_ONCE]):
                bar.update(1)
                yield row
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            for row in pool.map(describe, part, [read(place) for place in part]):
                bar.update(1)
                yield row


def read(place: Place) -> bytes | OSError:
    try:
        return content_of(place.path)
    except OSError as error:
        return error


def describe(place: Place, content: bytes | OSError | None = None) -> dict:
    """A row of the catalog: the picture's hash, size and date, from its head. That its pixels can be read is seen later. Args:
    content, where it was read already, or the error."""
    row = {
        "image_id": place.image_id,
        "path": place.path,
        "root": place.root,
        "folder": "" if (folder := Path(place.image_id).parent.as_posix()) == "." else folder,
        "bytes": max(place.bytes, 0),
        "changed": place.changed,
        "unreadable": "",
    }
    taken = None
    try:
        content = read(place) if content is None else content
        if isinstance(content, OSError):
            raise content
        row["key"], row["bytes"] = hash_of(content), len(content)
        with Image.open(io.BytesIO(content)) as picture:
            exif = picture.getexif()
            width, height = picture.size
            turned = exif.get(ExifTags.Base.Orientation) in SIDEWAYS
            row["width"], row["height"] = (height, width) if turned else (width, height)
            taken = date_of(exif)
    except Exception as error:  # a decoder raises what it likes
        if of_the_machine(error):
            raise
        row["unreadable"] = reason(error)
        row.setdefault("key", NOT_READ)  # the file could not be opened: it is tried again the next time
    row["date"] = taken or datetime.datetime.fromtimestamp(place.changed // 10**9)
    return row


def date_of(exif) -> datetime.datetime | None:
    """When the picture was taken, as the camera wrote it (its local time)."""
    text = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime)
    try:
        return datetime.datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None


def as_table(rows: Sequence[dict]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def check_source(source: str | Path) -> Path:
    """Absolute. Raises `UserError`: neither a folder nor a list of files, an archive or a table."""
    path = Path(os.path.abspath(Path(source).expanduser()))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{source!r}: the name is not UTF-8; rename it") from None
    if not path.exists():
        raise UserError(f"{source}: there is no such folder or file")
    if path.is_file() and path.suffix.lower() not in (".txt", ".tar", *SUFFIXES):
        raise UserError(
            f"{source}: give a folder of pictures, a .txt with a path a line, a .tar archive, or a .parquet or .arrow table"
        )
    return path


def places_in(root: Path, prefix: str) -> tuple[list[Place], dict[str, int]]:
    """The pictures of a source, and how many other files there are of each ending."""
    others: dict[str, int] = {}
    if root.is_file() and root.suffix.lower() == ".tar":
        return list(in_archive(root, prefix, others)), others
    places = []
    for name, path in files_below(root, others) if root.is_dir() else listed_in(root):
        try:
            status = os.stat(path) if is_utf8(name) else None
        except OSError:
            count(others, LEADS_NOWHERE)
            continue
        if status is None:
            count(others, NOT_UTF8)
            continue
        places.append(Place(prefix + name, path, str(root), status.st_size, status.st_mtime_ns))
    return places, others


def is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def count(others: dict[str, int], ending: str) -> None:
    others[ending] = others.get(ending, 0) + 1


def extensions() -> frozenset[str]:
    """Endings of pictures. Those of phones are read with pillow-heif, the extra `heic`, where it is installed."""
    from imagedex.corpora.paths import image_extensions  # brings datasets, which a search does not wait for

    return image_extensions() | set(PHONES if READS_PHONES else ())


def files_below(folder: Path, others: dict[str, int]) -> list[tuple[str, str]]:
    """(path relative to the folder, absolute path) of every picture in it and below, sorted; hidden ones aside; each folder
    once, whatever links lead to it."""
    from imagedex.corpora.paths import list_files

    found, endings = [], extensions()
    for name in list_files(folder):
        ending = os.path.splitext(name)[1].lower()
        if ending in endings:
            found.append((name, os.path.join(folder, name)))
        else:
            count(others, ending)
    return found


def listed_in(file: Path) -> list[tuple[str, str]]:
    """As `files_below`, of a list: a path a line, relative to the list's folder or absolute."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error}") from error
    found = {}
    for line in dict.fromkeys(lines):
        name, path = Path(line).as_posix().lstrip("/"), os.path.abspath(file.parent / line)
        if found.setdefault(name, path) != path:
            raise UserError(f"{file}: {found[name]} and {path} would both be called {name}")
    missing = [path for path in found.values() if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{file} names {len(missing)} files that are not there, the first is {missing[0]}")
    return sorted(found.items())


def in_archive(file: Path, prefix: str, others: dict[str, int]) -> Iterator[Place]:
    """Pictures of a tar archive where they lie in it; a json or a text of the same name beside one (webdataset's form, and
    img2dataset's) says its captions, the json also the user's columns."""
    changed, endings, beside, pictures = os.stat(file).st_mtime_ns, extensions(), {".txt": {}, ".json": {}}, {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                stem, ending = os.path.splitext(member.name)
                if not is_utf8(member.name):
                    count(others, NOT_UTF8)
                elif member.isfile() and ending.lower() in endings:
                    if member.name in pictures:  # as when it is unpacked, the last one stays
                        count(others, "(a name for the second time)")
                    pictures[member.name] = member
                elif member.isfile() and ending.lower() in beside:
                    beside[ending.lower()][stem] = archive.extractfile(member).read().decode("utf-8", "replace").strip()
                elif not member.isdir():  # links, too
                    count(others, ending.lower() if member.isfile() else "(a link)")
            whole = os.path.getsize(file) - archive.offset >= 1024  # a broken head ends the reading without a word
            with open(file, "rb") as content:
                content.seek(archive.offset)
                if not whole or content.read(1024).strip(b"\0"):
                    raise tarfile.TarError("it ends before its end, or is damaged within")
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar archive: {reason(error)}") from error
    for name, member in sorted(pictures.items()):
        stem = os.path.splitext(name)[0]
        path = f"{file}{WITHIN}{member.offset_data}+{member.size}"
        captions, said = said_beside(beside[".txt"].get(stem, ""), beside[".json"].get(stem, ""), others)
        yield Place(prefix + member.name, path, str(file), member.size, changed, captions, said)


def said_beside(text: str, code: str, others: dict[str, int]) -> tuple[list[str], dict]:
    """Captions, and the other values of a json that are no lists or mappings. A json that is none is counted."""
    captions = [line.strip() for line in text.split("\n") if line.strip()]
    try:
        said = json.loads(code) if code else {}
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        count(others, "(a json that is no JSON object)")
        said = {}
    for name in ("captions", "caption"):
        values = said.get(name)
        values = values if isinstance(values, list) else [values]
        captions += [value.strip() for value in values if isinstance(value, str) and value.strip()]
    said = {name: value for name, value in said.items() if isinstance(value, str | int | float)}
    return list(dict.fromkeys(captions)), said
