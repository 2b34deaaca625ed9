"""Samples of tar shards in webdataset's layout, read by our own hand: pictures of several kinds may stand in one shard.

Only pictures, texts and JSON are looked at; whatever else a shard holds (arrays, pickles) is passed over unread.
"""

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from datasets.utils.file_utils import xopen

from imagedex.corpora.forms.tables import CAPTION_NAMES
from imagedex.corpora.paths import is_picture
from imagedex.corpora.reading import parse_json
from imagedex.corpora.schema import clean_captions, cut, listed
from imagedex.errors import LocalUserError, UserError

_TEXTS = ("txt", "text", "caption", "cap")
_LOOKED_AT = 20  # samples from whose endings is told what a shard holds


class Choice(NamedTuple):
    """Which files of a sample are the picture and the captions.

    Attributes:
        image: the ending that is taken where a sample has it, otherwise any picture's is; the only one if ``strict_image``.
        caption: ``txt``, ``json`` or ``json.caption``; the only one if ``strict_caption``.
    """

    image: str
    caption: str
    strict_image: bool = False
    strict_caption: bool = False


def samples(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, ending -> content) of each sample: the files one after another that share a name up to its first dot."""
    with xopen(shard, "rb") as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        current, files = "", {}
        for member in tar:
            folder, name = posixpath.split(member.name)
            if not member.isfile() or name.startswith("."):
                continue
            stem, _, ending = name.partition(".")
            key, ending = posixpath.join(folder, stem), ending.lower()
            if key != current and files:
                yield current, files
                files = {}
            current = key
            if _is_read(ending):
                files[ending] = tar.extractfile(member).read()
            else:
                files.setdefault(ending, b"")
        if files:
            yield current, files


def _is_read(ending: str) -> bool:
    return ending == "json" or ending in _TEXTS or ending.endswith(".txt") or is_picture(f"x.{ending}")


def choose(shards: Iterable[str], where: str, image: str | None, caption: str | None) -> Choice:
    """Tells from the first samples which files are pictures and captions. Raises `UserError`: there are none."""
    seen: dict[str, bytes] = {}
    for shard in shards:
        for number, (_, files) in enumerate(samples(shard)):
            seen = files | seen
            if number == _LOOKED_AT:
                break
        if seen:
            break
    if not seen:
        raise UserError(f"{where}: there is no sample in it")
    columns = listed(sorted(_columns(seen)), 20)
    pictures = [ending for ending in seen if ending == (image or ending) and is_picture(f"x.{ending}")]
    if not pictures:
        wanted = f" {image!r}" if image else ""
        raise UserError(f"{where} has no image column{wanted}; its columns are {columns}; name one with --image_column")
    source = _source(seen, caption)
    if source is None:
        wanted = f" {caption!r}" if caption else ""
        raise UserError(
            f"{where} has no caption column{wanted}; its columns are {columns}; name one with --caption_column"
        )
    return Choice(pictures[0], source, bool(image), bool(caption))


def _columns(files: dict[str, bytes]) -> list[str]:
    """The endings of a sample's files, and of a json that holds a mapping its keys: ``json.caption``."""
    content = parse_json(files["json"].decode(errors="replace"), "a sample's json") if "json" in files else None
    inside = [f"json.{key}" for key in content] if isinstance(content, dict) else []
    return [ending for ending in files if ending != "json" or not inside] + inside


def _source(files: dict[str, bytes], wanted: str | None = None) -> str | None:
    """Where the captions of a sample are: ``json.caption``, ``json`` (a text or a list itself) or the ending of a text file."""
    content = parse_json(files["json"].decode(errors="replace"), "a sample's json") if "json" in files else None
    if wanted:
        key = wanted.removeprefix("json.")
        inside = isinstance(content, dict) and key in content
        return wanted if wanted in files else (f"json.{key}" if inside else None)
    if isinstance(content, dict):
        keys = {key.lower(): key for key, value in content.items() if isinstance(value, str | list)}
        known = next((keys[name] for name in CAPTION_NAMES if name in keys), None)
        if known:
            return f"json.{known}"
    elif isinstance(content, str | list):
        return "json"
    return next((ending for ending in _TEXTS if ending in files), None)


def rows(shards: list[str], image: str, caption: str, strict_image: bool, strict_caption: bool) -> Iterator[dict]:
    """A row a caption; see `PictureStream`. Args: shards, which `datasets` shares out; the others, of a `Choice`."""
    for shard in shards:
        for key, files in samples(shard):
            sample = f"{key} of {os.path.basename(shard) if '://' in shard else shard}"
            ending = image if image in files else _any_picture(files, strict_image)
            stored = {"bytes": files[ending], "path": f"{key}.{ending}"} if ending else None
            source = caption if strict_caption or _has(files, caption) else _source(files) or caption
            for text in _captions(files, source, sample):
                yield {"image": stored, "caption": text, "sample": sample}


def _any_picture(files: dict[str, bytes], strict: bool) -> str | None:
    return None if strict else next((ending for ending in files if is_picture(f"x.{ending}")), None)


def _has(files: dict[str, bytes], source: str) -> bool:
    return source.partition(".")[0] in files or source in files


def _captions(files: dict[str, bytes], source: str, sample: str) -> list[str | None]:
    """The captions of a sample, without empty ones; [None] when it has none."""
    ending, _, key = ("json", "", source[5:]) if source.startswith("json.") else (source, "", "")
    try:
        text = files.get(ending, b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LocalUserError(f"the caption of sample {sample} is not UTF-8 text ({error.reason})") from error
    if ending != "json":
        return captions_of(text.replace("\r\n", "\n").split("\n"), sample)
    value = parse_json(text, f"the json of sample {sample}") if text.strip() else None
    return captions_of(value.get(key) if key and isinstance(value, dict) else value, sample)


def captions_of(value: object, sample: str) -> list[str | None]:
    """A caption or a list of them as a list without empty ones; [None] where there is none. Raises `LocalUserError`."""
    values = value if isinstance(value, list) else [value]
    if not all(text is None or isinstance(text, str) for text in values):
        raise LocalUserError(f"the caption of sample {sample} is no text or list of texts: {cut(str(value), 80)}")
    try:
        return clean_captions(values)[0] or [None]
    except UserError as error:
        raise LocalUserError(f"sample {sample}: {error}") from error
