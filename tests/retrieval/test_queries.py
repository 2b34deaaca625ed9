"""Every form of a file of queries, and what is said about the wrong ones."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from imagedex.errors import UserError
from imagedex.retrieval.queries import Queries, check_targets, open_queries, read_queries
from imagedex.retrieval.turns import Turns

SENTENCES = ["a dog , running", "größer \u2028 als ein Haus", 'says "stop"']
IMAGES = ["a.jpg", "dogs/b.jpg", "a.jpg"]
EXPECTED = ["a dog , running", "größer als ein Haus", 'says "stop"']


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_table(path, columns):
    """The same table in the form of the extension, each written by another library than the one that reads it."""
    import pandas

    table = pandas.DataFrame(columns)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["caption", "question"])
def test_tables_with_and_without_right_pictures(tmp_path, extension, column):
    path = write_table(tmp_path / f"q{extension}", {"id": [1, 2, 3], column: SENTENCES})
    assert read_queries(path, column) == Queries(EXPECTED, None)
    path = write_table(tmp_path / f"q{extension}", {column: SENTENCES, "image": IMAGES})
    assert read_queries(path, column) == Queries(EXPECTED, [(image,) for image in IMAGES])
    path = write_table(tmp_path / f"q{extension}", {column: SENTENCES, "image": [None] * 3})
    assert read_queries(path, column) == Queries(EXPECTED, None)


def test_text_is_one_sentence_a_line(tmp_path):
    path = write(tmp_path, "q.txt", "\ufeffa dog\r\n\r\n  two\tcats \nlast")
    assert read_queries(path, "whatever") == Queries(["a dog", "two cats", "last"])


def test_csv_with_byte_order_mark_and_line_breaks(tmp_path):
    path = write(tmp_path, "q.csv", '\ufeffcaption,image\r\n"a dog,\nrunning",a.jpg\r\n')
    assert read_queries(path) == Queries(["a dog, running"], [("a.jpg",)])


def test_extension_in_capitals(tmp_path):
    assert read_queries(write(tmp_path, "Q.TXT", "a")).sentences == ["a"]


WRONG = {
    "no such file": ("missing.csv", None, "does not exist"),
    "unknown extension": ("q.xlsx", "x", "must end in .txt, .csv, .jsonl or .parquet"),
    "empty txt": ("q.txt", "\n \n", "holds no queries"),
    "empty csv": ("q.csv", "", "holds no queries"),
    "csv with a header only": ("q.csv", "caption,image\n", "holds no queries"),
    "empty jsonl": ("q.jsonl", "\n", "holds no queries"),
    "no column in csv": ("q.csv", "text,image\na dog,a.jpg\n", "no column 'caption'; it has 'text', 'image'"),
    "no column in jsonl": ("q.jsonl", '{"text": "a"}', "no column 'caption'; it has 'text'"),
    "empty sentence": ("q.csv", 'caption,id\na,1\n" ",2\n', "line 3: the sentence is empty"),
    "short csv row": ("q.csv", "id,caption\n1,a\n2\n", "line 3: column 'caption' holds None"),
    "unquoted comma": ("q.csv", "image,caption\na.jpg,a dog, running\n", "line 2: more fields"),
    "not a sentence": ("q.jsonl", '{"caption": 3}', "line 1: column 'caption' holds 3"),
    "missing in one row": ("q.jsonl", '{"caption": "a"}\n{"text": "b"}', "line 2: column 'caption' holds None"),
    "not json": ("q.jsonl", '{"caption": "a"}\n{', "line 2 is not JSON"),
    "not an object": ("q.jsonl", '["a"]', "line 1 is not a JSON object"),
    "not parquet": ("q.parquet", "x", "not a Parquet file"),
    "not utf-8": ("q.txt", "größe".encode("latin-1"), "not UTF-8"),
    "some right pictures": ("q.csv", "caption,image\na,a.jpg\nb,\nc,\n", "2 of 3 have none, the first is line 3"),
    "half a surrogate pair": ("q.jsonl", '{"caption": "a \\ud83d dog"}', "half of a surrogate pair"),
    "a picture of half a pair": ("q.jsonl", '{"caption": "a", "image": "\\ud83d.jpg"}', "half of a surrogate pair"),
    "a number of 5,000 digits": ("q.jsonl", '{"caption": "a", "n": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    "100,000 brackets": ("q.jsonl", '{"caption": "a", "n": ' + "[" * 100_000, "line 1 is not JSON"),
    "a long thing": ("q.jsonl", '{"caption": [' + "1, " * 10_000 + "1]}", " …, not a sentence"),
    "null": ("q.jsonl", '{"caption": null}', "holds None, not a sentence"),
    "not a number": ("q.jsonl", '{"caption": NaN}', "holds nan, not a sentence"),
    "numbers as pictures": ("q.jsonl", '{"caption": "a", "image": 3}', "column 'image' holds 3, not the name"),
    "a list of numbers": ("q.jsonl", '{"caption": "a", "image": [3]}', "column 'image' holds [3], not the name"),
    "a list with a hole": (
        "q.csv",
        'caption,image\na,"[""x.jpg"", null]"\n',
        "not the name of the right picture or a list",
    ),
    "no right picture in one row": (
        "q.jsonl",
        '{"caption": "a", "image": []}\n{"caption": "b", "image": "b.jpg"}',
        "1 of 2",
    ),
    "a column twice": ("q.csv", "caption,image,caption\na,x.jpg,b\n", "several columns 'caption'"),
    "utf-16": ("q.csv", "caption\na\n".encode("utf-16"), "not UTF-8"),
    "broken quotes": ("q.csv", 'caption,image\n"a,a.jpg\n', "line"),
}


@pytest.mark.parametrize("name, content, message", WRONG.values(), ids=WRONG)
def test_wrong_files_get_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(UserError) as raised:
        read_queries(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_empty_parquet(tmp_path):
    path = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"caption": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match="holds no queries"):
        read_queries(path)


def test_right_pictures_outside_the_gallery_are_counted():
    queries = Queries(["a", "b", "c", "d"], [("x.jpg",), ("in.jpg",), ("in.jpg", "x.jpg"), ("y.jpg",)])
    with pytest.raises(
        UserError, match="3 of 4 queries in q.csv name 2 pictures that are not in the gallery of 1 .x.jpg, y"
    ):
        check_targets(queries, ["in.jpg"], "q.csv")
    check_targets(queries, ["in.jpg", "x.jpg", "y.jpg"], "q.csv")
    check_targets(Queries(["a"]), [], "q.csv")


def test_json_lines_may_be_written_by_hand(tmp_path):
    lines = [json.dumps({"caption": "a", "image": "x.jpg"}), "", json.dumps({"caption": "b", "image": "y.jpg", "n": 1})]
    assert read_queries(write(tmp_path, "q.jsonl", "\n".join(lines))).targets == [("x.jpg",), ("y.jpg",)]


SEVERAL = {  # file -> its right pictures
    "lists": ("q.jsonl", '{"caption": "a", "image": ["x.jpg", "y.jpg"]}\n{"caption": "b", "image": "z.jpg"}'),
    "JSON in a cell": ("q.csv", 'caption,image\na,"[""x.jpg"", ""y.jpg""]"\nb,z.jpg\n'),
    "the same one twice": ("q.jsonl",
                           '{"caption": "a", "image": ["x.jpg", "y.jpg", "x.jpg"]}\n{"caption": "b", "image": "z.jpg"}'),
    "semicolons": ("q.csv", 'caption;image\n"a";"[""x.jpg"", ""y.jpg""]"\nb;z.jpg\n'),
    "tabs and blanks": ("q.csv", 'image\tcaption\n"[""x.jpg"", ""y.jpg""]"\ta\nz.jpg\tb\n'),
    "blanks behind commas": ("q.csv", 'caption, image\na, "[""x.jpg"", ""y.jpg""]"\nb, z.jpg\n'),
    "byte order mark, CRLF": ("q.csv", '\ufeffcaption,image\r\na,"[""x.jpg"", ""y.jpg""]"\r\nb,z.jpg\r\n'),
}  # fmt: skip


@pytest.mark.parametrize("name, content", SEVERAL.values(), ids=SEVERAL)
def test_several_right_pictures(tmp_path, name, content):
    queries = read_queries(write(tmp_path, name, content))
    assert queries == Queries(["a", "b"], [("x.jpg", "y.jpg"), ("z.jpg",)])


def test_several_right_pictures_of_parquet(tmp_path):
    path = tmp_path / "q.parquet"
    table = {"caption": ["a", "b"], "image": [["x.jpg", "y.jpg"], ["z.jpg"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert read_queries(path).targets == [("x.jpg", "y.jpg"), ("z.jpg",)]


def test_a_name_that_only_begins_like_a_list_is_a_name(tmp_path):
    assert read_queries(write(tmp_path, "q.csv", "caption,image\na,[1] x.jpg\n")).targets == [("[1] x.jpg",)]


@pytest.mark.parametrize("column", ["Image", "file_name", "img"])
def test_a_column_of_another_name_is_said(tmp_path, caplog, column):
    assert read_queries(write(tmp_path, "q.csv", f"caption,{column}\na,x.jpg\n")).targets is None
    assert f"column 'image' of the right pictures is not there (but 'caption', '{column}')" in caplog.text


def test_an_empty_column_is_said(tmp_path, caplog):
    assert read_queries(write(tmp_path, "q.csv", "caption,image\na,\n")).targets is None
    assert "column 'image' of the right pictures is empty, so no figures are made" in caplog.text
    caplog.clear()
    read_queries(write(tmp_path, "q.txt", "a dog"))
    assert not caplog.text


@pytest.mark.parametrize("name, head", [("q.txt", ""), ("q.csv", "caption\n")])
def test_an_endless_sentence_is_cut_and_said(tmp_path, caplog, name, head):
    queries = read_queries(write(tmp_path, name, head + "a dog\n" + "ab" * 500_000 + "\n"))
    assert queries.sentences == ["a dog", "ab" * 5_000]
    assert "1 of 2 sentences have more than 10000 characters and are cut" in caplog.text


def test_signs_that_separate_lines_elsewhere_stay_in_a_sentence(tmp_path):
    assert read_queries(write(tmp_path, "q.txt", "a\u2028b\n\n \nc\x85d\n")).sentences == ["a b", "c d"]


DIALOGUES = ["hi\thello there\tgo on", "one turn", "a\t\tb \t"]


@pytest.mark.parametrize(
    ("turns", "asked"),
    [
        (Turns("last"), ["go on", "one turn", "b"]),
        (Turns("each"), ["hi", "hello there", "go on", "one turn", "a", "b"]),
        (Turns("context"), ["hi hello there go on", "one turn", "a b"]),
        (None, ["hi hello there go on", "one turn", "a b"]),
    ],
)
def test_turns_of_dialogues(tmp_path, turns, asked, caplog):
    path = write(tmp_path, "dialogues.txt", "\n".join(DIALOGUES) + "\n")
    queries = open_queries(path, turns=turns)
    assert list(queries) == asked and len(queries) == len(asked)
    assert [block.sentences for block in queries.blocks(2, 1)] == [asked[at : at + 2] for at in range(1, len(asked), 2)]
    assert ("2 blank turns are left out" in caplog.text) == (turns is not None)


def test_the_response_is_not_asked(tmp_path):
    path = write(tmp_path, "dialogues.txt", "hi\thello\tgo on\na\tb\n")
    assert list(open_queries(path, turns=Turns("last", response=True))) == ["hello", "a"]
    assert list(open_queries(path, turns=Turns("context", response=True))) == ["hi hello", "a"]
    path = write(tmp_path, "single.txt", "hi\thello\nonly a response\n")
    with pytest.raises(UserError, match="line 2: the sentence is empty"):
        open_queries(path, turns=Turns("each", response=True))


def test_other_separators_lists_and_right_pictures(tmp_path):
    path = write(tmp_path, "dialogues.csv", "caption,image\nhi EOS hello,a.jpg\none,b.jpg\n")
    block = read_queries(path, turns=Turns("each", " EOS "))
    assert block.sentences == ["hi", "hello", "one"] and block.targets == [("a.jpg",), ("a.jpg",), ("b.jpg",)]
    rows = [{"turns": ["hi", "hello"]}, {"turns": "a\tb"}]
    path = write(tmp_path, "dialogues.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(open_queries(path, "turns", Turns("last"))) == ["hello", "b"]
    path = write(tmp_path, "odd.jsonl", json.dumps({"turns": ["hi", 3]}) + "\n")
    with pytest.raises(UserError, match="not a sentence"):
        open_queries(path, "turns", Turns("last"))


def test_blank_lines_that_put_lines_and_rankings_apart_are_said(tmp_path, caplog):
    open_queries(write(tmp_path, "q.txt", "one\n\n  \ntwo\nthree\n"))
    assert "2 blank lines are left out, the first before line 4" in caplog.text
    caplog.clear()
    open_queries(write(tmp_path, "q.txt", "one\ntwo\n\n"))
    assert "blank" not in caplog.text
