"""A contact sheet: queries beside the pictures found, the right one marked, several models' answers under each other.

As one picture here; as a page in `contact_sheet_html`.
"""

import io
import logging
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from imagedex.evaluation.rankings import Ranking
from imagedex.files import write_atomically
from imagedex.modeling.picture_reading import as_rgb

logger = logging.getLogger(__name__)

MAX_SHOWN = 10  # pictures in a row, however long the ranking is
THUMBNAIL = 480  # longest side of a kept thumbnail, in pixels: enough for a picture that is opened in the page
MAX_BYTES = 1_000_000  # of each form of the sheet, for up to 20 queries; of more, in proportion

PAPER, INK, MUTED, RULE = "#f7f6f3", "#1b1c1e", "#73757a", "#dedcd6"
GREEN, AMBER = "#15803d", "#b45309"
MARGIN, GAP, CELL = 64, 20, (224, 168)
RADIUS, RING = 14, 5
TITLE, SENTENCE, LABEL, SMALL = 54, 36, 26, 22  # sizes of text; sheets are wide and mostly seen scaled down
_JPEG_LIMIT = 60_000  # a JPEG has at most 65,535 lines
# Quality, colour subsampling and share of the full size of the JPEG, best first; the first that is small enough is taken.
_JPEG_STEPS = (
    (88, 0, 1),
    (76, 2, 1),
    (76, 2, 0.8),
    (66, 2, 0.8),
    (70, 2, 0.66),
    (60, 2, 0.66),
    (66, 2, 0.5),
    (54, 2, 0.5),
    (46, 2, 0.5),
)
_SCALE = 4  # rounded corners are drawn this much larger and scaled down: Pillow's own are jagged


@dataclass
class Sheet:
    """What both forms show.

    Attributes:
        rows: one a query; each holds one `Ranking` a model, in the order of `models`, all of the same sentence.
        models: names, as shown.
        figures: model -> name of a figure -> value, empty when the right pictures are not known.
        gallery_size: pictures that could be found.
        num_queries: how many were asked; `rows` may be fewer.
    """

    models: list[str]
    rows: list[list[Ranking]]
    gallery_size: int
    num_queries: int
    figures: dict[str, dict[str, float]] = field(default_factory=dict)

    def counts(self) -> str:
        asked = f"{self.num_queries:,} {'query' if self.num_queries == 1 else 'queries'}"
        shown = f", {len(self.rows):,} shown" if len(self.rows) < self.num_queries else ""
        return f"gallery of {self.gallery_size:,} {'picture' if self.gallery_size == 1 else 'pictures'}, {asked}{shown}"


def build_sheet(
    answers: Mapping[str, Sequence[Ranking]],
    gallery_size: int,
    max_queries: int = 20,
    figures: Mapping[str, Mapping[str, float]] | None = None,
    num_queries: int | None = None,
) -> Sheet:
    """Groups models' rankings by query; with more than `max_queries` of them, evenly spaced ones are shown.

    Args:
        answers: model name -> its rankings, of the same queries in the same order for every model.
        num_queries: how many were asked, where `answers` has those of `shown_places` alone.

    Raises:
        ValueError: no model, or models that answered different queries.
    """
    asked = {tuple(ranking.query for ranking in rankings) for rankings in answers.values()}
    if len(asked) != 1:
        raise ValueError("a sheet needs one or more models that answered the same queries in the same order")
    total = len(asked.pop())
    rows = [[rankings[place] for rankings in answers.values()] for place in shown_places(total, max_queries)]
    kept = {model: dict(values) for model, values in (figures or {}).items()}
    return Sheet(list(answers), rows, gallery_size, num_queries or total, kept)


def shown_places(num_queries: int, max_queries: int) -> list[int]:
    """Which queries a sheet shows: evenly spaced ones."""
    shown = min(max_queries, num_queries)
    return [place * num_queries // shown for place in range(shown)]


class Thumbnails:
    """Small copies of pictures by image_id, made once each. `load` gives the picture (decoded) of an image_id."""

    def __init__(self, load: Callable[[str], Image.Image]):
        self.load = load
        self.kept: dict[str, Image.Image] = {}

    def __call__(self, image_id: str) -> Image.Image:
        if image_id not in self.kept:
            picture = as_rgb(self.load(image_id))
            picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            self.kept[image_id] = picture
        return self.kept[image_id]


def is_found(ranking: Ranking) -> bool:
    return bool(set(ranking.targets or ()) & set(ranking.images[:MAX_SHOWN]))


def rank_words(ranking: Ranking) -> str:
    """Where the right picture stands, in words."""
    if ranking.rank is None or math.isinf(ranking.rank):
        return "not found"
    return f"rank {int(ranking.rank):,}"


def format_figure(name: str, value: float) -> str:
    if math.isinf(value):
        return "not found"
    return f"{value:,.0f}" if name == "median_rank" and value == int(value) else f"{value:.3f}"


def figure_title(name: str) -> str:
    return {"mrr": "MRR", "median_rank": "median rank"}.get(name, name.replace("hits", "Hits"))


def byte_limit(sheet: Sheet) -> int:
    return MAX_BYTES * max(20, len(sheet.rows)) // 20


def write_sheet_image(sheet: Sheet, thumbnails: Thumbnails, path: str | Path) -> Path:
    """Writes the sheet as a JPEG under its `byte_limit` (or as a PNG of any size, by the extension).

    Rows that a JPEG cannot hold are left to the page.
    """
    path, page = Path(path), draw_sheet(sheet, thumbnails)
    if path.suffix.lower() == ".png":
        buffer = io.BytesIO()
        page.save(buffer, format="PNG", optimize=True)
        write_atomically(path, buffer.getvalue())
    else:
        write_atomically(path, _jpeg(page, byte_limit(sheet), path.name))
    return path


def _jpeg(page: Image.Image, limit: int, name: str) -> bytes:
    """The best of `_JPEG_STEPS` that takes at most `limit` bytes, else the last; logs what was reduced beside quality."""
    for quality, subsampling, share in _JPEG_STEPS:
        size = round(page.width * share), round(page.height * share)
        drawn = page if share == 1 else page.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        drawn.save(buffer, format="JPEG", quality=quality, subsampling=subsampling, optimize=True, progressive=True)
        if buffer.tell() <= limit:
            break
    if share < 1:
        kept = "to stay under" if buffer.tell() <= limit else "and is nevertheless over"
        logger.info("%s is drawn at %.0f%% of its full size %s %.3g MB", name, 100 * share, kept, limit / 1e6)
    return buffer.getvalue()


def draw_sheet(sheet: Sheet, thumbnails: Thumbnails) -> Image.Image:
    """The whole sheet as one RGB picture."""
    columns = max((min(len(ranking.images), MAX_SHOWN) for row in sheet.rows for ranking in row), default=1)
    missed = any(ranking.targets and not is_found(ranking) for row in sheet.rows for ranking in row)
    width = 2 * MARGIN + columns * (CELL[0] + GAP) - GAP + (CELL[0] + 3 * GAP if missed else 0)
    width = max(width, 1200)  # room for the header
    strips, height = [], 0
    for row in sheet.rows:
        strip = _draw_row(row, sheet.models, thumbnails, width, columns)
        height += strip.height
        if height > _JPEG_LIMIT:
            break
        strips.append(strip)
    header = _draw_header(replace(sheet, rows=sheet.rows[: len(strips)]), width)
    strips.insert(0, header)
    page = Image.new("RGB", (width, sum(strip.height for strip in strips) + MARGIN // 2), PAPER)
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    return page


def _draw_header(sheet: Sheet, width: int) -> Image.Image:
    names = list(dict.fromkeys(name for figures in sheet.figures.values() for name in figures))
    strip = Image.new("RGB", (width, 196 + 46 * len(sheet.models)), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((MARGIN, 48), "Pictures found", fill=INK, font=font(TITLE))
    draw.text((MARGIN, 124), sheet.counts(), fill=MUTED, font=font(LABEL))
    labels = [_fit(model, LABEL, 620) for model in sheet.models]
    label_width = max((font(LABEL).getlength(label) for label in labels), default=0)
    for line, (model, label) in enumerate(zip(sheet.models, labels, strict=True)):
        top, left = 180 + 46 * line, MARGIN
        draw.text((left, top), label, fill=INK, font=font(LABEL))
        left += label_width + 52
        for name in names:
            if name not in sheet.figures.get(model, {}):
                continue
            for text, colour, size, after in (
                (figure_title(name), MUTED, SMALL, 12),
                (format_figure(name, sheet.figures[model][name]), INK, LABEL, 40),
            ):
                draw.text((left, top + 26), text, fill=colour, font=font(size), anchor="ls")
                left += font(size).getlength(text) + after
    return strip


def _draw_row(row: list[Ranking], models: list[str], thumbnails: Thumbnails, width: int, columns: int) -> Image.Image:
    lines = wrap(row[0].query, SENTENCE, width - 2 * MARGIN, max_lines=3)
    label = 44 if len(models) > 1 else 0
    line_height, answer_height = SENTENCE + 10, label + CELL[1] + 56
    strip = Image.new("RGB", (width, 56 + line_height * len(lines) + answer_height * len(row)), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.line((MARGIN, 0, width - MARGIN, 0), fill=RULE, width=2)
    for number, line in enumerate(lines):
        draw.text((MARGIN, 28 + line_height * number), line, fill=INK, font=font(SENTENCE))
    top = 48 + line_height * len(lines)
    for model, ranking in zip(models, row, strict=True):
        if label:
            draw.text((MARGIN, top), _fit(model, SMALL, width - 2 * MARGIN), fill=MUTED, font=font(SMALL))
        _draw_answer(strip, ranking, thumbnails, top + label, columns)
        top += answer_height
    return strip


def _draw_answer(strip: Image.Image, ranking: Ranking, thumbnails: Thumbnails, top: int, columns: int) -> None:
    draw = ImageDraw.Draw(strip)
    below = top + CELL[1] + 12
    if not ranking.images:
        draw.text((MARGIN, top), "nothing was found", fill=MUTED, font=font(LABEL))
    for column, (image_id, score) in enumerate(zip(ranking.images[:MAX_SHOWN], ranking.scores, strict=False)):
        left = MARGIN + column * (CELL[0] + GAP)
        right_one = image_id in (ranking.targets or ())
        _paste(strip, thumbnails(image_id), left, top, GREEN if right_one else None)
        place = f"{column + 1}  right" if right_one else str(column + 1)
        draw.text((left + 2, below), place, fill=GREEN if right_one else INK, font=font(SMALL))
        draw.text((left + CELL[0] - 2, below), f"{score:.3f}", fill=MUTED, font=font(SMALL), anchor="ra")
    if ranking.targets and not is_found(ranking):
        left = MARGIN + columns * (CELL[0] + GAP) + 2 * GAP
        draw.line((left - 1.5 * GAP, top + 6, left - 1.5 * GAP, top + CELL[1] - 6), fill=RULE, width=2)
        _paste(strip, thumbnails(ranking.targets[0]), left, top, AMBER)
        draw.text((left + 2, below), f"right one: {rank_words(ranking)}", fill=AMBER, font=font(SMALL))


def _paste(strip: Image.Image, picture: Image.Image, left: int, top: int, ring: str | None) -> None:
    """The whole picture in the cell, corners rounded, with a coloured ring if it is marked.

    What the picture's shape leaves free takes the mean colour of its edge, so that nothing is cut off and nothing glares.
    """
    if ring:
        for grown, colour in ((RING + 3, ring), (3, PAPER)):
            size = (CELL[0] + 2 * grown, CELL[1] + 2 * grown)
            strip.paste(colour, (left - grown, top - grown), _rounded(size, RADIUS + grown))
    edge = Image.new("RGB", (2 * (picture.width + picture.height), 1))
    for i, box in enumerate(((0, 0, picture.width, 1), (0, picture.height - 1, picture.width, picture.height))):
        edge.paste(picture.crop(box), (i * picture.width, 0))
    for i, x in enumerate((0, picture.width - 1)):
        side = picture.crop((x, 0, x + 1, picture.height)).transpose(Image.Transpose.ROTATE_90)
        edge.paste(side, (2 * picture.width + i * picture.height, 0))
    colour = edge.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    whole = ImageOps.pad(picture.convert("RGB"), CELL, Image.Resampling.LANCZOS, color=colour)
    strip.paste(whole, (left, top), _rounded(CELL, RADIUS))


@lru_cache(maxsize=64)
def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", (size[0] * _SCALE, size[1] * _SCALE), 0)
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius * _SCALE, fill=255)
    return mask.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: there on every machine, Latin letters only (the page shows other scripts)."""
    return ImageFont.load_default(size)


def wrap(text: str, size: int, width: float, max_lines: int) -> list[str]:
    """Breaks text at spaces to lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines, words = [], text.split()
    while words and len(lines) < max_lines:
        count = 1
        while count < len(words) and font(size).getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        if len(lines) == max_lines - 1:
            count = len(words)
        lines.append(_fit(" ".join(words[:count]), size, width))
        words = words[count:]
    return lines


def _fit(text: str, size: int, width: float) -> str:
    if font(size).getlength(text) <= width:
        return text
    fits = bisect(range(1, len(text)), width, key=lambda length: font(size).getlength(text[:length] + "..."))
    return text[:fits].rstrip() + "..."
