"""Tables in any dialect with any text: every row and every caption is read back, or there is one clear line."""

import csv
import json
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagedex.corpora import load_corpus
from imagedex.errors import UserError

PICTURES = [f"p{number}.png" for number in range(6)]
# All of Unicode but surrogates and NUL, and often what tables are made of. A cell that begins as a list is a list of captions.
SIGNS = st.one_of(
    st.sampled_from(list("\"'|,;\t\\ #\n=") + ["\u2028", "\x85", "\r\n", "\ufeff", "NA"]),
    st.characters(exclude_categories=["Cs"], exclude_characters="\x00"),
)
TEXTS = st.lists(SIGNS, max_size=8).map("".join).filter(lambda text: not text.strip().startswith("["))
# A table that people wrote may end its rows with separators, which are no part of what is written.
LINES = TEXTS.map(lambda text: " ".join(text.split()).rstrip(", "))
ROWS = st.lists(st.tuples(st.sampled_from(PICTURES), TEXTS), min_size=1, max_size=8)
DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from([",", ";", "\t", "|"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
    }
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "images"
    folder.mkdir()
    for name in PICTURES:
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


def expected(rows):
    """Captions of each picture in the order of the rows, without blanks around them and without empty ones."""
    found = {}
    for name, text in rows:
        found.setdefault(name, []).extend([plain(text)] if text.strip() else [])
    return found


def plain(text):
    """Ends of lines within a caption may be written in any way."""
    return "\n".join(text.strip().replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def loaded(**options):
    rows = load_corpus(**options).splits["train"]
    captions = [[plain(caption) for caption in own] for own in rows["captions"]]
    return dict(zip(rows["image_id"], captions, strict=True))


def read_back(rows, may_refuse=False, **options):
    try:
        found = loaded(**options)
    except UserError as error:
        assert may_refuse and "\n" not in str(error) and len(str(error)) < 2000
        return
    assert found == expected(rows)


def written(path, rows, dialect, bom=False, header=("image", "caption")):
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, **dialect)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


@settings(max_examples=40)
@given(rows=ROWS, dialect=DIALECTS, bom=st.booleans())
@example([("p0.png", '"'), ("p1.png", 'b"c')], {"delimiter": ",", "quoting": csv.QUOTE_MINIMAL}, False)
@example([("p0.png", "007"), ("p1.png", "None"), ("p2.png", "1e5")], {"delimiter": ","}, False)
def test_csv(images, tmp_path_factory, rows, dialect, bom):
    """Tables as a program writes them. Separators other than the file's ending says may be refused, in one line; between bars
    nothing is quoted, as in Flickr30k's table."""
    if dialect["delimiter"] == "|":
        rows = [(name, "".join(sign for sign in " ".join(text.split()) if sign not in '"|')) for name, text in rows]
        dialect = dialect | {"quoting": csv.QUOTE_MINIMAL}
    suffix = ".tsv" if dialect["delimiter"] == "\t" else ".csv"
    file = written(tmp_path_factory.mktemp("table") / f"pairs{suffix}", rows, dialect, bom)
    read_back(rows, dialect["delimiter"] in ";|", train_file=file, image_dir=str(images))


@settings(max_examples=40)
@given(rows=ROWS, dialect=DIALECTS.filter(lambda dialect: dialect["delimiter"] == ","))
def test_captions_txt(images, tmp_path_factory, rows, dialect):
    """Flickr8k's form."""
    assume(any(text.strip() for _, text in rows))
    file = written(tmp_path_factory.mktemp("table") / "captions.txt", rows, dialect)
    read_back(rows, dataset_name=file, image_dir=str(images))


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(st.sampled_from(PICTURES), LINES.filter(bool)), min_size=1, max_size=8))
@example([("p0.png", '"a dog'), ("p1.png", "a cat"), ("p2.png", "grass")])
@example([("p0.png", '"Go" it says'), ("p1.png", 'a "dog"'), ("p2.png", 'grass"')])
def test_captions_txt_that_people_wrote(images, tmp_path_factory, rows):
    """Nothing is quoted: a line is a row, and what follows the first comma is the caption; or the line is named."""
    assume(all(unicodedata.category(sign) != "Cc" for _, text in rows for sign in text))
    file = tmp_path_factory.mktemp("table") / "captions.txt"
    file.write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in rows), encoding="utf-8")
    try:
        found = loaded(dataset_name=str(file), image_dir=str(images))
    except UserError as error:
        assert "\n" not in str(error)
        return
    quoted = {text for _, text in rows if text.startswith('"')}  # may have been a quoted caption
    wanted = expected(rows)
    assert found.keys() == wanted.keys() and {name: len(own) for name, own in found.items()} == {
        name: len(own) for name, own in wanted.items()
    }
    for name, own in wanted.items():
        assert all(text in quoted or text == read for text, read in zip(own, found[name], strict=True))


@settings(max_examples=30)
@given(rows=ROWS, ascii_only=st.booleans(), lists=st.booleans())
def test_jsonl(images, tmp_path_factory, rows, ascii_only, lists):
    file = tmp_path_factory.mktemp("table") / "pairs.jsonl"
    records = [{"file_name": name, "captions": [text, text] if lists else text} for name, text in rows]
    lines = [json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records]
    file.write_text("".join(lines), encoding="utf-8")
    rows = [row for row in rows for _ in range(1 + lists)]
    read_back(rows, train_file=str(file), image_dir=str(images))


@settings(max_examples=30)
@given(captions=st.dictionaries(st.sampled_from(PICTURES), st.lists(TEXTS, max_size=4), min_size=1))
def test_karpathy(images, tmp_path_factory, captions):
    entries = [
        {"filename": name, "split": "train", "sentids": [], "sentences": [{"raw": text} for text in own]}
        for name, own in captions.items()
    ]
    file = tmp_path_factory.mktemp("table") / "dataset_mine.json"
    file.write_text(json.dumps({"dataset": "mine", "images": entries}), encoding="utf-8")
    rows = [(name, text) for name, own in captions.items() for text in own or [""]]
    read_back(rows, dataset_name=str(file.parent), image_dir=str(images))
