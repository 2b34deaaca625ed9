"""Pictures by their place: a file, or a member of a tar archive, `shard.tar::offset+size`."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from imagedex.modeling.picture_reading import as_rgb

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken files
WITHIN = "::"


def content_of(path: str) -> bytes:
    archive, within, place = path.rpartition(WITHIN)
    if not within or os.path.exists(path):
        return Path(path).read_bytes()
    offset, size = map(int, place.split("+"))
    with open(archive, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{archive} ends within it")
    return content


def open_picture(path: str) -> Image.Image:
    """As a viewer shows it: upright, RGB."""
    return as_rgb(Image.open(io.BytesIO(content_of(path))))


def reason(error: BaseException) -> str:
    """In one line, the same each time: without the address that an object has in memory."""
    text = re.sub(r"\s*<\S+ object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return text[:200] or type(error).__name__


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
        except UNREADABLE as error:
            return None, reason(error)
