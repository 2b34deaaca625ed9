"""LXMERT's four files beside the folders of COCO and Visual Genome."""

import json

import pytest

from imagedex.corpora import load_corpus
from imagedex.corpora.forms.lxmert import coco_name
from imagedex.errors import UserError

FILES = {
    "mscoco_train": [
        {
            "img_id": "COCO_train2014_000000318556",
            "labelf": {"vqa": [{"no": 1}]},
            "sentf": {"mscoco": ["A bathroom .", "A sink ."], "vqa": ["Is it clean?"], "vg": ["white towel"]},
        },
        {"img_id": "COCO_train2014_000000000009", "labelf": {}, "sentf": {"vqa": ["What is it?"]}},
    ],
    "mscoco_nominival": [{"img_id": "COCO_val2014_000000000042", "labelf": {}, "sentf": {"mscoco": ["Shoes ."]}}],
    "mscoco_minival": [
        {"img_id": "COCO_val2014_000000000073", "labelf": {}, "sentf": {"mscoco": ["A bike ."], "vg": ["a tyre"]}}
    ],
    "vgnococo": [
        {"img_id": "2370799", "labelf": {}, "sentf": {"vg": ["a red car", "a tree"], "gqa": ["Who is it?"]}},
        {"img_id": "150367", "labelf": {}, "sentf": {"vg": ["a boat"]}},
    ],
}
COCO = [coco_name(row["img_id"]) for name, rows in FILES.items() if name != "vgnococo" for row in rows]
PARITY = {
    "train": {
        "train2014/COCO_train2014_000000318556.jpg": ["A bathroom .", "A sink ."],
        "val2014/COCO_val2014_000000000042.jpg": ["Shoes ."],
    },
    "validation": {"val2014/COCO_val2014_000000000073.jpg": ["A bike ."]},
}


@pytest.fixture
def data(tmp_path, paint, colours):
    """As Vokenization and Maria lay it out: data/lxmert, data/mscoco/images, and Visual Genome in its two folders."""
    folder = tmp_path / "data"
    (folder / "lxmert").mkdir(parents=True)
    for name, rows in FILES.items():
        (folder / "lxmert" / f"{name}.json").write_text(json.dumps(rows))
    paint(folder / "mscoco" / "images", dict.fromkeys(COCO, colours["red"]))
    paint(folder / "vg", {"VG_100K/2370799.jpg": colours["blue"], "VG_100K_2/150367.jpg": colours["blue"]})
    return folder


def test_maria_by_default(data, rows_of):
    corpus = load_corpus(str(data / "lxmert"))
    assert corpus.form == "LXMERT mscoco_train, mscoco_nominival, mscoco_minival (sentences: mscoco)"
    assert {split: rows_of(rows) for split, rows in corpus.splits.items()} == PARITY
    assert corpus.splits["train"]["source_id"][:] == ["COCO_train2014_000000318556", "COCO_val2014_000000000042"]
    assert corpus.splits["train"][0]["image"].size == (8, 6)


def test_visual_genome(data, rows_of):
    corpus = load_corpus(str(data / "lxmert"), "mscoco,vg")
    assert corpus.form.startswith("LXMERT mscoco_train, mscoco_nominival, mscoco_minival, vgnococo")
    assert rows_of(corpus.splits["train"]) == {
        "train2014/COCO_train2014_000000318556.jpg": ["A bathroom .", "A sink .", "white towel"],
        "val2014/COCO_val2014_000000000042.jpg": ["Shoes ."],
        "VG_100K/2370799.jpg": ["a red car", "a tree"],
        "VG_100K_2/150367.jpg": ["a boat"],
    }
    assert rows_of(corpus.splits["validation"]) == {"val2014/COCO_val2014_000000000073.jpg": ["A bike .", "a tyre"]}


def test_order_and_choice_of_sources(data, rows_of):
    train = load_corpus(str(data / "lxmert"), "vqa+mscoco").splits["train"]
    assert rows_of(train) == {
        "train2014/COCO_train2014_000000318556.jpg": ["Is it clean?", "A bathroom .", "A sink ."],
        "train2014/COCO_train2014_000000000009.jpg": ["What is it?"],
        "val2014/COCO_val2014_000000000042.jpg": ["Shoes ."],
    }


def test_folders_given(data, tmp_path, paint, colours, rows_of):
    (data / "mscoco").rename(tmp_path / "coco2014")
    (data / "vg").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"\(COCO\) names pictures that are not there.*--image_dir"):
        load_corpus(str(data / "lxmert"))
    for coco in (tmp_path / "coco2014", tmp_path / "coco2014" / "images"):
        assert rows_of(load_corpus(str(data / "lxmert"), image_dir=str(coco)).splits["train"]) == PARITY["train"]
    options = {"image_dir": str(tmp_path / "coco2014")}
    with pytest.raises(UserError, match=r"\(Visual Genome\) names pictures that are not there.*--visual_genome_dir"):
        load_corpus(str(data / "lxmert"), "vg", **options)
    paint(tmp_path / "flat", {"2370799.jpg": colours["blue"], "150367.jpg": colours["blue"]})
    for genome, names in (
        ("elsewhere", {"VG_100K/2370799.jpg", "VG_100K_2/150367.jpg"}),
        ("flat", {"2370799.jpg", "150367.jpg"}),
    ):
        train = load_corpus(str(data / "lxmert"), "vg", **options, visual_genome_dir=str(tmp_path / genome)).splits[
            "train"
        ]
        assert set(rows_of(train)) == names | {"train2014/COCO_train2014_000000318556.jpg"}


def test_files_that_are_not_there(data, caplog):
    (data / "lxmert" / "mscoco_minival.json").unlink()
    assert list(load_corpus(str(data / "lxmert")).splits) == ["train"]
    assert "mscoco_minival.json is not there" in caplog.text
    (data / "lxmert" / "mscoco_train.json").unlink()
    assert len(load_corpus(str(data / "lxmert")).splits["train"]) == 1
    (data / "lxmert" / "mscoco_nominival.json").unlink()
    with pytest.raises(UserError, match="holds none of mscoco_train.json, mscoco_nominival.json"):
        load_corpus(str(data / "lxmert"))


def test_missing_picture(data):
    (data / "mscoco" / "images" / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
    with pytest.raises(UserError, match=r"1 picture of the train split .*000000000042\.jpg"):
        load_corpus(str(data / "lxmert"))
    (data / "vg" / "VG_100K_2" / "150367.jpg").unlink()
    with pytest.raises(UserError, match=r"150367\.jpg"):
        load_corpus(str(data / "lxmert"), "vg")


def test_unknown_source(data):
    with pytest.raises(UserError, match="no source of sentences called coco; known are mscoco, vg, vqa, gqa, visual7w"):
        load_corpus(str(data / "lxmert"), "coco,vg")


def test_another_form(data):
    (data / "lxmert" / "mscoco_train.json").write_text('[{"image": "a.jpg", "caption": "x"}]')
    with pytest.raises(UserError, match=r"mscoco_train\.json is not LXMERT's form"):
        load_corpus(str(data / "lxmert"))
