"""Pictures that programs read in different ways, each beside what a viewer shows; made here, by arithmetic."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (44, 30)  # width, height


def scene() -> np.ndarray:
    """(height, width, 3) uint8: smooth, and different in every corner."""
    x, y = np.meshgrid(np.linspace(0, 1, SIZE[0]), np.linspace(0, 1, SIZE[1]))
    return np.stack([255 * x, 255 * y, 255 * (1 - x) * y], axis=-1).round().astype(np.uint8)


def write_odd_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Writes the pictures, and returns what is to be seen in each: file name -> (height, width, 3) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = scene()
    grey = colours[..., 0]
    plain = Image.fromarray(colours)
    seen = {}

    def write(name: str, picture: Image.Image, looks_like: np.ndarray, **options) -> None:
        picture.save(folder / name, **options)
        seen[name] = looks_like

    write("plain.png", plain, colours)
    turned = Image.fromarray(np.rot90(colours).copy())  # lies on its side; tag 6 says: turn it by 90 degrees clockwise
    tag = Image.Exif()
    tag[0x0112] = 6
    write("turned.png", turned, colours, exif=tag)
    turned.save(folder / "turned.jpg", exif=tag, quality=95)
    lying = Image.open(folder / "turned.jpg")
    seen["turned.jpg"] = np.rot90(np.asarray(lying), -1)
    mirror = Image.Exif()
    mirror[0x0112] = 2
    write("mirrored.png", Image.fromarray(colours[:, ::-1].copy()), colours, exif=mirror)

    share = np.linspace(0, 1, SIZE[0])[None, :, None]
    alpha = (255 * share).round()
    over_white = (colours * (alpha / 255) + 255 * (1 - alpha / 255)).round().astype(np.uint8)
    with_alpha = np.concatenate([colours, np.broadcast_to(alpha, (*colours.shape[:2], 1))], axis=-1).astype(np.uint8)
    write("transparent.png", Image.fromarray(with_alpha), over_white)
    hidden = with_alpha.copy()
    hidden[:, : SIZE[0] // 2, 3], hidden[:, SIZE[0] // 2 :, 3] = 0, 255  # colours below what cannot be seen
    cut = colours.copy()
    cut[:, : SIZE[0] // 2] = 255
    write("hidden.png", Image.fromarray(hidden), cut)
    palette = Image.fromarray((grey // 64).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    table = np.array([[255, 255, 255], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
    write("palette.png", palette, table[grey // 64], transparency=0)

    as_grey = np.repeat(grey[..., None], 3, axis=2)
    write("grey.png", Image.fromarray(grey), as_grey)
    write("grey16.png", Image.fromarray(grey.astype(np.uint16) * 257), as_grey)
    write("float.tif", Image.fromarray(grey.astype(np.float32) / 255), as_grey)
    black = np.where(grey[..., None] > 127, 255, 0).repeat(3, axis=2).astype(np.uint8)
    write("one_bit.png", Image.fromarray(grey > 127), black)
    ink = Image.fromarray(np.concatenate([255 - colours, np.zeros_like(grey)[..., None]], axis=-1), "CMYK")
    write("ink.tif", ink, colours)
    return seen
