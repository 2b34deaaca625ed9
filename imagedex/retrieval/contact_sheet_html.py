"""The contact sheet as one HTML file: pictures inside, each once; no script, nothing fetched, usable from the keyboard."""

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image, features

from imagedex.evaluation.rankings import Ranking
from imagedex.files import write_atomically
from imagedex.retrieval.contact_sheet import (
    MAX_SHOWN,
    THUMBNAIL,
    Sheet,
    Thumbnails,
    byte_limit,
    figure_title,
    format_figure,
    is_found,
    rank_words,
)

_HERE = Path(__file__).parent
# Longest side and quality of the pictures, best first; the page takes the first that keeps it under its limit. At so few
# bytes a larger picture of lower quality looks better than a small one of high quality.
_STEPS = (
    *((THUMBNAIL, 60), (THUMBNAIL, 45), (400, 40), (360, 35), (320, 30)),
    *((280, 30), (250, 28), (225, 28), (200, 28), (180, 25)),
)
_NOTE_BYTES = 200  # of the note on what was reduced, and to spare
_SAMPLE = 16  # pictures from which a step's size is told before all are encoded


@dataclass
class Item:
    """One picture as an answer shows it; `kind` is "right", "missed" (the right one, which was not found) or ""."""

    picture: int  # its place among the pictures of the page, from 1
    image_id: str
    place: str
    score: str = ""
    kind: str = ""


@dataclass
class StoredPicture:
    width: int
    height: int
    address: str  # a data: address, the picture itself


def write_sheet_page(sheet: Sheet, thumbnails: Thumbnails, path: str | Path) -> Path:
    """Writes the sheet as a page that needs nothing but itself."""
    path = Path(path)
    write_atomically(path, render_page(sheet, thumbnails))
    return path


def render_page(sheet: Sheet, thumbnails: Thumbnails) -> str:
    """The page as HTML, under its `byte_limit` where pictures can be made that small; else as small as they may become.

    Every text that comes from outside is escaped by the template.
    """
    rankings = [ranking for row in sheet.rows for ranking in row]
    numbers = {
        image_id: number for number, image_id in enumerate(dict.fromkeys(i for r in rankings for i in shown_ids(r)), 1)
    }
    values = {
        "sheet": sheet,
        "figure_names": list(dict.fromkeys(name for figures in sheet.figures.values() for name in figures)),
        "targets_known": any(ranking.targets for ranking in rankings),
        "rows": [_row(row, sheet.models, numbers) for row in sheet.rows],
    }
    template, limit = _environment().get_template("contact_sheet.html.jinja"), byte_limit(sheet)

    def render(pictures: list[StoredPicture], note: str) -> str:
        style = _style(max((len(shown_ids(ranking)) for ranking in rankings), default=0), pictures)
        return template.render(values, pictures=pictures, note=note, style=Markup(style), policy=_policy(style))

    originals = [thumbnails(image_id) for image_id in numbers]
    markup = len(render([], "").encode("utf-8"))
    pictures, side = store_pictures(originals, limit - markup - _NOTE_BYTES)
    size = markup + sum(map(_stored_bytes, pictures))
    return render(pictures, _note(max((max(one.size) for one in originals), default=0), side, size, limit))


def shown_ids(ranking: Ranking) -> list[str]:
    """The pictures an answer shows; a right one that was missed stands at the end."""
    missed = ranking.targets[:1] if ranking.targets and not is_found(ranking) else []
    return ranking.images[:MAX_SHOWN] + missed


def store_pictures(pictures: list[Image.Image], limit: int) -> tuple[list[StoredPicture], int]:
    """Encodes pictures by the best of `_STEPS` at which all of them take at most `limit` bytes, else by the last.

    Returns the pictures, in order, and the longest side they were allowed.
    """
    sample = pictures[:: len(pictures) // _SAMPLE + 1]
    for side, quality in _STEPS[:-1]:
        expected = sum(_stored_bytes(_store(picture, side, quality)) for picture in sample)
        if expected * len(pictures) > limit * len(sample):
            continue
        stored = [_store(picture, side, quality) for picture in pictures]
        if sum(map(_stored_bytes, stored)) <= limit:
            return stored, side
    side, quality = _STEPS[-1]
    return [_store(picture, side, quality) for picture in pictures], side


def _store(picture: Image.Image, side: int, quality: int) -> StoredPicture:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    # AVIF needs two thirds of WebP's bytes; a Pillow built without it makes WebP.
    form, options = ("avif", {"speed": 8}) if features.check("avif") else ("webp", {"method": 6})
    buffer = io.BytesIO()
    small.save(buffer, format=form, quality=quality, **options)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return StoredPicture(small.width, small.height, f"data:image/{form};base64,{content}")


def _stored_bytes(picture: StoredPicture) -> int:
    return len(picture.address) + 90  # with the markup around it


def _note(largest: int, side: int, size: int, limit: int) -> str:
    """What was reduced for the sake of the page's size, in words; nothing if no picture lost pixels."""
    if largest <= side:
        return ""
    allowed = f"{limit / 1e6:.3g} MB"
    if size > limit:
        return f"Pictures are {side} pixels at most; the page is over {allowed} nevertheless."
    return f"Pictures are {side} pixels at most, so that the page stays under {allowed}."


def _style(columns: int, pictures: list[StoredPicture]) -> str:
    """The style sheet, preceded by what depends on the sheet: columns, and how wide an opened picture is drawn."""
    longest = max((max(picture.width, picture.height) for picture in pictures), default=0)
    opened = min(max(300, 9 * longest // 4), 740)  # not so large that a small picture is a blur
    columns = max(columns, 6)  # so that few pictures are not blown up
    values = f":root {{ --columns: {columns}; --opened: {opened}px; }}\n"
    return values + (_HERE / "contact_sheet.css").read_text(encoding="utf-8")


def _policy(style: str) -> str:
    """What a browser may do with the page: show its own pictures in its own style, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure_title": figure_title, "format_figure": format_figure}
    return environment


def _row(row: list[Ranking], models: list[str], numbers: dict[str, int]) -> dict:
    answers = [(model, _items(ranking, numbers)) for model, ranking in zip(models, row, strict=True)]
    missed = any(ranking.targets and not is_found(ranking) for ranking in row)
    return {"query": row[0].query, "missed": missed, "answers": answers}


def _items(ranking: Ranking, numbers: dict[str, int]) -> list[Item]:
    items = []
    for place, (image_id, score) in enumerate(zip(ranking.images[:MAX_SHOWN], ranking.scores, strict=False), start=1):
        right = image_id in (ranking.targets or ())
        words = rank_words(ranking) if right and not any(item.kind for item in items) else str(place)
        items.append(Item(numbers[image_id], image_id, words, f"{score:.3f}", "right" if right else ""))
    if ranking.targets and not is_found(ranking):
        items.append(Item(numbers[ranking.targets[0]], ranking.targets[0], rank_words(ranking), kind="missed"))
    return items
