"""The one way a picture is read, everywhere: upright, 8 bits, RGB; then whatever the tower's own processor does.

What others converted before us is out of reach: an array has no orientation any more, and `Image.convert` has no white
behind what is transparent.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image

ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # its value -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SLIMMEST = 100  # times as long as wide; a processor that scales the short side up would need gigabytes for a strip
_LONGEST_STRIP = 10_000  # pixels
_DEEP_MODES = ("I", "F")  # and "I;16", "I;16B", ...


def as_rgb(picture):
    """A picture as a viewer shows it: turned by its EXIF orientation, transparent parts over white, 16 bits as 8, RGB. Of an
    animation the first picture. A strip of one pixel's width or little more is widened, see `SLIMMEST`.

    Args: picture, of Pillow, or the path of one (or its address). Anything else (an array, a tensor) comes back as it is.
    """
    if isinstance(picture, str | Path):
        picture = load_image(picture) if "://" in str(picture) else Image.open(picture)
    if not isinstance(picture, Image.Image):
        return picture
    turn = TURNS.get(orientation(picture))
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.mode in _DEEP_MODES or picture.mode.startswith("I;16"):
        picture = eight_bits(picture)
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture.convert("RGBA"))
    shown = widened(picture.convert("RGB"))
    shown.info = {}  # its orientation is done
    return shown


def orientation(picture: Image.Image) -> int:
    """What EXIF says; 1 (as it is) where it says nothing that can be read, as viewers take it."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  Pillow raises anything from SyntaxError to struct.error for broken metadata
        return 1
    return value if isinstance(value, int) else 1


def widened(picture: Image.Image) -> Image.Image:
    """The same picture, at most `SLIMMEST` times as long as wide."""
    longest = max(picture.size)
    if longest <= SLIMMEST * min(picture.size):
        return picture
    long = min(longest, _LONGEST_STRIP)
    size = tuple(long if side == longest else max(side, -(-long // SLIMMEST)) for side in picture.size)
    return picture.resize(size)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floating point, as 8 bits.

    The scale is told from the values: floating point up to 1 is a share of white; up to 255 it is 8 bits already; up to 65,535
    it is 16 bits; beyond that the largest value is white. What is below zero is black, unless all lies between -1 and 1: then
    -1 is. What is no number is black; infinity is the largest number there is.
    """
    values = np.asarray(picture, dtype=np.float64)
    finite = values[np.isfinite(values)]
    values = np.nan_to_num(values, posinf=finite.max(initial=0.0), neginf=finite.min(initial=0.0))
    if picture.mode == "F" and -1 <= values.min(initial=0.0) < 0 and values.max(initial=0.0) <= 1:
        values = (values + 1) / 2
    largest = values.max(initial=0.0)
    if picture.mode.startswith("I;16"):
        white = 65535.0
    elif picture.mode == "F" and largest <= 1:
        white = 1.0
    else:
        white = 255.0 if largest <= 255 else 65535.0 if largest <= 65535 else largest
    return Image.fromarray(np.clip(np.rint(values * (255 / white)), 0, 255).astype(np.uint8))


def read_pictures(pictures: Sequence, image_processor) -> dict[str, torch.Tensor]:
    """Pictures -> what the model takes of them, row i of picture i: `pixel_values` (B, 3, height, width) and, where the tower's
    processor gives more (a mask of patches), that too.

    Args: image_processor, any that AutoImageProcessor opens.
    """
    return dict(image_processor(images=[as_rgb(picture) for picture in pictures], return_tensors="pt"))


def read_cut_pictures(pictures: Sequence, image_processor) -> dict[str, torch.Tensor]:
    """As `read_pictures`, of pictures that already have the size that the tower sees: rescaled and normalised alone."""
    if hasattr(image_processor, "data_config"):  # timm's, which knows no do_resize
        mean, std = (torch.tensor(image_processor.data_config[name]).view(3, 1, 1) for name in ("mean", "std"))
        pixels = [torch.from_numpy(np.array(as_rgb(picture))).permute(2, 0, 1) / 255 for picture in pictures]
        return {"pixel_values": (torch.stack(pixels) - mean) / std}
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    return dict(image_processor(images=[as_rgb(picture) for picture in pictures], **options))
