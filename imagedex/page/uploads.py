"""What visitors send: read once, in formats that start no program, bounded in number, bytes and pixels, and deleted."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from imagedex.page.answers import Seen
from imagedex.page.service import Service, smaller

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "HEIF", "AVIF")  # others start programs, or are no one's photographs
LARGEST_SIDE = 2048  # pixels; larger ones are made smaller while they are read
MOST_PIXELS = 80_000_000  # more would take gigabytes to decode
LARGEST_FILE = 20 * 2**20  # bytes
MOST_UPLOADS = 40


def read_uploads(service: Service, files: Sequence[str] | None, say: Callable[[str], None]) -> list[Seen]:
    """The visitor's pictures, encoded; those that cannot be read are said. The files are deleted."""
    files = list(files or [])
    seen = [read_upload(service, file, say) for file in files[:MOST_UPLOADS]]
    if len(files) > MOST_UPLOADS:
        say(f"{len(files) - MOST_UPLOADS} pictures beyond {MOST_UPLOADS} are left out")
    for file in files:
        Path(file).unlink(missing_ok=True)  # nothing of a visitor is kept
    return [one for one in seen if one is not None]


def read_upload(service: Service, file: str, say: Callable[[str], None]) -> Seen | None:
    """One picture, encoded; None of one that cannot be read, which is said."""
    name = Path(file).name
    try:
        with Image.open(file, formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                say(f"{name} has more than {MOST_PIXELS // 10**6} million pixels")
                return None
            smaller(picture, LARGEST_SIDE).thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            return service.seen(name, picture)
    except Exception as error:  # whatever a visitor's file does to a decoder
        logger.info("an uploaded picture cannot be read: %s", error)
        say(f"{name} cannot be read")
        return None
