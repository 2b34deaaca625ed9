"""Tar shards as a stream, against what is known to be in them."""

import io
import logging
from collections import Counter

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from imagedex.corpora.forms import shards as streams
from imagedex.corpora.forms.shards import decode, expand_shards, open_stream, picture_number
from imagedex.errors import LocalUserError, UserError


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "png")
    return buffer.getvalue()


def colour_of(number):
    return (number, 255 - number, 7)


@pytest.fixture
def shards(tmp_path, write_shard):
    """Six shards of 2, 3, 4, 5, 6, 7 pictures; the keys count anew in each; picture n has n % 3 + 1 captions in a txt."""
    number = 0
    (tmp_path / "shards").mkdir()
    for shard in range(6):
        files = []
        for key in range(shard + 2):
            files.append((f"{key:06d}.png", png(colour_of(number))))
            files.append((f"{key:06d}.txt", "\n".join(f" {number} {c}" for c in range(number % 3 + 1)) + "\n\n"))
            number += 1
        write_shard(tmp_path / "shards" / f"{shard:05d}.tar", files)
    return tmp_path / "shards"


EXPECTED = Counter((colour_of(n), f"{n} {c}") for n in range(27) for c in range(n % 3 + 1))


class Rows(IterableDataset):
    """One pass, decoded to (colour, caption)."""

    def __init__(self, stream, **order):
        self.stream, self.order = stream, order

    def __iter__(self):
        for row in self.stream.one_pass(**self.order):
            yield decode(row).getpixel((0, 0)), row["caption"]


def read(stream, workers=0, **order):
    return list(DataLoader(Rows(stream, **order), batch_size=None, num_workers=workers))


def as_counter(rows):
    return Counter((tuple(colour), caption) for colour, caption in rows)


@pytest.mark.parametrize(("workers", "buffer_size"), [(0, 0), (0, 8), (2, 8), (4, 8)])
def test_one_pass_is_every_caption_once(shards, workers, buffer_size):
    rows = read(open_stream(str(shards)), workers, buffer_size=buffer_size)
    assert as_counter(rows) == EXPECTED


# 2 and 3 ranks get whole shards, 4 ranks every fourth row
@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (3, 0), (4, 0), (4, 2)])
def test_ranks_share_the_rows(shards, ranks, workers):
    stream = open_stream(str(shards))
    parts = [read(stream.share(rank, ranks), workers, seed=3, number=1, buffer_size=8) for rank in range(ranks)]
    assert all(parts)
    assert sum((as_counter(part) for part in parts), Counter()) == EXPECTED


def test_the_order_comes_from_seed_and_pass(shards):
    stream = open_stream(str(shards))

    def order(**kwargs):
        return [caption for _, caption in read(stream, **kwargs)]

    stored = order()
    assert stored[:3] == ["0 0", "1 0", "1 1"]
    drawn = order(seed=1, number=0, buffer_size=8)
    assert drawn == order(seed=1, number=0, buffer_size=8)
    assert len({tuple(stored), tuple(drawn), tuple(order(seed=1, number=1, buffer_size=8)),
                tuple(order(seed=2, number=0, buffer_size=8))}) == 4  # fmt: skip


def test_first_captions_are_in_stored_order(shards):
    assert list(open_stream(str(shards)).first_captions(4)) == ["0 0", "1 0", "1 1", "2 0"]


def test_a_picture_number_says_which_rows_show_the_same_picture(shards):
    numbers = {}
    for row in open_stream(str(shards)).one_pass():
        numbers.setdefault(picture_number(row), set()).add(row["caption"].split()[0])
    assert len(numbers) == 27  # though only seven different keys
    assert all(len(pictures) == 1 for pictures in numbers.values())
    assert all(0 <= number < 2**63 for number in numbers)
    # blake2b of b"x" with 8 bytes, halved: the same on every machine
    assert picture_number({"image": {"bytes": b"x", "path": None}, "sample": ""}) == 0x4ADF4367F96E584F >> 1


@pytest.mark.parametrize(
    ("content", "column", "chosen"),
    [
        ({"caption": "a, b", "width": 3}, None, "json.caption"),
        ({"caption": ["a, b"], "width": 3}, None, "json.caption"),
        ({"words": ["a, b"], "width": 3}, "words", "json.words"),
        ({"words": ["a, b"], "text": "other"}, "json.words", "json.words"),
        (["a, b", "  "], None, "json"),
    ],
)
def test_captions_in_json(tmp_path, caplog, content, column, chosen, write_shard):
    write_shard(tmp_path / "a.tar", [("x/1.png", png((1, 2, 3))), ("x/1.json", content)])
    with caplog.at_level(logging.INFO, logger="imagedex"):
        stream = open_stream(train_file=str(tmp_path / "a.tar"), caption_column=column)
    assert [row["caption"] for row in stream.one_pass()] == ["a, b"]
    assert f"captions from {chosen}" in caplog.text


def test_a_caption_and_lists_of_them_may_stand_side_by_side(tmp_path, write_shard):
    values = ["one"] * 6 + [["two", "three"], [], None, "four\nlines"]
    files = [pair for i, value in enumerate(values)
             for pair in ((f"{i}.png", png((i, 0, 0))), (f"{i}.json", {"caption": value, "more": {"of": i}}))]  # fmt: skip
    write_shard(tmp_path / "a.tar", files)
    rows = list(open_stream(str(tmp_path)).one_pass())
    assert [row["caption"] for row in rows] == ["one"] * 6 + ["two", "three", None, None, "four\nlines"]
    write_shard(tmp_path / "a.tar", [*files, ("99.png", png((9, 9, 9))), ("99.json", {"caption": {"en": "dog"}})])
    with pytest.raises(LocalUserError, match="the caption of sample 99 of .*a.tar is no text or list of texts"):
        list(open_stream(str(tmp_path)).one_pass())


def test_folders_of_another_form_stream_too(tmp_path):
    table = Dataset.from_dict(
        {"image": [{"bytes": png((n, 0, 0)), "path": None} for n in range(3)], "captions": [["a", "b"], ["c"], ["d"]]},
        features=Features({"image": ImageFeature(), "captions": List(Value("string"))}),
    )
    table.to_parquet(tmp_path / "train-0.parquet")
    rows = read(open_stream(str(tmp_path)), buffer_size=5)
    assert as_counter(rows) == Counter([((0, 0, 0), "a"), ((0, 0, 0), "b"), ((1, 0, 0), "c"), ((2, 0, 0), "d")])


def test_shards_of_other_splits_and_other_files_are_left_aside(shards, caplog):
    (shards / "train").mkdir()
    (shards / "val").mkdir()
    for number, shard in enumerate(sorted(shards.glob("*.tar"))):
        shard.rename(shards / ("val" if number == 0 else "train") / shard.name)
    (shards / "00000_stats.json").write_text("{}")
    assert open_stream(str(shards)).num_shards == 5
    assert "not used: val/00000.tar" in caplog.text


def test_expand_shards(shards, monkeypatch):
    monkeypatch.chdir(shards)
    assert expand_shards("{00001..00003}.tar") == ["00001.tar", "00002.tar", "00003.tar"]
    assert expand_shards("0000{5,0}.tar") == ["00005.tar", "00000.tar"]
    assert expand_shards("0000[01]*.tar") == ["00000.tar", "00001.tar"]
    assert expand_shards("https://a.b/{8..10}.tar?c") == [f"https://a.b/{n}.tar?c" for n in (8, 9, 10)]
    with pytest.raises(UserError, match="there is no 00006.tar, 00007.tar$"):
        expand_shards("{00005..00007}.tar")
    with pytest.raises(UserError, match=r"there is no x\*.tar$"):
        expand_shards("x*.tar")
    with pytest.raises(UserError, match="a.csv does not end in .tar"):
        expand_shards("a.csv")


def test_a_picture_that_cannot_be_read_is_named(shards, write_shard):
    write_shard(shards / "00006.tar", [("7/a.png", b"no picture"), ("7/a.txt", "c")])
    broken = [row for row in open_stream(str(shards)).one_pass() if row["caption"] == "c"]
    with pytest.raises(
        LocalUserError, match=r"sample 7/a of .*00006.tar cannot be read \(UnidentifiedImageError"
    ) as error:
        decode(broken[0])
    assert "--unreadable_images skip" in str(error.value)


def test_a_shard_that_was_cut_is_an_error(shards, caplog):
    whole = (shards / "00005.tar").read_bytes()
    (shards / "00005.tar").write_bytes(whole[:3700])  # within a file
    with pytest.raises(LocalUserError, match="cannot be read: ReadError: unexpected end of data"):
        list(open_stream(str(shards)).one_pass())
    assert "not copied whole" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("1.png", png((1, 1, 1)))], "has no caption column; its columns are png"),
        ([("1.txt", "a")], "has no image column; its columns are txt"),
        ([], "there is no sample in it"),
    ],
    ids=["no caption", "no picture", "empty"],
)
def test_shards_in_another_layout(tmp_path, files, message, write_shard):
    write_shard(tmp_path / "a.tar", files)
    with pytest.raises(UserError, match=message):
        open_stream(str(tmp_path))


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "jpeg", quality=100, subsampling=0)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "is_png", [lambda n: n % 2, lambda n: n > 25, lambda n: n == 0], ids=["mixed", "late", "early"]
)
def test_each_sample_brings_its_picture_whatever_its_ending(tmp_path, write_shard, is_png):
    files = []
    for n in range(30):
        grey = (8 * n, 8 * n, 8 * n)
        files += [(f"{n:03d}.png", png(grey)) if is_png(n) else (f"{n:03d}.JPG", jpeg(grey)), (f"{n:03d}.txt", str(n))]
    write_shard(tmp_path / "a.tar", files)
    read = [(decode(row).getpixel((0, 0))[0] / 8, row["caption"]) for row in open_stream(str(tmp_path)).one_pass()]
    assert [caption for _, caption in read] == [str(n) for n in range(30)]
    assert all(abs(value - int(caption)) < 0.5 for value, caption in read)


def test_odd_samples(tmp_path, write_shard):
    """Captions here in a txt, there in a json; a line separator within one; no picture, no caption; foreign files unread."""
    write_shard(
        tmp_path / "a.tar",
        [("1.png", png((1, 1, 1))), ("1.txt", "a\u2028b\r\nc\n"), ("1.pyd", b"\x80\x04unread"),
         ("2.png", png((2, 2, 2))), ("2.json", {"caption": ["d"]}), ("._3.png", b"a Mac's"), ("3.txt", "e"),
         ("4.png", png((4, 4, 4)))],
    )  # fmt: skip
    rows = list(open_stream(str(tmp_path), caption_column=None).one_pass())
    assert [row["caption"] for row in rows] == ["a\u2028b", "c", "d", "e", None]
    assert [row["image"] is None for row in rows] == [False, False, False, True, False]
    with pytest.raises(LocalUserError, match="sample 3 of .*it has no picture"):
        decode(rows[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("9.txt", b"caf\xe9", "sample 9 of .* is not UTF-8"),
        ("9.txt", "x" * 1_000_000, "1,000,000 characters"),
        ("9.json", b'{"caption": "a', "json of sample 9 of .* is no valid JSON"),
        ("9.json", b'{"caption": "\\ud83d"}', "half of a character"),
        ("9.json", b'{"caption": 5}', "sample 9 of .* is no text or list of texts: 5"),
    ],
)
def test_a_caption_that_cannot_be_read_names_its_sample(tmp_path, write_shard, name, content, message):
    good = [
        (f"{n}.png", png((n, n, n))) if even else (f"{n}.json", {"caption": "x"}) for n in range(9) for even in (1, 0)
    ]
    write_shard(tmp_path / "a.tar", [*good, ("9.png", png((9, 9, 9))), (name, content)])
    with pytest.raises(UserError, match=message):
        list(open_stream(str(tmp_path)).one_pass())


@pytest.mark.parametrize(
    "pattern", ["{000000000..999999999}.tar", "{0..999}/{0..999}/{0..999}.tar", "{0..9}" * 9 + ".tar"]
)
def test_a_pattern_stands_for_so_many_shards_at_most(pattern):
    with pytest.raises(UserError, match="more than 1,000,000 shards"):
        expand_shards(pattern)


def test_rows_of_a_stream_stay_in_its_folder(tmp_path, write_parquet):
    (tmp_path / "outside.png").write_bytes(png((1, 1, 1)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inside.png").write_bytes(png((2, 2, 2)))
    for path, allowed in (("inside.png", True), (str(tmp_path / "outside.png"), False), ("../outside.png", False),
                          ("http://127.0.0.1:9/a.png", False)):  # fmt: skip
        write_parquet(tmp_path / "data" / "train.parquet", [({"bytes": None, "path": path}, "a")])
        stream = open_stream(str(tmp_path / "data"))
        if allowed:
            assert [decode(row).getpixel((0, 0)) for row in stream.one_pass()] == [(2, 2, 2)]
        else:
            with pytest.raises(LocalUserError, match="which is not below"):
                list(stream.one_pass())


def test_nothing_to_stream(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="dataset_name"):
        open_stream(str(tmp_path))
    with pytest.raises(UserError, match="name the shards"):
        open_stream()


def test_shards_in_one_dataset_are_warned_of_only_when_cut(shards, caplog):
    streams.shards_of_folder(shards)
    assert not caplog.text
