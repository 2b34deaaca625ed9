"""Inputs that go wrong elsewhere: each is read right, or refused by one line. Many cases in one process.

Three pictures lie in `images`: a.png is red, b.png green, c.png blue.
"""

import base64
import io
import json
import zlib

import pytest
from PIL import Image

from imagedex.corpora import load_corpus
from imagedex.errors import UserError

CSV = "image,caption\n"
ROWS = [
    {"image": "a.png", "caption": "one"},
    {"image": "b.png", "caption": "two"},
    {"image": "c.png", "caption": "three"},
]
ALL = {"a.png": ["one"], "b.png": ["two"], "c.png": ["three"]}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def pictures(tmp_path, paint, colours):
    return paint(tmp_path / "images", {"a.png": colours["red"], "b.png": colours["green"], "c.png": colours["blue"]})


@pytest.fixture
def read(tmp_path, pictures, rows_of):
    """read(name, content) -> {split: {image_id: captions}} of this table, named with --train_file."""

    def run(name, content, **options):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        corpus = load_corpus(train_file=str(tmp_path / name), image_dir=str(pictures), **options)
        return {split: rows_of(rows) for split, rows in corpus.splits.items()}

    return run


READ = {
    "a mark that opens and never closes": (
        CSV + 'a.png,"No parking\nb.png,two\n',
        {"a.png": ['"No parking'], "b.png": ["two"]},
    ),
    "a mark that opens, one that closes three rows on": (
        CSV + 'a.png,"No parking\nb.png,two\nc.png,called Bella"\n',
        {"a.png": ['"No parking'], "b.png": ["two"], "c.png": ['called Bella"']},
    ),
    "two rows with a mark that opens": (
        CSV + 'a.png,"one\nb.png,"two\nc.png,three\n',
        {"a.png": ['"one'], "b.png": ['"two'], "c.png": ["three"]},
    ),
    "a quoted word at the start": (CSV + 'a.png,"Stop" says the sign\n', {"a.png": ['"Stop" says the sign']}),
    "a quoted word within": (CSV + 'a.png,a 5" dog, "Bella"\n', {"a.png": ['a 5" dog, "Bella"']}),
    "doubled marks": (CSV + 'a.png,"a ""big"", brown dog"\n', {"a.png": ['a "big", brown dog']}),
    "a caption over two lines": (
        CSV + 'a.png,"one\nmore, of it"\nb.png,two\n',
        {"a.png": ["one\nmore, of it"], "b.png": ["two"]},
    ),
    "the last row without an end": (CSV + "a.png,one\nb.png,two", {"a.png": ["one"], "b.png": ["two"]}),
    "unquoted commas": (CSV + "a.png,one, two, three\n", {"a.png": ["one, two, three"]}),
    "commas at the ends of rows": (CSV + "a.png,one,,\n", {"a.png": ["one"]}),
    "blank lines": (CSV + "\na.png,one\n\n , \nb.png,two\n", {"a.png": ["one"], "b.png": ["two"]}),
    "a byte order mark": ("\ufeff" + CSV + "a.png,one\n", {"a.png": ["one"]}),
    "Windows' line ends": (
        CSV.replace("\n", "\r\n") + "a.png,one\r\nb.png,two\r\n",
        {"a.png": ["one"], "b.png": ["two"]},
    ),
    "an old Mac's line ends": ("image,caption\ra.png,one\rb.png,two\r", {"a.png": ["one"], "b.png": ["two"]}),
    "signs that end a line elsewhere": (
        CSV + "a.png,one\u2028two\x85three\x0cfour\n",
        {"a.png": ["one\u2028two\x85three\x0cfour"]},
    ),
    "tabs": ("filepath\ttitle\na.png\tone, two\n", {"a.png": ["one, two"]}),
    "semicolons": ("image;caption\na.png;one, two\n", {"a.png": ["one, two"]}),
    "bars": ("image|caption\na.png|one, two\n", {"a.png": ["one, two"]}),
    "blanks after the commas": ('image, caption\na.png, "one, two"\n', {"a.png": ["one, two"]}),
    "a comma that ends a caption": (CSV + "a.png,one,\n", {"a.png": ["one"]}),
    "other cases of the names": ("Image,CAPTION\na.png,one\n", {"a.png": ["one"]}),
    "pandas' index": (",image,caption\n0,a.png,one\n1,b.png,two\n", {"a.png": ["one"], "b.png": ["two"]}),
    "two columns without a name": (",,image,caption\n0,0,a.png,one\n", {"a.png": ["one"]}),
    "a list in JSON in a cell": (CSV + 'a.png,"[""one"", ""two""]"\n', {"a.png": ["one", "two"]}),
    "a list in Python in a cell": (
        CSV + 'a.png,"[\'one\', ""two\'s""]"\nb.png,"[\'three\']"\n',
        {"a.png": ["one", "two's"], "b.png": ["three"]},
    ),
    "brackets that are no list": (CSV + "a.png,[laughs]\nb.png,two\n", {"a.png": ["[laughs]"], "b.png": ["two"]}),
    "a row twice": (CSV + "a.png,one\na.png,one\n", {"a.png": ["one", "one"]}),
    "empty captions": (CSV + "a.png,\nb.png,two\nb.png,  \n", {"a.png": [], "b.png": ["two"]}),
    "all captions empty": (CSV + "a.png,\nb.png,\n", {"a.png": [], "b.png": []}),
    "numbers and words that pandas would change": (
        CSV + "a.png,007\nb.png,None\nc.png,NA\n",
        {"a.png": ["007"], "b.png": ["None"], "c.png": ["NA"]},
    ),
    "Windows' paths": (CSV + "./a.png,one\n", {"a.png": ["one"]}),
}


@pytest.mark.parametrize(("content", "expected"), READ.values(), ids=READ)
def test_a_table_is_read_as_it_is_written(read, content, expected):
    assert read("table.csv", content) == {"train": expected}


JSON_READ = {
    "texts and lists": (
        lines([{"image": "a.png", "caption": ["x", "y"]}, {"image": "b.png", "caption": "z"}]),
        {"a.png": ["x", "y"], "b.png": ["z"]},
    ),
    "lists with nothing in them": (
        lines([{"image": "a.png", "caption": ["x", None, ""]}, {"image": "b.png", "caption": []}]),
        {"a.png": ["x"], "b.png": []},
    ),
    "captions that are null or missing": (
        lines([{"image": "a.png", "caption": None}, {"image": "b.png"}, *ROWS[2:]]),
        {"a.png": [], "b.png": [], "c.png": ["three"]},
    ),
    "a number among captions": (
        lines([{"image": "a.png", "caption": 7}, *ROWS[1:]]),
        {"a.png": ["7"], "b.png": ["two"], "c.png": ["three"]},
    ),
    "columns of any kind beside": (
        lines([{"more": {"a": [1]}, **ROWS[0]}, {"more": 2**80, **ROWS[1]}, {"more": "x", **ROWS[2]}]),
        ALL,
    ),
    "a list of rows": (json.dumps(ROWS, indent=2), ALL),
    "a line separator, unescaped": ('{"image": "a.png", "caption": "one\u2028two"}\n', {"a.png": ["one\u2028two"]}),
    "signs beyond the first plane": (
        lines([{"image": "a.png", "caption": "a dog \U0001f415"}]),
        {"a.png": ["a dog \U0001f415"]},
    ),
    "a byte order mark": ("\ufeff" + lines(ROWS), ALL),
}


@pytest.mark.parametrize(("content", "expected"), JSON_READ.values(), ids=JSON_READ)
def test_json_is_read_as_it_is_written(read, content, expected):
    assert read("table.jsonl", content) == {"train": expected}


REFUSED = {
    "nothing": ("t.csv", "", "t.csv is empty"),
    "blanks": ("t.csv", "\n \n", "t.csv is empty"),
    "a header alone": ("t.csv", CSV, "t.csv holds no row"),
    "no header": ("t.csv", "a.png,one\nb.png,two\n", r"begins with a row \(a.png,one\) where a header is expected"),
    "Conceptual Captions, not downloaded": (
        "t.tsv",
        "a dog runs\thttp://x.org/z.jpg\ntwo\thttp://x.org/y.jpg\n",
        r"2 pictures by address \(http://x.org/z.jpg\), and none lies below .*images; none is fetched .*img2dataset",
    ),
    "addresses alone": (
        "t.csv",
        "url,caption\nhttp://x.org/z.jpg,one\n",
        "1 picture by address .*, and none lies below",
    ),
    "addresses and paths": (
        "t.csv",
        CSV + "a.png,one\nhttp://x.org/a.png,one\n",
        "1 picture by address .*; none is fetched",
    ),
    "a column twice": (
        "t.csv",
        "image,caption,caption\na.png,one,two\n",
        "names a column twice: image, caption, caption",
    ),
    "a row too short": (
        "t.csv",
        CSV + "a.png,one\nb.png\n",
        r"line 3: 2 fields expected \(image, caption\), got 1: b.png",
    ),
    "a row too long": (
        "t.csv",
        "caption,image\none,a.png\none, two,b.png\n",
        "line 3: 2 fields expected .*, got 3: one, two,b.png",
    ),
    "a row without a picture": ("t.csv", CSV + "a.png,one\n,two\n", "row 1 names no picture"),
    "Latin-1": (
        "t.csv",
        (CSV + "a.png,one\nb.png,caf\xe9\n").encode("latin-1"),
        r"not UTF-8 text \(line 3, byte 0xe9\); save it as UTF-8",
    ),
    "UTF-16": ("t.csv", (CSV + "a.png,one\n").encode("utf-16"), "not UTF-8 text but UTF-16; save it as UTF-8"),
    "a NUL byte": ("t.csv", CSV + "a.png,one\nb.png,t\0wo\n", "line 3: a NUL byte"),
    "a caption of a million characters": (
        "t.csv",
        CSV + "a.png," + "x" * 1_000_000 + "\n",
        "a caption has 1,000,000 characters, 20,000 is the most",
    ),
    "a name of a hundred thousand": (
        "t.csv",
        CSV + "a" * 100_000 + ".png,one\n" + "a.png,two\n",
        r"1 picture of the train split named .* but not there",
    ),
    "a path above": ("t.csv", CSV + "a.png,x\n../secret.png,y\n", "names .*secret.png, which is not below .*images"),
    "a path elsewhere": (
        "t.csv",
        CSV + "a.png,x\n/etc/secret.png,y\n",
        "names /etc/secret.png, which is not below .*images",
    ),
    "lists that are none": ("t.csv", CSV + "a.png,['one' 'two']\n", r"row 0 is no list of captions: \['one' 'two'\]"),
    "unknown splits": (
        "t.csv",
        "image,caption,split\na.png,one,train\nb.png,two,later\n",
        "column split names splits that are not known: 'later'",
    ),
    "rows of numbers": ("t.jsonl", "1\n2\n", "line 1: a JSON object is expected, got 1"),
    "a line that is cut": ("t.jsonl", lines(ROWS) + '{"image": "a.p', "line 4 is no valid JSON"),
    "half of a character": (
        "t.jsonl",
        lines(ROWS) + '{"image": "a.png", "caption": "\\ud83d"}',
        "line 4: caption holds half of a character",
    ),
    "half of one in a list": (
        "t.jsonl",
        '{"image": "a.png", "caption": ["a", "\\udc15"]}',
        "line 1: caption holds half of a character",
    ),
    "a huge number": ("t.jsonl", '{"image": "a.png", "caption": ' + "9" * 5000 + "}", "line 1 is no valid JSON"),
    "deep nesting": (
        "t.jsonl",
        '{"image": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "line 1 is no valid JSON: nested too deeply",
    ),
    "captions that are mappings": (
        "t.jsonl",
        '{"image": "a.png", "caption": {"en": "one"}}',
        "no caption column .caption is no text or list of texts",
    ),
    "pictures that are numbers": (
        "t.jsonl",
        '{"image": 3, "caption": "one"}',
        "has no image column; its columns are image, caption",
    ),
    "a NUL in a name": (
        "t.jsonl",
        lines([*ROWS, {"image": "a\0.png", "caption": "x"}]),
        "1 picture of the train split named .* but not there",
    ),
    "COCO's annotations": (
        "t.json",
        '{"images": [{"id": 1}], "annotations": []}',
        "one JSON object with the keys images, annotations.*--dataset_name",
    ),
    "JSON that is null": ("t.json", "null", "line 1: a JSON object is expected, got None"),
    "an empty list": ("t.json", "[]", "t.json holds no row"),
    "JSON in UTF-16": ("t.jsonl", lines(ROWS).encode("utf-16"), "not UTF-8 text but UTF-16"),
    "parquet that is none": ("t.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
    "base64 that is cut": (
        "t.tsv",
        "image\tcaption\niVBORw0KGgo" + "A" * 200 + "!\tone\n",
        "row 0 is no picture in base64",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_table_is_refused_by_one_line(read, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(name, content)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_downloaded_pictures_are_found_by_their_address(read, pictures, caplog):
    addresses = [
        "http://x.org/a.png",
        "http://y.org/b.png?size=3",
        "http://y.org/1/c.png",
        "http://z.org/c.png",
        "http://[",
    ]
    (pictures / f"3_{zlib.crc32(addresses[3].encode())}").write_bytes((pictures / "c.png").read_bytes())
    table = "".join(f"caption {row}\t{address}\n" for row, address in enumerate(addresses))
    with caplog.at_level("INFO"):
        found = read("t.tsv", table, unreadable_images="skip")["train"]
    # two addresses end in c.png: neither is taken for it
    assert found == {
        "a.png": ["caption 0"],
        "b.png": ["caption 1"],
        f"3_{zlib.crc32(addresses[3].encode())}": ["caption 3"],
    }
    assert "of 5 pictures by address, 3 lie below" in caplog.text
    with pytest.raises(UserError, match="2 pictures of the train split named by the captions but not there"):
        read("t.tsv", table)


def test_what_is_read_with_doubt_is_said(read, caplog):
    with caplog.at_level("INFO"):
        read("t.csv", CSV + 'a.png,"one\na.png,"one\nb.png,x, y\n')
    for said in (
        "2 rows with a quotation mark that does not pair, read as written: line 2, 3",
        "1 row with ',' unquoted in caption, read as a part of it: line 4",
        "1 caption given twice to the same picture",
        "1 picture without a row in the captions, not used: c.png",
    ):
        assert said in caplog.text


SPLIT = {"train": {"a.png": ["one"], "b.png": ["two"]}, "test": {"c.png": ["three"]}}


@pytest.mark.parametrize(
    "words", [("train", "train", "test"), ("Train", "restval", "TEST"), ("training", "train", "testing")]
)
def test_a_column_of_splits_is_kept(read, words):
    table = "image,split,caption\n" + "".join(
        f"{row['image']},{word},{row['caption']}\n" for row, word in zip(ROWS, words, strict=True)
    )
    assert read("t.csv", table) == SPLIT
    assert read("t.csv", table, put_aside="--held_out_images") == {"train": ALL}


def test_one_split_alone_is_trained(read):
    assert read("t.csv", "image,split,caption\na.png,test,one\n") == {"train": {"a.png": ["one"]}}


def test_folders_of_splits_are_kept(tmp_path, paint, colours, rows_of):
    paint(tmp_path / "p", {"train/a.png": colours["red"], "val/b.png": colours["green"]})
    (tmp_path / "p" / "metadata.csv").write_text("file_name,text\ntrain/a.png,one\nval/b.png,two\n")
    splits = load_corpus(str(tmp_path / "p")).splits
    assert {name: rows_of(rows) for name, rows in splits.items()} == {
        "train": {"train/a.png": ["one"]},
        "validation": {"val/b.png": ["two"]},
    }


def test_base64_pictures(read, pictures):
    coded = [base64.b64encode((pictures / f"{name}.png").read_bytes()).decode() for name in "abc"]
    table = (
        f"image\tcaption\n{coded[0]}\tone\n{coded[1]}\ttwo\n{coded[0]}\tmore\ndata:image/png;base64,{coded[2]}\tthree\n"
    )
    (captions,) = read("t.tsv", table).values()
    assert list(captions.values()) == [["one", "more"], ["two"], ["three"]]
    assert all(len(name) == 28 and name.endswith(".png") for name in captions)


def test_rows_that_hold_paths_stay_in_the_folder(tmp_path, pictures, write_parquet, rows_of):
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "png")
    (tmp_path / "outside.png").write_bytes(content.getvalue())
    file, held = tmp_path / "t.parquet", {"bytes": content.getvalue(), "path": "x.png"}
    options = {"train_file": str(file), "image_dir": str(pictures)}

    def paths(*names):
        return [({"bytes": None, "path": name}, name) for name in names]

    write_parquet(file, paths("a.png", str(pictures / "b.png")))
    assert rows_of(load_corpus(**options).splits["train"]) == {"a.png": ["a.png"], "b.png": [str(pictures / "b.png")]}
    for rows, message in (
        (paths("a.png", str(tmp_path / "outside.png")), "which is not below"),
        (paths("a.png", "../outside.png"), "which is not below"),
        (paths("http://127.0.0.1:9/a.png"), "by address"),
        ([(held, "one"), *paths(str(tmp_path / "outside.png"))], "1 row of 2 hold the path of a picture .*row 1"),
        (
            [({"bytes": None, "path": None}, "one"), *paths("a.png")],
            "hold the path of a picture in place of the picture",
        ),
    ):
        write_parquet(file, rows)
        with pytest.raises(UserError, match=message):
            load_corpus(**options)
