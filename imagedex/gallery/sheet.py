"""What was found, as one picture: a grid, best first, each with its place and score."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from imagedex.errors import UserError

CELL, LINE, GAP, COLUMNS = 240, 26, 10, 5


def draw(query: str, found: Sequence, path: Path) -> None:
    """Args: found, of `Gallery.search`. Raises `UserError`: a file that Pillow cannot write."""
    columns = max(1, min(COLUMNS, len(found)))
    rows = -(-len(found) // columns)
    width, height = columns * (CELL + GAP) + GAP, 2 * LINE + rows * (CELL + LINE + GAP)
    sheet = Image.new("RGB", (max(width, 400), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    pen.text((GAP, LINE // 2), query, "black", font)
    for place, one in enumerate(found):
        left, top = GAP + place % columns * (CELL + GAP), 2 * LINE + place // columns * (CELL + LINE + GAP)
        try:
            picture = ImageOps.contain(one.picture, (CELL, CELL))
        except Exception:  # it has gone or changed since it was indexed
            picture = Image.new("RGB", (CELL, CELL), "lightgray")
        sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
        pen.text(
            (left, top + CELL + 3), f"{place + 1}   {one.score:.3f}   {Path(one.image_id).name}"[:32], "dimgray", font
        )
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet {path} cannot be written: {' '.join(str(error).split())}") from error
