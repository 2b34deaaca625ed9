"""A part of a corpus against the loop that the original ran over BLIP's rows."""

import random

import pytest

from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.drawn import draw_part
from imagedex.corpora.load import load_splits
from imagedex.corpora.schema import Picture, build_dataset
from imagedex.errors import UserError

CAPTIONS = {f"{n}.jpg": [f"caption {n} {c}" for c in range(1 + n % 5)] for n in range(30)}


def pictures():
    return build_dataset([Picture(name, f"/x/{name}", own) for name, own in CAPTIONS.items()], "train")


def original(count, seed):
    """{picture: caption}: shuffled rows, of each new picture the caption at first sight, until there are enough."""
    annotation = [(name, caption) for name, own in CAPTIONS.items() for caption in own]
    random.seed(seed)
    order = list(range(len(annotation)))
    random.shuffle(order)
    seen = {}
    for place in order:
        name, caption = annotation[place]
        if name not in seen:
            seen[name] = caption
            if len(seen) == count:
                break
    return seen


@pytest.mark.parametrize("seed", [0, 313])
def test_the_original_s_pictures_and_captions(seed):
    part = draw_part(pictures(), 12, 1, seed)
    assert list(zip(part["image_id"], part["captions"], strict=True)) == [
        (name, [caption]) for name, caption in original(12, seed).items()
    ]


def test_several_captions_of_each_and_all_pictures():
    part = draw_part(pictures(), None, 2, 0)
    assert set(part["image_id"]) == set(CAPTIONS)
    for name, own in zip(part["image_id"], part["captions"], strict=True):
        assert len(own) == min(2, len(CAPTIONS[name])) and set(own) <= set(CAPTIONS[name])
    whole = draw_part(pictures(), 7, None, 0)
    assert {name: sorted(own) for name, own in zip(whole["image_id"], whole["captions"], strict=True)} == {
        name: CAPTIONS[name] for name in original(7, 0)
    }


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(UserError, match="--max_images 31: the corpus has 30 pictures"):
        draw_part(pictures(), 31, None)
    with pytest.raises(UserError, match="--captions_per_image 0: give 1 or more"):
        draw_part(pictures(), None, 0)


def test_what_was_not_drawn_is_not_in_the_gallery_either(flickr_folder):
    data = CorpusArguments(dataset_name=str(flickr_folder), max_images=8, captions_per_image=1, held_out_images=0.3)
    splits = load_splits(data)
    assert len(splits.gallery) == 8 == len(splits.train) + len(splits.evaluation)
    assert all(len(own) == 1 for rows in (splits.train, splits.evaluation) for own in rows["captions"])
