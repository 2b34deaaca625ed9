"""docs/*.svg: self-contained, readable in light and dark, and no text over other text or outside the card."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
DRAWINGS = sorted(DOCS.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)

# Asks the browser where every text lies, and reports texts that leave the card and pairs that overlap by over a pixel.
MEASURE = """
const card = document.querySelector("svg").getBoundingClientRect(), found = [];
const texts = [...document.querySelectorAll("svg text")].map(t => ({s: t.textContent, r: t.getBoundingClientRect()}));
for (const {s, r} of texts)
  if (r.left < card.left + 8 || r.right > card.right - 8 || r.top < card.top + 8 || r.bottom > card.bottom - 8)
    found.push("leaves the card: " + s);
texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
  const width = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
  const height = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
  if (width > 1 && height > 4) found.push(`overlap: ${a.s} / ${b.s}`);
}));
const report = document.createElement("pre");
report.textContent = JSON.stringify({texts: texts.length, found});
document.body.append(report);
"""


def test_the_four_drawings_are_there():
    assert {"codebook_t5.svg", "dataflow.svg", "vision_grounded_t5.svg", "xmatching.svg"} <= {d.name for d in DRAWINGS}


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda d: d.stem)
def test_self_contained_described_and_themed(drawing):
    source = drawing.read_text(encoding="utf-8")
    root = ElementTree.fromstring(source)
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text
    assert len(list(root.iter(f"{SVG}text"))) > 10  # text is text
    assert not list(root.iter(f"{SVG}image")) and not list(root.iter(f"{SVG}script"))
    assert re.findall(r"https?://\S+?(?=\")", source.replace("http://www.w3.org/2000/svg", "")) == []


@pytest.mark.browser
@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda d: d.stem)
def test_no_text_overlaps_or_leaves_the_card(drawing, tmp_path):
    assert CHROMIUM, "the browser tests need chromium"
    page = tmp_path / "page.html"
    body = f"<body style='margin:0'>{drawing.read_text(encoding='utf-8')}<script>{MEASURE}</script></body>"
    page.write_text(f"<!doctype html><meta charset='utf-8'>{body}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}/profile"]
    command = [CHROMIUM, *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)[1]))
    assert report["texts"] > 10
    assert report["found"] == []
