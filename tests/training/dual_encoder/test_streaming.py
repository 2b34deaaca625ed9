"""Rows and batches of a stream, against those of the same corpus read in the usual way."""

import itertools
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import ViTImageProcessorPil

from imagedex.corpora import load_corpus
from imagedex.corpora.arguments import DataArguments
from imagedex.corpora.forms.shards import open_stream
from imagedex.endings import without_traceback
from imagedex.errors import LocalUserError, UserError
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.augmentation import RandomResizedCrop
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.data import CaptionPairs, Collator, token_rows, tokenize_captions
from imagedex.training.dual_encoder.streaming import (
    CaptionStream,
    check_streaming,
    first_captions,
    load_streamed_splits,
)
from imagedex.training.pictures import Pictures
from imagedex.training.tokenizer import train_tokenizer


@pytest.fixture
def corpus(flickr_folder):
    return load_corpus(str(flickr_folder)).splits["train"]


@pytest.fixture
def processor(corpus):
    tokenizer = train_tokenizer([caption for captions in corpus["captions"] for caption in captions], 200)
    return RetrievalProcessor(ViTImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, max_text_length=75)


def arguments(**changes):
    values = {"dataloader_num_workers": 0, "dataloader_pin_memory": False, "dataloader_persistent_workers": False,
              "dataloader_prefetch_factor": None, "process_index": 0, "world_size": 1, "seed": 5, "data_seed": None}  # fmt: skip
    return SimpleNamespace(**values | changes)


def batches(stream, processor, size=3, **changes):
    return stream.loader(size, Collator(processor.tokenizer), arguments(**changes))


def rows_of(batches):
    """Rows of batches, padding off: Counter of (tokens, pixels) and which pixels each image_id stands for."""
    rows, pictures = Counter(), {}
    for batch in batches:
        for ids, mask, pixels, image_id in zip(
            batch["input_ids"], batch["attention_mask"], batch["pixel_values"], batch["image_ids"], strict=True
        ):
            rows[(tuple(ids[mask.bool()].tolist()), pixels.numpy().tobytes())] += 1
            pictures.setdefault(image_id.item(), set()).add(pixels.numpy().tobytes())
    return rows, pictures


def ordinary(corpus, processor, size=3):
    tokens = tokenize_captions(corpus, processor)
    pairs = CaptionPairs(token_rows(tokens), Pictures(corpus, processor.image_processor), tokens["image_row"])
    collate = Collator(processor.tokenizer)
    return torch.utils.data.DataLoader(pairs, size, collate_fn=collate)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_is_what_an_ordinary_loader_gives(corpus, flickr_shards, processor, workers):
    stream = CaptionStream(open_stream(str(flickr_shards)), processor, workers=workers, passes=1)
    found, pictures = rows_of(batches(stream, processor))
    expected, _ = rows_of(ordinary(corpus, processor))
    assert found == expected and sum(found.values()) == 48
    assert len(pictures) == 12 and all(len(pixels) == 1 for pixels in pictures.values())


def test_it_goes_on_pass_after_pass_in_full_batches(corpus, flickr_shards, processor):
    stream = CaptionStream(open_stream(str(flickr_shards)), processor, buffer_size=10)
    drawn = list(itertools.islice(batches(stream, processor, size=36), 4))  # 144 rows: three passes
    assert [len(batch["image_ids"]) for batch in drawn] == [36] * 4
    assert {count for count in rows_of(drawn)[0].values()} == {3}
    order = torch.cat([batch["image_ids"] for batch in drawn]).reshape(3, 48).tolist()
    assert order[0] != order[1] != order[2] != order[0]
    again = itertools.islice(batches(stream, processor, size=36), 4)
    assert torch.cat([batch["image_ids"] for batch in again]).tolist() == sum(order, [])


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(("workers", "passed"), [(0, 20), (2, 7), (2, 20)])
def test_batches_that_were_seen_are_passed_and_the_next_are_the_same(
    flickr_shards, write_shard, processor, workers, passed, broken
):
    if broken:
        write_shard(flickr_shards / "00009.tar", [("x.jpg", b"broken"), ("x.json", {"caption": "a"})])
    kwargs = {"workers": workers, "buffer_size": 10, "skip_unreadable": broken}
    opened = open_stream(str(flickr_shards))
    whole = list(itertools.islice(batches(CaptionStream(opened, processor, **kwargs), processor), 24))
    stream = CaptionStream(opened, processor, **kwargs)
    stream.pass_by(passed)
    again = list(itertools.islice(batches(stream, processor), 24))
    assert again[:passed] == [{}] * passed
    for batch, expected in zip(again[passed:], whole[passed:], strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_see_different_rows(corpus, flickr_shards, processor, ranks, caplog):
    data = DataArguments(streaming=True, shuffle_buffer_size=7)
    parts = []
    for rank in range(ranks):
        args = arguments(process_index=rank, world_size=ranks, dataloader_num_workers=2)
        stream = CaptionStream.of(open_stream(str(flickr_shards)), processor, data, args)
        stream.passes = 1
        parts.append(rows_of(batches(stream, processor, size=1))[0])
    assert all(parts) and sum(parts, Counter()) == rows_of(ordinary(corpus, processor))[0]
    assert ("cannot be shared out evenly over 3 processes" in caplog.text) == (ranks == 3)


def test_more_workers_than_shards(flickr_shards, processor, caplog):
    args = arguments(dataloader_num_workers=9, process_index=1, world_size=2)
    stream = CaptionStream.of(open_stream(str(flickr_shards)), processor, DataArguments(streaming=True), args)
    assert stream.workers == 2
    assert "--dataloader_num_workers is 2" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_stops_or_is_left_out_and_counted(
    corpus, flickr_shards, write_shard, processor, caplog, workers
):
    write_shard(
        flickr_shards / "00009.tar",
        [("x.jpg", b"broken"), ("x.json", {"caption": ["a", "b"]}), ("y.jpg", b"z"), ("y.json", {"caption": []})],
    )
    opened = open_stream(str(flickr_shards))
    stopping = CaptionStream(opened, processor, workers=workers)
    with pytest.raises(LocalUserError) as error:
        list(itertools.islice(batches(stopping, processor), 80))
    said = without_traceback(error.value)
    assert said.startswith(f"the picture of sample x of {flickr_shards}/00009.tar cannot be read (Unidentified")
    assert "\n" not in said and "--unreadable_images skip" in said

    skipping = CaptionStream(opened, processor, workers=workers, skip_unreadable=True, passes=2)
    found, _ = rows_of(batches(skipping, processor, size=1))
    assert found == rows_of(ordinary(corpus, processor))[0] + rows_of(ordinary(corpus, processor))[0]
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        assert skipping.report() == 2
    assert "left out 2 pictures of the stream" in caplog.text


def test_nothing_but_broken_pictures(tmp_path, write_shard, processor):
    write_shard(tmp_path / "a.tar", [("x.jpg", b"broken"), ("x.txt", "a")])
    stream = CaptionStream(open_stream(str(tmp_path)), processor, skip_unreadable=True)
    with pytest.raises(LocalUserError, match="nothing to train on in 1 row"):
        next(iter(stream))


def test_captions_are_cut_and_counted(flickr_shards, processor, caplog):
    stream = CaptionStream(open_stream(str(flickr_shards)), processor, passes=1)
    lengths = [len(row["input_ids"]) for row in stream]
    limit = max(lengths) - 1
    shorter = RetrievalProcessor(processor.image_processor, processor.tokenizer, max_text_length=limit)
    stream = CaptionStream(open_stream(str(flickr_shards)), shorter, passes=1)
    assert sorted(len(row["input_ids"]) for row in stream) == sorted(min(length, limit) for length in lengths)
    stream.report()
    cut = sum(length > limit for length in lengths)
    assert f"{cut} of 48 texts are longer than {limit} tokens" in caplog.text


def test_augmentation_depends_on_seed_pass_and_row_alone(flickr_shards, processor):
    def drawn(workers, passes=1, **options):
        stream = CaptionStream(
            open_stream(str(flickr_shards)), processor, augment=RandomResizedCrop((16, 16)),
            workers=workers, passes=passes, **options,
        )  # fmt: skip
        return rows_of(batches(stream, processor))[0]

    first = drawn(0)
    assert len(first) == 48 and drawn(2) == first
    assert drawn(0, seed=1) != first
    assert len(drawn(0, passes=2)) == 96  # cut anew in the second pass
    # and what torch draws elsewhere, a model's dropout, is the same with and without it
    opened, draws = open_stream(str(flickr_shards)), []
    for augment in (None, RandomResizedCrop((16, 16))):
        torch.manual_seed(0)
        next(iter(CaptionStream(opened, processor, augment=augment)))
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]


def test_first_captions_are_read_only_when_asked_for(flickr_shards, corpus, caplog):
    with caplog.at_level(logging.INFO, logger="imagedex"):
        captions = first_captions(open_stream(str(flickr_shards)))
        assert "tokenizer" not in caplog.text
        assert list(captions) == sum(corpus["captions"], [])
    assert "trained on the first captions of the stream" in caplog.text


def test_what_is_evaluated(flickr_shards, flickr_folder, tmp_path, corpus):
    splits = load_streamed_splits(DataArguments(streaming=True, dataset_name=str(flickr_shards)))
    assert splits.gallery is None and splits.evaluation is None and splits.train.num_shards == 4
    table = tmp_path / "validation.csv"
    table.write_text("image,caption\nred_blue.jpg,a\nred_blue.jpg,b\nblue_red.jpg,c\n")
    by_file = load_streamed_splits(
        DataArguments(streaming=True, dataset_name=str(flickr_shards), validation_file=str(table),
                      image_dir=str(flickr_folder / "images"))
    )  # fmt: skip
    assert by_file.evaluation["captions"][:] == [["a", "b"], ["c"]] and len(by_file.gallery) == 2
    shards = str(flickr_shards / "{00000..00003}.tar")
    by_corpus = load_streamed_splits(
        DataArguments(streaming=True, train_file=shards, dataset_name=str(flickr_folder), max_eval_samples=5)
    )
    assert by_corpus.evaluation["image_id"][:] == corpus["image_id"][:5] and len(by_corpus.gallery) == 12
    assert by_corpus.train.num_shards == 4


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({}, {"max_steps": -1}, "say with --max_steps how many steps"),
        ({}, {"do_train": False}, "--streaming is for training"),
        ({"keep_pixels": True}, {}, "--keep_pixels cannot be had with --streaming"),
        ({"held_out_captions_per_image": 1}, {}, "--held_out_captions_per_image cannot be had"),
        ({"held_out_images": 0.1}, {}, "--held_out_images cannot be had"),
        ({"max_train_samples": 4}, {}, "--max_train_samples cannot be had"),
        ({}, {"keep_states": True}, "--keep_states cannot be had"),
        ({}, {"compare_with_baselines": True}, "--compare_with_baselines cannot be had"),
        ({}, {"shuffle_every_epoch": False}, "--shuffle_every_epoch cannot be had"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path, data, training, message):
    args = XMatchingTrainingArguments(
        **{"output_dir": str(tmp_path), "do_train": True, "max_steps": 3, "use_cpu": True} | training
    )
    with pytest.raises(UserError, match=message):
        check_streaming(DataArguments(streaming=True, **data), args)
    check_streaming(DataArguments(**data), args)  # each is fine without
