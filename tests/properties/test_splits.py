"""Splits of any corpus: nothing lost, nothing on both sides, and nobody's side depends on the others or on their order."""

from collections import Counter

import pytest
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from imagedex.corpora import Corpus, flatten_captions, split_corpus
from imagedex.corpora.drawn import draw_part
from imagedex.corpora.schema import Picture, build_dataset
from imagedex.corpora.splits import hash_fraction
from imagedex.errors import UserError

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
CAPTIONS = st.lists(st.sampled_from(["a dog", "a cat", "two dogs", "grass", "ein Hund", "犬"]), max_size=5)
CORPORA = st.dictionaries(NAMES, CAPTIONS, min_size=1, max_size=12)
SEEDS = st.integers(0, 3)


def corpus(pictures):
    rows = [Picture(name, f"/x/{name}", captions) for name, captions in pictures.items()]
    return Corpus("test", DatasetDict({"train": build_dataset(rows, "train")}))


def captions_of(rows):
    return {} if rows is None else dict(zip(rows["image_id"], map(Counter, rows["captions"]), strict=True))


def split(pictures, **options):
    """The splits, None where nothing could be held out, which is said."""
    try:
        return split_corpus(corpus(pictures), **options)
    except UserError as error:
        assert "hold" in str(error) or "held" in str(error)
        return None


@settings(max_examples=30)
@given(CORPORA, st.integers(1, 3), SEEDS)
def test_held_out_captions_part_each_pictures_captions(pictures, n_held_out, seed):
    found = split(pictures, held_out_captions_per_image=n_held_out, split_seed=seed)
    if found is None:
        assert all(len(captions) < 2 for captions in pictures.values())
        return
    trained, asked, gallery = map(captions_of, (found.train, found.evaluation, found.gallery))
    assert list(gallery) == list(pictures)
    for name, captions in pictures.items():
        assert trained.get(name, Counter()) + asked.get(name, Counter()) == Counter(captions)
        assert sum(asked.get(name, {}).values()) == max(0, min(n_held_out, len(captions) - 1))
        assert gallery[name] == trained.get(name, Counter())  # never a query
    assert set(asked) <= set(gallery) and all(trained.values()) and all(asked.values())


@settings(max_examples=30)
@given(CORPORA, st.floats(0.01, 0.99), SEEDS, st.sampled_from(["all", "held_out"]))
def test_held_out_pictures_part_the_pictures(pictures, fraction, seed, eval_gallery):
    found = split(pictures, held_out_images=fraction, split_seed=seed, eval_gallery=eval_gallery)
    held = {name for name in pictures if hash_fraction(seed, name) < fraction}
    if found is None:
        assert not held or held == set(pictures)
        return
    trained, asked = captions_of(found.train), captions_of(found.evaluation)
    assert trained == {name: Counter(own) for name, own in pictures.items() if own and name not in held}
    assert asked == {name: Counter(own) for name, own in pictures.items() if own and name in held}
    galleries = {"": found.gallery, **found.other_galleries}
    whole, new = (
        (galleries["whole"], galleries[""]) if eval_gallery == "held_out" else (galleries[""], galleries["new"])
    )
    assert list(captions_of(whole)) == list(pictures) and list(captions_of(new)) == [n for n in pictures if n in held]
    assert all(not own for name, own in captions_of(whole).items() if name in held)
    everything, rows = found.galleries()
    for prefix, gallery in galleries.items():
        inside = rows[f"{prefix}_" if prefix else ""]
        assert everything.select(inside)["image_id"][:] == gallery["image_id"][:]


@settings(max_examples=25)
@given(CORPORA, CORPORA, st.randoms(use_true_random=False), SEEDS, st.sampled_from([{"images": 0.4}, {"captions": 1}]))
def test_membership_stays_when_rows_move_or_come(pictures, more, random, seed, how):
    options = {"held_out_images": how.get("images", 0.0), "held_out_captions_per_image": how.get("captions", 0)}
    before = split(pictures, split_seed=seed, **options)
    grown = list((more | pictures).items())
    random.shuffle(grown)
    after = split(dict(grown), split_seed=seed, **options)
    if before is None or after is None:
        return
    for name in ("train", "evaluation"):
        now = captions_of(getattr(after, name))
        assert {image_id: now.get(image_id) for image_id in captions_of(getattr(before, name))} == captions_of(
            getattr(before, name)
        )


@settings(max_examples=10)
@given(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]), st.integers(0, 2**31), NAMES)
def test_fractions_are_kept(fraction, seed, stem):
    share = sum(hash_fraction(seed, f"{stem}/{number}.jpg") < fraction for number in range(3000)) / 3000
    assert share == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 3000) ** 0.5)


@settings(max_examples=25)
@given(CORPORA)
def test_a_caption_a_row(pictures):
    rows = corpus(pictures).splits["train"]
    flat = flatten_captions(rows)
    names = list(pictures)
    expected = [(row, name, caption) for row, name in enumerate(names) for caption in pictures[name]]
    assert list(zip(flat["image_row"], flat["image_id"], flat["caption"], strict=True)) == expected


@settings(max_examples=25)
@given(CORPORA, st.integers(1, 14), st.integers(1, 4), SEEDS)
def test_a_drawn_part_is_a_part(pictures, max_images, per_image, seed):
    rows = corpus(pictures).splits["train"]
    try:
        part = captions_of(draw_part(rows, max_images, per_image, seed))
    except UserError:
        return
    whole = captions_of(rows)
    assert len(part) == min(max_images, len(whole))
    for name, own in part.items():
        assert own <= whole[name] and sum(own.values()) == min(per_image, sum(whole[name].values()))
