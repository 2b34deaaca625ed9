import pytest

from imagedex.errors import UserError
from imagedex.gallery.query import Part, read_parts


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "2:b.jpg", "dog"):
        (tmp_path / name).write_bytes(b"")


@pytest.mark.parametrize(
    "words,parts",
    [
        (["two dogs"], [Part(text="two dogs")]),
        (["a.jpg"], [Part(path="a.jpg")]),
        (["dog"], [Part(path="dog")]),
        (
            ["a.jpg::00012:image", "0.5:a.jpg::5+7"],
            [Part(path="a.jpg::00012:image"), Part(path="a.jpg::5+7", weight=0.5)],
        ),
        (["image:a.jpg::0:b", "a.jpg::leash"], [Part(path="a.jpg::0:b"), Part(text="a.jpg::leash")]),
        (["b.jpg::0:image"], [Part(text="b.jpg::0:image")]),
        (["text:dog"], [Part(text="dog")]),
        (["image:a.jpg"], [Part(path="a.jpg")]),
        (["cat", "+", "a.jpg", "-", "leash"], [Part(text="cat"), Part(path="a.jpg"), Part(text="leash", weight=-1.0)]),
        (["2:cat", "0.5:a.jpg"], [Part(text="cat", weight=2.0), Part(path="a.jpg", weight=0.5)]),
        (["2:b.jpg"], [Part(path="2:b.jpg")]),
        (["cat", "-", "2:text:dog"], [Part(text="cat"), Part(text="dog", weight=-2.0)]),
        (["at 10: a clock"], [Part(text="at 10: a clock")]),
        (["10: a clock"], [Part(text="10: a clock")]),
        (["-5 degrees"], [Part(text="-5 degrees")]),
        (["x" * 5000], [Part(text="x" * 5000)]),
    ],
)
def test_parts(here, words, parts):
    assert read_parts(words) == parts


@pytest.mark.parametrize(
    "words", [[], [""], ["text:"], ["image:b.jpg"], ["cat", "-"], ["-", "cat"], ["cat", "+"], [" "], ["0:cat"]]
)
def test_what_asks_nothing_is_refused(here, words):
    with pytest.raises(UserError):
        read_parts(words)
