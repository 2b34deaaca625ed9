"""The cache of `datasets`: a flipped byte, a cut and an empty file are found and made anew; one line where there can be none."""

from pathlib import Path

import datasets
import pytest
from datasets import Features, Value

from imagedex.corpora.cached import cached_rows
from imagedex.errors import UserError

FEATURES = Features({"name": Value("string")})


def names():
    yield from ({"name": f"picture {number}"} for number in range(50))


def rows():
    return cached_rows(names, FEATURES, {}, "test-cached")


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_cache_is_made_anew(damage, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = rows()["name"][:]
    path = Path(rows().cache_files[0]["filename"])
    content = path.read_bytes()
    assert "is damaged" not in caplog.text
    place = content.index(b"picture 17")
    broken = {"flipped": content[:place] + b"q" + content[place + 1 :], "cut": content[: place + 3], "empty": b""}
    path.write_bytes(broken[damage])
    assert rows()["name"][:] == expected and caplog.text.count("is damaged; it is made anew") == 1
    assert path.read_bytes() == content
    assert rows()["name"][:] == expected and caplog.text.count("is damaged") == 1


def test_what_was_made_of_the_rows_is_checked_too(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def louder(row):
        return {"name": row["name"].upper()}

    expected = rows().map(louder)["name"][:]
    path = Path(rows().map(louder).cache_files[0]["filename"])  # its checksum is known from here on
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PICTURE 17", b"picture 17"))
    assert rows().map(louder)["name"][:] == expected and "is damaged" in caplog.text


def test_a_cache_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match="HF_DATASETS_CACHE") as said:
        rows()
    assert "\n" not in str(said.value)
