"""The page in a real browser: type, see, click, drop, upload, search again. And the JSON endpoint."""

import base64
import io
import json
import socket
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from browser import CHROMIUM
from PIL import Image

pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from page_in_browser import Page, served

from imagedex.gallery.gallery import Gallery
from imagedex.page.server import application


def watch_calls(monkeypatch):
    """A list that gets the address of each machine but this one which the server's process calls."""
    called, connect = [], socket.socket.connect

    def watched(own, address):
        if own.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(
            ("127.", "::1", "localhost")
        ):
            called.append(address)
        return connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return called


@pytest.fixture(scope="module")
def address(gallery):
    with served(application([gallery])) as address:
        yield address


def ask(address, **body):
    request = urllib.request.Request(
        f"{address}/imagedex/search", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_endpoint_says_what_the_gallery_says(address, gallery):
    status, answer = ask(address, query=["a dog"], top_k=4, where="folder == 'sea'")
    found = gallery.search("a dog", top_k=4, where="folder == 'sea'")
    assert status == 200 and answer["images"] == [one.image_id for one in found]
    assert answer["scores"] == pytest.approx([one.score for one in found], abs=1e-5)
    both = gallery.search("a dog", "a beach", top_k=3)
    assert ask(address, query=["a dog", "a beach"], top_k=3)[1]["images"] == [one.image_id for one in both]


def test_near_duplicates_are_folded_on_request(address):
    one = ask(address, query=["a dog"], top_k=50)[1]["images"]
    folded = ask(address, query=["a dog"], top_k=50, fold=True)[1]["images"]
    assert {"sea/1.png", "sea/copy.png"} <= set(one) and len({"sea/1.png", "sea/copy.png"} & set(folded)) <= 1


def test_the_endpoint_leaves_out_what_probably_does_not_match(address, knowing):
    with served(application([knowing])) as knows:
        for keep in (0.5, 0.8, 0.2):
            status, answer = ask(knows, query=["a dog"], top_k=50, keep=keep)
            assert status == 200
            assert answer["images"] == [one.image_id for one in knowing.search("a dog", top_k=50, keep=keep)]
        assert len(ask(knows, query=["a dog"], top_k=50, keep=0.5)[1]["images"]) == 4
    assert "bank" in ask(address, query=["a dog"], keep=0.5)[1]["detail"]  # a model that has none says so


def test_more_than_is_read_is_refused(address):
    for path, size in (("search", 2**18 + 1), ("gradio_api/queue/join", 2**18 + 1), ("gradio_api/upload", 2**28)):
        path = path if path.startswith("gradio") else f"imagedex/{path}"
        request = urllib.request.Request(f"{address}/{path}", b"{}", {"content-length": str(size)}, method="POST")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        assert error.value.code == 413


@pytest.mark.parametrize(
    "body",
    [{}, {"query": []}, {"query": [""]}, {"query": "dog"}, {"query": ["dog"], "top_k": 0}, {"query": ["dog"], "top_k": 10**9},
     {"query": ["dog"], "where": "__import__('os')"}, {"query": ["dog"] * 100}, {"query": ["dog"], "keep": 1},
     {"query": ["dog"], "keep": "nan"}],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(address, body):
    assert ask(address, **body)[0] == 422


def test_nothing_but_the_gallery_is_served(address, gallery, photos):
    key = gallery.table["key"][0].as_py().hex()
    for route in ("thumbnail", "picture"):
        with urllib.request.urlopen(f"{address}/imagedex/{route}/0/{key}") as answer:
            assert Image.open(io.BytesIO(answer.read())).format == "JPEG"
    refused = [f"/imagedex/picture/0/{'0' * 32}", f"/imagedex/picture/1/{key}", f"/imagedex/picture/-1/{key}"]
    refused += ["/imagedex/picture/0/..%2F..%2Fsecret.png", f"/gradio_api/file={photos.parent / 'secret.png'}"]
    refused += [f"/gradio_api/file={photos / 'sea' / '1.png'}"]
    for path in refused:
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(address + path)
        assert error.value.code in (403, 404, 422)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_type_see_click_drop_upload_and_search_again(address, gallery, photos, paint, hostile, tmp_path, monkeypatch):
    called = watch_calls(monkeypatch)
    with Page(tmp_path, address, width=1200, height=900) as page:
        page.type("#query :is(input, textarea)", "a dog")
        page.until("document.querySelectorAll('#grid-0 figure').length == 8")  # nine, two of which are one
        shown = page.titles()
        assert shown[0] == gallery.search("a dog", top_k=1)[0].image_id and 'wood/<b>"x.png' in shown
        page.until("[...document.querySelectorAll('#grid-0 figure img')].every(image => image.naturalWidth > 0)")
        assert hostile in shown  # as it is, and no program
        assert not page.ask("document.body.hasAttribute('p')")

        left, top, right, bottom = page.box("#grid-0 figure")  # large, and closed by a key
        page.click((left + right) / 2, (top + bottom) / 2)
        page.until("document.querySelector('#grid-0 dialog').open")
        page.press("Escape")
        page.until("!document.querySelector('#grid-0 dialog').open")

        page.ask("document.querySelectorAll('#grid-0 .more')[6].click()")
        page.until(f"document.querySelector('#chips')?.innerText.includes({json.dumps(shown[6])})")
        like = gallery.search("a dog", str(photos / shown[6]), top_k=1)[0]
        page.until(f"document.querySelector('#grid-0 .score').innerText == '{like.score:.3f}'")
        assert page.titles()[0] == like.image_id
        page.ask("document.querySelector('#forget').click()")
        page.until(f"document.querySelector('#grid-0 .score').innerText != '{like.score:.3f}'")
        assert page.titles() == shown

        page.ask("document.querySelector('#options button').click()")
        page.until("document.querySelector('#where :is(input, textarea)')?.offsetParent")
        page.type("#where :is(input, textarea)", "folder == 'wood'")
        page.until("document.querySelectorAll('#grid-0 figure').length == 5")
        assert all(title.startswith("wood/") for title in page.titles())
        page.type("#where :is(input, textarea)", "fodler == 1")
        page.until("document.querySelector('#grid-0 .message')?.innerText.includes('did you mean folder')")
        page.type("#where :is(input, textarea)", " ")
        page.until("document.querySelectorAll('#grid-0 figure').length == 8")

        mine = paint(tmp_path / "mine.png", 77)
        page.choose("#files input[type=file]", mine)
        page.until("document.querySelectorAll('#grid-0 figure').length == 9")
        assert "mine.png" in page.titles()
        page.type("#query :is(input, textarea)", " ")  # the picture alone is the question now
        page.choose("#picture input[type=file]", mine)
        page.until("document.querySelector('#grid-0 figure img')?.alt == 'mine.png'")

        page.resize(390, 844)
        time.sleep(0.5)
        assert page.ask("document.documentElement.scrollWidth") <= 390
        elsewhere = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        assert elsewhere == [] and called == []
        assert len(base64.b64decode(page.screenshot())) > 10_000


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_two_models_stand_beside_each_other(gallery, tiny_clip, photos, tmp_path):
    second = Gallery.open(tmp_path / "second", str(tiny_clip), device="cpu")
    second.add(photos)
    with served(application([gallery, second])) as address, Page(tmp_path, address) as page:
        page.type("#query :is(input, textarea)", "a dog")
        for number in (0, 1):
            page.until(f"document.querySelectorAll('#grid-{number} figure').length > 3")
            assert page.ask(f"document.querySelector('#grid-{number} .heading').innerText").endswith("ms")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_what_probably_does_not_match_is_hidden_and_shown_again(knowing, tmp_path):
    visible = "[...document.querySelectorAll('#grid-0 figure')].filter(one => one.offsetParent).length"
    with served(application([knowing], keep=0.5)) as address, Page(tmp_path, address) as page:
        page.type("#query :is(input, textarea)", "a dog")
        page.until("document.querySelector('#grid-0 .rest')?.innerText.includes('Show the rest')")
        kept = len(knowing.search("a dog", top_k=99, keep=0.5))
        assert 0 < page.ask(visible) <= kept < 8
        page.ask("document.querySelector('#grid-0 .rest').click()")
        page.until(f"{visible} == 8")
        assert page.ask("document.activeElement.className") == "improbable"  # one goes on from there

        page.ask("document.querySelector('#keep input').click()")
        page.until(f"!document.querySelector('#grid-0 .improbable') && {visible} == 8")
    with served(application([knowing], keep=0.2)) as address, Page(tmp_path / "second", address) as page:
        page.type("#query :is(input, textarea)", "a dog")
        page.until("document.querySelector('#grid-0 .message').innerText.includes('Nothing here seems to match')")
        assert page.ask(visible) == 0
        page.ask("document.querySelector('#grid-0 .rest').click()")
        page.until(f"{visible} == 8 && !document.querySelector('#grid-0 .message')")


class Writing:
    """A gallery whose model writes identifiers, as far as the page sees it; its pictures are those of another."""

    def __init__(self, gallery):
        self.gallery, self.model = gallery, SimpleNamespace(name="runs/writer", paths=self.paths)

    def __len__(self):
        return len(self.gallery)

    def __getattr__(self, name):
        return getattr(self.gallery, name)

    def paths(self, sentence, image_ids):
        return [
            [("2", -0.25, 3), (f"<{number}>", -1.5 - number, 12), ("</s>", -0.01, 1)]
            for number in range(len(image_ids))
        ]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_model_that_writes_identifiers_says_how(gallery, tmp_path):
    with served(application([gallery, Writing(gallery)])) as address, Page(tmp_path, address) as page:
        page.type("#query :is(input, textarea)", "a dog")
        page.until("document.querySelectorAll('#grid-1 figure').length > 3")
        page.ask("document.querySelector('#grid-1 summary').click()")
        page.until("document.querySelector('#grid-1 .trie').getBoundingClientRect().height > 100")
        texts = page.ask("[...document.querySelectorAll('#grid-1 .trie text')].map(text => text.textContent)")
        assert {"2", "<0>", "-0.25", "-1.50", "3", "12", page.titles(1)[0]} <= set(texts)
        assert not page.ask("!!document.querySelector('#grid-0 .trie')")
        assert not page.ask("!!document.querySelector('#files')?.offsetParent")  # what has no identifier is not found
