"""The sheets: what is on them, that hostile text stays text, and (`browser`) that a browser shows every picture."""

import base64
import html.parser
import io
import math
import random
import re

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image, ImageColor, ImageDraw

from imagedex.evaluation.rankings import Ranking
from imagedex.retrieval import contact_sheet
from imagedex.retrieval.contact_sheet import (
    AMBER,
    CELL,
    GAP,
    GREEN,
    MARGIN,
    Thumbnails,
    build_sheet,
    draw_sheet,
    font,
    wrap,
    write_sheet_image,
)
from imagedex.retrieval.contact_sheet_html import render_page, write_sheet_page

COLOURS = {
    f"{name}.jpg": colour for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200)), ("sky", (90, 160, 250)))
}
SHAPES = {"red.jpg": (300, 200), "blue.jpg": (100, 400), "sky.jpg": (5, 3)}
HOSTILE = '<script>alert("x")</script> & <img src=x onerror=1> \u202e'


def load(image_id):
    return Image.new("RGB", SHAPES.get(image_id, (64, 48)), COLOURS.get(image_id, (10, 120, 10)))


def ranking(query, images, target=None, rank=None):
    return Ranking(query, images, [0.9 - 0.1 * place for place in range(len(images))], target and [target], rank)


@pytest.fixture
def sheet():
    """Two models, three queries: found, found lower and missed; one hostile text."""
    first = [
        ranking("a red one", ["red.jpg", "blue.jpg"], "red.jpg", 1),
        ranking(HOSTILE, ["red.jpg", "blue.jpg"], "blue.jpg", 2),
        ranking("the sky", ["red.jpg", "blue.jpg"], "sky.jpg", 3),
    ]
    second = [
        ranking("a red one", ["blue.jpg", "red.jpg"], "red.jpg", 2),
        ranking(HOSTILE, ["blue.jpg"], "blue.jpg", 1),
        ranking("the sky", [], "sky.jpg", math.inf),
    ]
    figures = {
        "first": {"hits@1": 1 / 3, "mrr": 0.5, "median_rank": 2.0},
        "second": {"hits@1": 1 / 3, "median_rank": math.inf},
    }
    return build_sheet({"first": first, "second": second}, 3, figures=figures)


def test_queries_are_grouped_and_evenly_chosen():
    rankings = [ranking(str(number), ["red.jpg"]) for number in range(10)]
    sheet = build_sheet({"a": rankings, "b": list(rankings)}, 1000, max_queries=4)
    assert [[r.query for r in row] for row in sheet.rows] == [["0"] * 2, ["2"] * 2, ["5"] * 2, ["7"] * 2]
    assert sheet.counts() == "gallery of 1,000 pictures, 10 queries, 4 shown"
    assert build_sheet({"a": rankings[:1]}, 1).counts() == "gallery of 1 picture, 1 query"
    with pytest.raises(ValueError, match="same queries"):
        build_sheet({"a": rankings, "b": rankings[1:]}, 10)
    with pytest.raises(ValueError):
        build_sheet({}, 10)


def close(pixel, colour):
    return max(abs(int(a) - b) for a, b in zip(pixel, ImageColor.getrgb(colour), strict=True)) < 12


def tops(page, column, colour):
    """The lines at which this colour begins in this column of pixels."""
    found = [close(pixel, colour) for pixel in page[:, column]]
    return [line for line in range(1, len(page)) if found[line] and not found[line - 1]]


def test_the_picture_shows_thumbnails_and_rings(sheet):
    page = np.asarray(draw_sheet(sheet, Thumbnails(load)))
    column = MARGIN + CELL[0] // 2
    reds, blues = tops(page, column, "#c80000"), tops(page, column, "#0000c8")
    assert len(reds) == 3 and len(blues) == 2  # the first places: red, blue / red, blue / red, nothing
    top = reds[0] + CELL[1] // 2
    ring = MARGIN - 3 - 2  # a paper gap of 3 pixels, then the ring
    assert close(page[top, ring], GREEN) and close(page[top, MARGIN - 1], contact_sheet.PAPER)
    assert not close(page[top, MARGIN + CELL[0] + GAP - 5], GREEN)  # the second picture is not the right one
    # the missed one stands at the end of its row, ringed in amber, for both models
    right = MARGIN + 2 * (CELL[0] + GAP) + 2 * GAP
    amber = [line for line in range(len(page)) if close(page[line, right - 5], AMBER)]
    assert len(amber) >= 2 * (CELL[1] - 10) and min(amber) > reds[2] - 20  # the corners are round
    assert close(page[min(amber) + 80, right + CELL[0] // 2], "#5aa0fa")
    cell = page[min(amber) + 25 : min(amber) + 25 + CELL[1] // 2, right + 20 : right + CELL[0] - 20].reshape(-1, 3)
    assert len(np.unique(cell, axis=0)) == 1  # its rank does not cover it


def test_one_model_without_known_pictures():
    sheet = build_sheet({"only": [ranking("q", ["red.jpg"])]}, 1)
    page = np.asarray(draw_sheet(sheet, Thumbnails(load))).reshape(-1, 3)
    assert not (np.abs(page.astype(int) - (0x15, 0x80, 0x3D)).max(1) < 12).any()  # no green anywhere
    assert 'id="show-all"' not in render_page(sheet, Thumbnails(load))


def test_sheets_are_files(sheet, tmp_path):
    for name, form in (("sheet.jpg", "JPEG"), ("sheet.png", "PNG")):
        with Image.open(write_sheet_image(sheet, Thumbnails(load), tmp_path / name)) as picture:
            assert picture.format == form and min(picture.size) > 600
    assert (
        write_sheet_page(sheet, Thumbnails(load), tmp_path / "sheet.html")
        .read_text(encoding="utf-8")
        .startswith("<!DOC")
    )


def test_a_sheet_too_long_for_a_jpeg_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr(contact_sheet, "_JPEG_LIMIT", 1000)
    seen = []
    monkeypatch.setattr(
        contact_sheet, "_draw_header", lambda s, w, f=contact_sheet._draw_header: seen.append(s) or f(s, w)
    )
    rankings = [ranking(str(number), ["red.jpg"]) for number in range(20)]
    picture = draw_sheet(build_sheet({"a": rankings}, 3), Thumbnails(load))
    assert 1 <= len(seen[0].rows) < 20 and "shown" in seen[0].counts()
    assert picture.height < 1500


def test_each_thumbnail_is_made_once():
    loaded = []
    thumbnails = Thumbnails(lambda image_id: loaded.append(image_id) or load(image_id))
    sheet = build_sheet({"a": [ranking("q", ["red.jpg", "blue.jpg"], "red.jpg", 1) for _ in range(5)]}, 3)
    draw_sheet(sheet, thumbnails)
    render_page(sheet, thumbnails)
    assert sorted(loaded) == ["blue.jpg", "red.jpg"]
    assert thumbnails("blue.jpg").size == (100, 400)  # never larger than it is
    wide = Thumbnails(lambda image_id: Image.new("RGB", (2000, 1000)))("wide")
    assert wide.size == (contact_sheet.THUMBNAIL, contact_sheet.THUMBNAIL // 2)


def test_long_sentences_are_broken_and_cut():
    lines = wrap("word " * 200, 20, 300, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font(20).getlength(line) <= 300 for line in lines)
    assert wrap("short", 20, 300, 3) == ["short"]
    assert wrap("x" * 500, 20, 300, 3)[0].endswith("...")


class Page(html.parser.HTMLParser):
    """Texts and attributes as a browser would read them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def stored(page):
    """symbol id -> the picture in it, as decoded."""
    names = [attributes["id"] for attributes in page.all("symbol")]
    pictures = [attributes["href"].split(",", 1) for attributes in page.all("image")]
    assert all(re.fullmatch("data:image/(avif|webp);base64", kind) for kind, _ in pictures)
    decoded = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for _, data in pictures]
    return dict(zip(names, decoded, strict=True))


def test_the_page_is_complete_and_escaped(sheet):
    text = render_page(sheet, Thumbnails(load))
    page = Page(text)
    assert not page.all("script") and not page.all("img") and HOSTILE in page.texts
    assert not re.findall(r"""(?:https?:|["'(])//""", text)  # nothing from elsewhere
    pictures, shown = stored(page), [attributes["href"] for attributes in page.all("use")]
    assert len(page.all("article")) == 3 and len(shown) == 2 * 2 + (2 + 1) + (2 + 1) + 1
    colours = [pictures[address.removeprefix("#")].getpixel((2, 1)) for address in shown]
    wanted = ["red", "blue", "blue", "red", "red", "blue", "blue", "red", "blue", "sky", "sky"]
    for colour, name in zip(colours, wanted, strict=True):
        assert max(abs(a - b) for a, b in zip(colour, COLOURS[f"{name}.jpg"], strict=True)) < 16
    kinds = [item.get("class") for item in page.all("li")]
    assert kinds.count("right") == 4 and kinds.count("missed") == 2 and kinds.count("none") == 1
    assert {"rank 1", "rank 2", "rank 3", "not found", "0.900", "sky.jpg"} <= set(page.texts)
    assert [article["class"] for article in page.all("article")] == ["hit", "hit", "miss"]
    popovers = [part["id"] for part in page.all("div") if "popover" in part]
    opening = [button["popovertarget"] for button in page.all("button")]
    assert opening == popovers and len(set(popovers)) == len(shown)


def test_every_text_from_outside_is_escaped():
    """Names of models, figures and pictures, which may be anything that a folder holds."""
    names = {
        part: f'{part}"><script>1</script>' + "<img src=x onerror=1>'&amp;" for part in ("model", "figure", "picture")
    }
    answers = {names["model"]: [ranking("q", [names["picture"]], "gone<b>.jpg", 9)], "plain": [ranking("q", [])]}
    sheet = build_sheet(answers, 3, figures={names["model"]: {names["figure"]: 0.5}})
    page = Page(render_page(sheet, Thumbnails(load)))
    assert set(names.values()) | {"gone<b>.jpg"} <= set(page.texts)
    assert not any(page.all(tag) for tag in ("script", "img", "b"))


def test_each_picture_is_stored_once(sheet):
    """However often it is shown; what is stored is told apart by its own colour."""
    text = render_page(sheet, Thumbnails(load))
    assert text.count("data:image/") == len(stored(Page(text))) == 3
    assert len(set(re.findall(r'data:image/[^"]*', text))) == 3


def made_picture(image_id, size=(480, 360)):
    """Detailed as a photograph is: 300 patches and lines of many colours; smooth, without noise."""
    rnd = random.Random(image_id)
    large = Image.new("RGB", size)
    draw = ImageDraw.Draw(large)
    for _ in range(300):
        x, y, w, h = (rnd.randrange(limit) for limit in (*size, size[0] // 6, size[1] // 6))
        colour = tuple(rnd.randrange(256) for _ in range(3))
        if rnd.random() < 0.7:
            draw.ellipse((x - w, y - h, x + w // 4, y + h // 4), fill=colour)
        else:
            draw.line((x, y, x + w, y - h), fill=colour, width=2)
    return large


def test_twenty_queries_stay_under_one_megabyte(tmp_path):
    """20 x 10 detailed pictures, none shown twice."""
    rankings = [ranking(f"query {q}", [f"{q}-{place}" for place in range(10)], f"{q}-9", 10) for q in range(20)]
    sheet, thumbnails = build_sheet({"a": rankings}, 200), Thumbnails(made_picture)
    page = write_sheet_page(sheet, thumbnails, tmp_path / "sheet.html")
    drawn = write_sheet_image(sheet, thumbnails, tmp_path / "sheet.jpg")
    sizes = page.stat().st_size, drawn.stat().st_size
    assert all(200_000 < size < 1_000_000 for size in sizes)  # nor thrown away more than had to be
    text = page.read_text(encoding="utf-8")
    pictures = stored(Page(text))
    assert len(pictures) == 200
    side = max(max(picture.size) for picture in pictures.values())
    assert 180 <= side < 480 and f"Pictures are {side} pixels at most, so that the page stays under 1 MB." in text
    pairs = zip(list(pictures.values())[::29], list(thumbnails.kept.values())[::29], strict=True)
    for kept, original in pairs:  # each still looks like itself
        reference = original.resize(kept.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(kept, float) - np.asarray(reference, float)).mean() < 20
    with Image.open(drawn) as picture:
        assert picture.width >= 1200


def test_few_pictures_keep_their_pixels_and_nothing_is_said():
    sheet = build_sheet({"a": [ranking("q", ["x"])]}, 1)
    text = render_page(sheet, Thumbnails(made_picture))
    assert stored(Page(text))["p1"].size == (480, 360) and "pixels at most" not in text


def test_a_pillow_without_avif_stores_webp(sheet, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    text = render_page(sheet, Thumbnails(load))
    assert text.count("data:image/webp;base64,") == len(stored(Page(text))) == 3


def test_what_cannot_be_made_small_enough_is_said(monkeypatch, tmp_path, caplog):
    sheet, thumbnails = build_sheet({"a": [ranking("q", list("0123456789"))]}, 10), Thumbnails(made_picture)
    monkeypatch.setattr(contact_sheet, "MAX_BYTES", 10_000)
    assert "180 pixels at most; the page is over 0.01 MB nevertheless" in render_page(sheet, thumbnails)
    with caplog.at_level("INFO", logger="imagedex"):
        write_sheet_image(sheet, thumbnails, tmp_path / "sheet.jpg")
    assert "sheet.jpg is drawn at 50% of its full size and is nevertheless over 0.01 MB" in caplog.text


def test_more_queries_may_take_more():
    rankings = [ranking(str(number), ["red.jpg"]) for number in range(60)]
    sheets = [build_sheet({"a": rankings}, 1, max_queries=shown) for shown in (5, 20, 60)]
    assert [contact_sheet.byte_limit(sheet) for sheet in sheets] == [1_000_000, 1_000_000, 3_000_000]


@pytest.fixture
def browser(sheet, tmp_path):
    path = write_sheet_page(sheet, Thumbnails(load), tmp_path / "sheet.html")
    with Browser(tmp_path) as one:
        one.open(path)
        yield one


def seen(browser, selector):
    return browser.ask(f"[...document.querySelectorAll('{selector}')].filter(e => e.getClientRects().length).length")


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")


@pytest.mark.browser
@needs_chromium
def test_a_browser_shows_the_page_and_fetches_nothing(browser):
    titles = browser.ask("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert titles == ["a red one", HOSTILE, "the sky"] and browser.ask("document.scripts.length") == 0
    addresses = set(browser.requests)
    assert sum(address.startswith("file:") for address in addresses) == 1
    assert all(address.startswith(("file:", "data:image/")) for address in addresses)
    for choice, shown in (("missed", 1), ("found", 2), ("all", 3)):
        browser.ask(f"document.getElementById('show-{choice}').click()")
        assert seen(browser, "article") == shown
    left, _, right, _ = browser.box("li svg")
    browser.ask("document.getElementById('size-l').click()")
    wider = browser.box("li svg")
    assert wider[2] - wider[0] > right - left
    for width in (1400, 390):  # nothing sticks out to the side, on a phone neither
        browser.resize(width, 844)
        assert browser.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_covers_a_picture(browser, width):
    browser.resize(width, 900)
    inside = """[...document.querySelectorAll('li:not(.none)')].map(item => {
        const box = e => e.getBoundingClientRect(), picture = box(item.querySelector('svg'));
        const texts = [...item.querySelectorAll('.mark, .place, .score')].map(box);
        return [texts.length, picture.width > 50 && texts.every(text => text.width > 0 && text.top >= picture.bottom)];
    })"""
    found = browser.ask(inside)
    assert len(found) == 11 and all(count >= 1 and apart for count, apart in found)
    overlapping = """(() => { const boxes = [...document.querySelectorAll('li svg')].map(e => e.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right
            && a.top < b.bottom && b.top < a.bottom)); })()"""
    assert not browser.ask(overlapping)


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("close", ["Escape", "Enter", "click"])
@pytest.mark.parametrize("by", ["click", "Enter"])
def test_a_picture_opens_larger_and_closes(browser, by, close):
    small = browser.box(".right svg")
    middle = (small[0] + small[2]) / 2, (small[1] + small[3]) / 2
    if by == "click":
        browser.click(*middle)
    else:
        browser.ask("document.querySelector('.right button').focus()")
        browser.press("Enter")
    assert seen(browser, ":popover-open") == 1
    words = browser.ask("document.querySelector(':popover-open').innerText").replace("\n", " ")
    assert all(part in words for part in ("red.jpg", "0.900", "rank 1", "the right picture"))
    large = browser.box(":popover-open svg")
    assert large[2] - large[0] > 2 * (small[2] - small[0])
    shot = Image.open(io.BytesIO(base64.b64decode(browser.screenshot()))).convert("RGB")
    red = shot.getpixel((round(large[0] + large[2]) // 2, round(large[1] + large[3]) // 2))
    assert max(abs(a - b) for a, b in zip(red, COLOURS["red.jpg"], strict=True)) < 16
    browser.click(5, 5) if close == "click" else browser.press(close)
    assert seen(browser, ":popover-open") == 0 and browser.box(".right svg") == pytest.approx(small)
    if by == "Enter" and close != "click":
        assert browser.ask("document.activeElement.closest('li').className") == "right"  # where one was


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("scheme, dark", [("dark", True), ("light", False)])
def test_the_page_follows_the_colour_scheme(browser, scheme, dark):
    browser.scheme(scheme)
    shot = Image.open(io.BytesIO(base64.b64decode(browser.screenshot()))).convert("RGB")
    assert (max(shot.getpixel((5, 5))) < 60) == dark
    assert any(close(colour, "#c80000") for _, colour in shot.getcolors(2**24))  # a picture is on the screenshot
