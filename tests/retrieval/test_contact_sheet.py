"""The sheets: what is on them, that hostile text stays text, and (`browser`) that a browser shows every picture."""

import base64
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, ImageColor

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
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def load(image_id):
    return Image.new("RGB", SHAPES.get(image_id, (64, 48)), COLOURS.get(image_id, (10, 120, 10)))


def ranking(query, images, target=None, rank=None):
    return Ranking(query, images, [0.9 - 0.1 * place for place in range(len(images))], target, rank)


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
    assert max(thumbnails("blue.jpg").size) == 288 and thumbnails("blue.jpg").size == (72, 288)


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


def test_the_page_is_complete_and_escaped(sheet):
    text = render_page(sheet, Thumbnails(load))
    page = Page(text)
    assert not page.all("script") and HOSTILE in page.texts
    assert [image for image in page.all("img") if "onerror" in image] == []
    assert len(page.all("article")) == 3 and len(page.all("img")) == 2 * 2 + (2 + 1) + (2 + 1) + 1
    for image in page.all("img"):
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/jpeg;base64" and image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"]))
    assert not re.findall(r"(?:https?:)?//[a-z]", text)  # nothing from elsewhere
    kinds = [figure["class"] for figure in page.all("figure")]
    assert kinds.count("right") == 4 and kinds.count("missed") == 2
    assert all(figure["tabindex"] == "0" for figure in page.all("figure"))
    assert {"rank 1", "rank 2", "rank 3", "not found"} <= set(page.texts)
    alts = [image["alt"] for image in page.all("img")]
    assert "Place 1: red.jpg, the right picture" in alts and "The right picture, not found: sky.jpg" in alts
    assert [article["class"] for article in page.all("article")] == ["hit", "hit", "miss"]


def chromium(tmp_path, url, *flags):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
def test_a_browser_loads_every_picture(sheet, tmp_path):
    """The page is opened in a frame beside a script that counts what has loaded: the page itself has none."""
    path = write_sheet_page(sheet, Thumbnails(load), tmp_path / "sheet.html")
    probe = tmp_path / "probe.html"
    probe.write_text(f"""<!DOCTYPE html><pre id="out"></pre>
    <iframe src="{path.name}" width="1400" height="900"></iframe><script>
    addEventListener("load", () => {{
      const page = frames[0].document, images = [...page.images];
      const shown = e => e.getClientRects().length > 0;
      const count = () => [...page.querySelectorAll("article")].filter(shown).length;
      const all = count();
      page.getElementById("show-missed").click(); const missed = count();
      page.getElementById("show-found").click(); const found = count();
      page.getElementById("show-all").click();
      const medium = images[0].clientWidth; page.getElementById("size-l").click();
      document.getElementById("out").textContent = JSON.stringify({{
        images: images.length, loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
        titles: [...page.querySelectorAll("h2")].map(e => e.innerText), all, missed, found,
        larger: images[0].clientWidth > medium, wide: page.documentElement.scrollWidth > 1400,
        scripts: page.scripts.length }});
    }});</script>""")
    dom = chromium(
        tmp_path, probe.as_uri(), "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"
    )
    seen = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert seen == {
        "images": 11,
        "loaded": 11,
        "titles": ["a red one", HOSTILE, "the sky"],
        "all": 3,
        "missed": 1,
        "found": 2,
        "larger": True,
        "wide": False,
        "scripts": 0,
    }


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on the PATH")
@pytest.mark.parametrize("scheme, dark", [("0", True), ("1", False)])
def test_the_page_follows_the_colour_scheme(sheet, tmp_path, scheme, dark):
    path = write_sheet_page(sheet, Thumbnails(load), tmp_path / "sheet.html")
    shot = tmp_path / "shot.png"
    flags = [f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,800", f"--screenshot={shot}"]
    chromium(tmp_path, path.as_uri(), *flags)
    with Image.open(shot) as picture:
        corner = picture.convert("RGB").getpixel((5, 5))
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert (max(corner) < 60) == dark
    assert any(close(colour, "#c80000") for colour in colours)  # a thumbnail is on the screenshot
