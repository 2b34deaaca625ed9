"""Pictures by their place: a file, a member of a tar archive, `shard.tar::offset+size`, or a row of a table, see `rows`."""

import errno
import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from imagedex.encoding.store import KEY_BYTES
from imagedex.errors import UserError
from imagedex.gallery.rows import content_at
from imagedex.modeling.picture_reading import as_rgb

PHONES = (".heic", ".heif")
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
WITHIN = "::"

try:  # here, so that every process that opens pictures can read those of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
    READS_PHONES = True
except ImportError:
    READS_PHONES = False


def content_of(path: str) -> bytes:
    archive, within, place = path.rpartition(WITHIN)
    if not within or os.path.exists(path):
        return Path(path).read_bytes()
    if ":" in place:
        return content_at(archive, place)
    offset, size = map(int, place.split("+"))
    with open(archive, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{archive} ends within it")
    return content


def hash_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def open_picture(path: str) -> Image.Image:
    """As a viewer shows it: upright, RGB."""
    return as_rgb(Image.open(io.BytesIO(content_of(path))))


def reason(error: BaseException) -> str:
    """In one line, the same each time: without the address that an object has in memory."""
    text = re.sub(r"\s*<\S+ object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return text[:200] or type(error).__name__


def of_the_machine(error: BaseException) -> bool:
    """Whether it says nothing of the picture: too many open files, no memory."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in OF_THE_MACHINE)


class PlacedPictures(torch.utils.data.Dataset):
    """(picture, None), or (None, what is wrong with it); decoded when asked for, in a DataLoader's workers.

    Args: places, as above; a picture of Pillow is taken as it is.
    """

    def __init__(self, places: Sequence[str | Path | Image.Image]):
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int):
        place = self.places[row]
        try:
            return (as_rgb(place) if isinstance(place, Image.Image) else open_picture(str(place))), None
        except Exception as error:  # a decoder raises what it likes
            if of_the_machine(error):
                raise
            return None, reason(error)


def readable_picture(place: str | Path | Image.Image) -> Image.Image:
    """A picture that somebody asks with. Raises `UserError` for one that cannot be read."""
    picture, broken = PlacedPictures([place])[0]
    if broken:
        raise UserError(f"cannot read the picture {'' if isinstance(place, Image.Image) else place}: {broken}")
    return picture


class IndexedPictures(torch.utils.data.Dataset):
    """As `PlacedPictures`, of pictures whose content was looked at: keys (N, 16) are its hashes. Raises `UserError` for a file
    that is another one by now, or that cannot be opened: a vector belongs to a content."""

    def __init__(self, places: Sequence[str], keys: np.ndarray):
        self.places, self.keys = places, keys

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int):
        place = self.places[row]
        try:
            content = content_of(place)
        except OSError as error:
            raise UserError(
                f"{place} cannot be read any more ({reason(error)}); give the same command again"
            ) from error
        if hash_of(content) != self.keys[row].tobytes():
            raise UserError(f"{place} has changed while it was indexed; give the same command again")
        try:
            return as_rgb(Image.open(io.BytesIO(content))), None
        except Exception as error:
            if of_the_machine(error):
                raise
            return None, reason(error)
