"""The forms that users of this field have: COCO's annotations, Flickr8k's token file, a text beside each picture, tables of any
name; and that nothing written in the JSON ones ends in a traceback."""

import copy
import json

import pyarrow
import pyarrow.parquet
import pytest

from imagedex.corpora import load_corpus, load_splits
from imagedex.corpora.arguments import CorpusArguments
from imagedex.errors import UserError

COCO = {
    "info": {"year": 2017},
    "images": [{"id": 7, "file_name": "a.png", "height": 6}, {"id": 9, "file_name": "b.png", "height": 6}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "two"},
        {"id": 2, "image_id": 7, "caption": "one"},
        {"id": 3, "image_id": 9, "caption": "more"},
    ],
}
TOKENS = 'a.png#0\tone\na.png#1\ttwo, with a "mark\nb.png#0\tthree\n\nc.png#0\tfour\n'


@pytest.fixture
def load(tmp_path, rows_of):
    def run(**options):
        corpus = load_corpus(str(tmp_path), **options)
        return corpus.form, {split: rows_of(rows) for split, rows in corpus.splits.items()}

    return run


@pytest.fixture
def three(paint, colours):
    return lambda folder: paint(folder, {"a.png": colours["red"], "b.png": colours["green"], "c.png": colours["blue"]})


@pytest.mark.parametrize("below", ["", "images/"])
def test_coco(tmp_path, three, load, below):
    for split in ("train", "val"):
        three(tmp_path / f"{below}{split}2017")
        file = tmp_path / "annotations" / f"captions_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(COCO))
    form, splits = load()
    assert form == "COCO captions_train2017.json, captions_val2017.json"
    assert splits == {
        split: {f"{name}2017/a.png": ["one"], f"{name}2017/b.png": ["two", "more"]}
        for split, name in (("train", "train"), ("validation", "val"))
    }
    corpus = load_corpus(str(tmp_path / "annotations" / "captions_val2017.json"))
    assert corpus.splits["train"]["source_id"][:] == ["7", "9"]


def test_coco_of_two_years(tmp_path, three, load):
    three(tmp_path / "images")
    for name in ("captions_train2014", "captions_train2017"):
        (tmp_path / f"{name}.json").write_text(json.dumps(COCO))
    with pytest.raises(UserError, match="captions_train2014.json, captions_train2017.json: choose with --dataset"):
        load()
    assert load_corpus(str(tmp_path), "2014").form == "COCO captions_train2014.json"


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token", "captions.txt"])
def test_tokens(tmp_path, three, load, name):
    three(tmp_path / "Flicker8k_Dataset")
    (tmp_path / name).write_text(TOKENS)
    captions = {"a.png": ["one", 'two, with a "mark'], "b.png": ["three"], "c.png": ["four"]}
    assert load() == (f"Flickr {name}", {"train": captions})
    (tmp_path / name).write_text(TOKENS + "d.png four\n")
    with pytest.raises(UserError, match=r"line 6: a.jpg#0<TAB>caption is expected, got d.png four"):
        load()


def test_tokens_with_their_splits(tmp_path, three, load, caplog):
    three(tmp_path / "Flicker8k_Dataset")
    (tmp_path / "Flickr8k.token.txt").write_text(TOKENS)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.png\r\n")
    (tmp_path / "Flickr_8k.testImages.txt").write_text("b.png\n")
    assert load()[1] == {"train": {"a.png": ["one", 'two, with a "mark']}, "test": {"b.png": ["three"]}}
    assert "1 picture in none of the lists, left out: c.png" in caplog.text


@pytest.mark.parametrize("ending", [".txt", ".caption"])
def test_a_text_beside_each_picture(tmp_path, three, load, ending, caplog):
    three(tmp_path / "sub")
    (tmp_path / "sub" / f"a{ending}").write_text("one\u2028still one\r\ntwo\n")
    (tmp_path / "sub" / f"b{ending}").write_text("three")
    (tmp_path / f"notes{ending}").write_text("x")
    form, splits = load()
    assert form == "pictures with a caption file beside each"
    assert splits == {"train": {"sub/a.png": ["one\u2028still one", "two"], "sub/b.png": ["three"]}}
    assert f"1 caption file without a picture: notes{ending}" in caplog.text
    assert "1 picture without a row in the captions, not used: sub/c.png" in caplog.text


def test_what_img2dataset_writes(tmp_path, three, load, caplog):
    three(tmp_path / "00000")
    for name in "abc":
        (tmp_path / "00000" / f"{name}.txt").write_text(name)
        (tmp_path / "00000" / f"{name}.json").write_text(json.dumps({"caption": name, "status": "success"}))
    status = ["success"] * 3 + ["failed_to_download"]
    pyarrow.parquet.write_table(pyarrow.table({"status": status, "caption": list("abcd")}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text('{"count": 4}')
    assert load() == ("img2dataset's folders", {"train": {f"00000/{name}.png": [name] for name in "abc"}})
    assert "00000.parquet lists 4 pictures, 1 of them not downloaded" in caplog.text


def test_two_pictures_of_one_caption_file(tmp_path, paint, colours, load):
    paint(tmp_path, {"a.png": colours["red"], "a.jpg": colours["red"]})
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="two pictures share the caption file a.txt"):
        load()


@pytest.mark.parametrize("name", ["metadata1000.jsonl", "my captions.csv", "x.tsv", "rows.json"])
@pytest.mark.parametrize("inside", ["images/", ""])
def test_one_table_of_any_name(tmp_path, three, load, name, inside):
    three(tmp_path / "images")
    rows = [{"image": f"{inside}a.png", "caption": "one"}, {"image": f"{inside}b.png", "caption": "two"}]
    if name.endswith("sv"):
        sign = "," if name.endswith("csv") else "\t"
        text = f"image{sign}caption\n" + "".join(f"{row['image']}{sign}{row['caption']}\n" for row in rows)
    else:
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    assert load() == (f"pictures with {name}", {"train": {f"{inside}a.png": ["one"], f"{inside}b.png": ["two"]}})


def test_tables_of_splits(tmp_path, three, load):
    three(tmp_path / "images")
    for name, picture in (("train", "a"), ("my_val", "b")):
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{picture}.png,x\n")
    assert load()[1] == {"train": {"a.png": ["x"]}, "validation": {"b.png": ["x"]}}
    (tmp_path / "more.csv").write_text("image,caption\nc.png,x\n")
    with pytest.raises(UserError, match="several tables .more.csv, my_val.csv, train.csv.; .*--train_file"):
        load()


def test_a_table_that_is_none_of_captions(tmp_path, three, load):
    three(tmp_path / "images")
    (tmp_path / "sizes.csv").write_text("height,width\n6,8\n")
    with pytest.raises(UserError, match="sizes.csv has no image column; its columns are height, width; .*--train_file"):
        load()


KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {"imgid": n, "filename": f"{name}.png", "split": split, "sentids": [n], "sentences": [{"raw": name}]}
        for n, (name, split) in enumerate((("a", "train"), ("b", "train"), ("c", "test")))
    ],
}
BLIP = [
    {"image": "a.png", "caption": "one", "image_id": 1},
    {"image": "b.png", "caption": ["two", "three"], "image_id": 2},
]
LXMERT = [{"img_id": "COCO_train2014_000000000001", "sentf": {"mscoco": ["one"]}, "labelf": {}}]
FORMS = {
    "captions_train2017.json": COCO,
    "dataset.json": KARPATHY,
    "flickr30k_train.json": BLIP,
    "mscoco_train.json": LXMERT,
    "metadata.jsonl": {"file_name": "a.png", "caption": ["one"]},
}


def test_karpathys_older_file(tmp_path, three, load):
    three(tmp_path / "imgs")
    (tmp_path / "dataset.json").write_text(json.dumps(KARPATHY))
    form, splits = load()
    assert form == "Karpathy dataset.json" and splits == {
        "train": {"a.png": ["a"], "b.png": ["b"]},
        "test": {"c.png": ["c"]},
    }


def places(value, path=()):
    """The path of every value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value, path, odd):
    if not path:
        return odd
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = odd
    return value


ODD = (None, [], {}, 5, 2**70, 1.5, True, "", "x", "\ud83d", "../a.png", "a\0b", ["x", 3], [[]], {"x": None})


@pytest.mark.parametrize("name", FORMS)
def test_no_value_in_a_caption_file_ends_in_a_traceback(tmp_path, three, name):
    three(tmp_path)
    three(tmp_path / "train2014")
    (tmp_path / "train2014" / "a.png").rename(tmp_path / "train2014" / "COCO_train2014_000000000001.jpg")
    outcomes = set()
    for path in places(FORMS[name]):
        for odd in ODD:
            (tmp_path / name).write_text(json.dumps(replaced(FORMS[name], path, odd)))
            try:
                load_corpus(str(tmp_path), unreadable_images="skip")
                outcomes.add("read")
            except UserError as error:
                assert len(str(error)) < 1500 and "\n" not in str(error), (path, odd)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe[\x00", b"[", b'{"images": ', b"caf\xe9", b"\0\0\0\0", b"[" * 100_000, b'"images"', b"[1, 2]"],
)
@pytest.mark.parametrize(
    "name", [*FORMS, "captions.txt", "results.csv", "Flickr8k.token.txt", "metadata.csv", "t.parquet"]
)
def test_no_damaged_file_ends_in_a_traceback(tmp_path, three, name, content):
    three(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_corpus(str(tmp_path))
    assert len(str(error.value)) < 1500 and "\n" not in str(error.value)


def test_what_a_recipe_holds_out_gives_way_to_a_split_of_its_own(tmp_path, three, caplog):
    three(tmp_path)
    rows = [
        f"{n}.png,{split},{text}\n" for n, split in (("a", "train"), ("b", "train"), ("c", "test")) for text in "xy"
    ]
    (tmp_path / "t.csv").write_text("image,split,caption\n" + "".join(rows))
    data = CorpusArguments(train_file=str(tmp_path / "t.csv"), held_out_captions_per_image=1)
    data.typed = frozenset({"train_file"})
    with caplog.at_level("INFO"):
        splits = load_splits(data)
    assert splits.evaluation["image_id"][:] == ["c.png"] and data.held_out_captions_per_image == 0
    assert "of the recipe, held_out_captions_per_image gives way to the corpus's own split (test)" in caplog.text
    data = CorpusArguments(train_file=str(tmp_path / "t.csv"), held_out_captions_per_image=1)
    data.typed = frozenset({"train_file", "held_out_captions_per_image"})
    splits = load_splits(data)
    assert splits.evaluation["image_id"][:] == ["a.png", "b.png", "c.png"]
    assert "its own split is put aside, --held_out_captions_per_image says what is held out" in caplog.text


def test_a_folder_of_tables_is_read_like_one_table(tmp_path, three):
    three(tmp_path / "elsewhere")
    (tmp_path / "p" / "data").mkdir(parents=True)
    (tmp_path / "p" / "data" / "train-0.csv").write_text('image,caption\na.png,"one\nb.png,two"\n')
    (tmp_path / "p" / "data" / "train-1.csv").write_text("image,caption\nc.png,007\n")
    train = load_corpus(str(tmp_path / "p"), image_dir=str(tmp_path / "elsewhere")).splits["train"]
    assert dict(zip(train["image_id"], train["captions"], strict=True)) == {
        "a.png": ['"one'], "b.png": ['two"'], "c.png": ["007"]
    }  # fmt: skip


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/t.csv", "/etc/*.csv", "../t.csv", "hf://datasets/a/b/t.csv"])
def test_a_card_names_no_data_outside_its_folder(tmp_path, place):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "README.md").write_text(
        f"---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: {place}\n---\n"
    )
    (tmp_path / "p" / "t.csv").write_text("image,caption\na.png,one\n")
    with pytest.raises(UserError, match="README.md names data outside its folder"):
        load_corpus(str(tmp_path / "p"))


def test_what_stays_unknown_names_what_was_seen(tmp_path, write_shard):
    pyarrow.parquet.write_table(pyarrow.table({"url": ["http://x.org/a"], "words": ["a"]}), tmp_path / "00000.parquet")
    write_shard(tmp_path / "00000.tar", [("1.txt", "x")])
    with pytest.raises(
        UserError, match=r"tables seen: 00000.parquet; .*--train_file; tar shards \(00000.tar\) .*--streaming"
    ):
        load_corpus(str(tmp_path))


def test_a_corpus_without_any_caption_is_nothing_to_train_on(tmp_path, three):
    three(tmp_path)
    (tmp_path / "captions.txt").write_text("image,caption\na.png,\nb.png,  \n")
    for held_out in (0, 1):
        with pytest.raises(UserError, match="no picture of the train split has a caption, all are empty"):
            load_splits(CorpusArguments(dataset_name=str(tmp_path), held_out_captions_per_image=held_out))
