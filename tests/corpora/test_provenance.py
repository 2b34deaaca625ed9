"""What a model may have been trained on, against the captions that its split really trains."""

import csv
import json

import pytest

from imagedex.corpora import load_corpus, split_corpus
from imagedex.corpora.provenance import QUERIES, Training, differences, possibly_trained, read_asked, warning_of
from imagedex.files import RUN_RECORD

SPLITS = {
    "as asked": {"held_out_captions_per_image": 1},
    "two captions": {"held_out_captions_per_image": 2},
    "another seed": {"held_out_captions_per_image": 1, "split_seed": 1},
    "nothing held out": {},
    "whole pictures": {"held_out_images": 0.4},
    "other pictures": {"held_out_images": 0.4, "split_seed": 2},
}


def pairs(rows):
    columns = zip(rows["image_id"], rows["captions"], strict=True)
    return [(caption, image_id) for image_id, captions in columns for caption in captions]


def leave(folder, split, asked, **arguments):
    """An output folder, as far as it tells of the captions that were trained on."""
    folder.mkdir()
    record = {"do_train": True, "dataset_name": "somewhere/flickr", "split_seed": 0} | split | arguments
    (folder / RUN_RECORD).write_text(json.dumps(record))
    if asked is not None:
        with open(folder / QUERIES, "w", newline="") as file:
            csv.writer(file).writerows([("caption", "image"), *asked])
    return folder


@pytest.fixture
def corpus(flickr_folder):
    return load_corpus(str(flickr_folder))


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("asking", ["as asked", "whole pictures"])
def test_it_is_what_the_other_split_trains(corpus, tmp_path, name, asking):
    split = split_corpus(corpus, **SPLITS[name])
    held_out = None if split.evaluation is None else pairs(split.evaluation)
    model = Training.of(leave(tmp_path / "model", SPLITS[name], held_out))
    asked = pairs(split_corpus(corpus, **SPLITS[asking]).evaluation)
    every = pairs(corpus.splits["train"])
    expected = set(asked) & set(pairs(split.train))
    assert bool(expected) == (name != asking and not (asking == "as asked" and name == "two captions"))
    strangers = [("a sentence of my own", asked[0][1])]
    found = possibly_trained({"model": model}, asked + strangers, ["/data/flickr"], every)
    assert found == {"model": expected}
    # without the corpus's captions: the run that held the questions out knows that they are captions
    origin = Training({"dataset_name": "flickr"} | SPLITS[asking], set(asked))
    assert possibly_trained({"model": model}, asked + strangers, origin=origin) == {"model": expected}


def test_nothing_is_said_of_what_nobody_knows(corpus, tmp_path):
    asked, none = pairs(split_corpus(corpus, held_out_captions_per_image=1).evaluation), {}
    for name, arguments in (("judged", {"do_train": False}), ("pictures", {"objective": "identifier"})):
        assert Training.of(leave(tmp_path / name, none, None, **arguments)) is None
    assert Training.of("openai/clip-vit-base-patch32") is None
    elsewhere = Training.of(leave(tmp_path / "elsewhere", none, None, dataset_name="others"))
    unlisted = Training.of(leave(tmp_path / "unlisted", {"held_out_captions_per_image": 1}, None))
    models = {"elsewhere": elsewhere, "unlisted": unlisted, "unknown": None}
    assert possibly_trained(models, asked, ["flickr"], asked) == {"unlisted": set()}
    own_split = Training({"dataset_name": "flickr"}, {("another", "a.jpg")})
    assert possibly_trained({"own": own_split}, asked, ["flickr"], asked) == {"own": set()}


def test_a_list_that_was_cut_short_says_nothing_of_other_pictures(corpus, tmp_path):
    split = {"held_out_captions_per_image": 1}
    asked = pairs(split_corpus(corpus, **split).evaluation)
    short = Training.of(leave(tmp_path / "short", split, asked[:3], max_eval_samples=3))
    other = pairs(split_corpus(corpus, **split, split_seed=1).evaluation)
    images = {image_id for _, image_id in asked[:3]}
    expected = {one for one in other if one[1] in images and one not in asked}
    assert possibly_trained({"short": short}, asked + other, ["flickr"], asked + other) == {"short": expected}


def test_white_space_and_broken_lists(tmp_path):
    folder = leave(tmp_path / "run", {}, [("a  dog\n runs", "a.jpg")])
    assert read_asked(folder) == [("a dog runs", ("a.jpg",))]
    (folder / QUERIES).write_text("caption\na dog\n")
    assert read_asked(folder) is None and read_asked(tmp_path) is None


def test_the_warning_names_the_model_and_what_differs():
    there, here = {"split_seed": 1, "dataset_name": "/a/flickr"}, {"split_seed": 0, "dataset_name": "flickr/"}
    assert differences(there, here) == "split_seed (1 there, 0 here)"
    line = warning_of("runs/b", 5, 12, Training(there), here)
    assert line.startswith("runs/b may have been trained on 5 of the 12 captions") and "split_seed (1 there" in line
    assert "held_out_images None, split_seed 1" in warning_of("runs/b", 5, 12, Training(there), None)
