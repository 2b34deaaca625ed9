"""Frozen towers read once: the same states as reading anew, over runs, splits and views; other weights are never mixed in."""

import errno
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessorPil

from imagedex import cli
from imagedex.corpora import load_corpus
from imagedex.encoding import store as stores
from imagedex.errors import UserError
from imagedex.files import write_atomically
from imagedex.training import kept as keeping
from imagedex.training.augmentation import RandomResizedCrop
from imagedex.training.kept import Keeper, clear_kept, default_keep_dir, token_keys
from imagedex.training.pictures import Pictures, stacked


@pytest.fixture(scope="module")
def pictures(flickr_folder):
    return Pictures(
        load_corpus(str(flickr_folder)).splits["train"], ViTImageProcessorPil(size={"height": 16, "width": 16})
    )


class Tower(torch.nn.Module):
    """Counts the pictures it reads."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.read = torch.nn.Linear(3 * 16 * 16, 5), 0

    def pool(self, batch):
        self.read += len(batch["pixel_values"])
        return self.layer(batch["pixel_values"].flatten(1))


def keeper(tower, tmp_path, settings=(), batch_size=5):
    return Keeper("image_states", tower, tower.pool, stacked, list(settings), tmp_path, batch_size)


def test_states_are_those_of_reading_anew_and_nothing_is_read_twice(pictures, tmp_path, caplog):
    tower = Tower()
    with caplog.at_level(logging.INFO, logger="imagedex"):
        kept = keeper(tower, tmp_path).keep(pictures, pictures.keys())
    assert "0 of 12 image states are kept" in caplog.text and "the others take 0.0 MB" in caplog.text
    assert tower.read == 12 + 1  # one to know how much room they need, which is said before anything is written
    with torch.no_grad():
        for row in range(len(pictures)):
            expected = tower.pool(stacked([pictures[row]]))[0]
            torch.testing.assert_close(kept[row]["image_states"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept.states([3, 1]), torch.stack([kept[3]["image_states"], kept[1]["image_states"]]))

    tower.read = 0
    again = keeper(tower, tmp_path, batch_size=3).keep(pictures, pictures.keys())  # another run
    part = pictures.gallery.select([7, 2])  # another split
    fewer = keeper(tower, tmp_path).keep(part, Pictures(part, None).keys())
    assert tower.read == 0 and len(again) == 12
    assert torch.equal(fewer.states(slice(None)), kept.states([7, 2]))


def test_other_weights_and_other_settings_are_kept_apart(pictures, tmp_path):
    keys = pictures.keys()
    states = [
        keeper(tower, tmp_path, settings).keep(pictures, keys).states(slice(None))
        for tower, settings in ((Tower(), ["a"]), (Tower(1), ["a"]), (Tower(), ["b"]))
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert not torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_views_are_drawn_once_for_all_and_then_taken_at_random(flickr_folder, tmp_path):
    corpus = load_corpus(str(flickr_folder)).splits["train"]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    augmented = Pictures(corpus, processor, augment=RandomResizedCrop((16, 16)))
    tower = Tower()
    torch.manual_seed(5)
    kept = keeper(tower, tmp_path).keep(augmented, augmented.keys(), views=3)
    torch.manual_seed(6)  # what was drawn before does not matter
    again = keeper(Tower(), tmp_path / "again").keep(augmented, augmented.keys(), views=3)
    views = [kept.states(slice(None), view) for view in range(3)]
    for view in range(3):
        assert torch.equal(again.states(slice(None), view), views[view])
        assert not torch.equal(views[view], views[view - 1])
    drawn = {tuple(kept[4]["image_states"].tolist()) for _ in range(60)}
    assert drawn == {tuple(view[4].tolist()) for view in views}
    tower.read = 0
    more = keeper(tower, tmp_path).keep(augmented, augmented.keys(), views=4)
    assert tower.read == 12 + 1 and len(more.views) == 4


def test_equal_tokens_are_kept_once():
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[1, 2], [1, 2, 3], [1, 2]], "attention_mask": [[1, 1], [1, 1, 1], [1, 1]]})
    keys = token_keys(rows)
    assert (keys[0] == keys[2]).all() and (keys[0] != keys[1]).any()
    other = Dataset.from_dict({"input_ids": [[1, 21]], "attention_mask": [[1, 1]]})
    assert (token_keys(other)[0] != keys[0]).any()


def test_a_full_disk_is_said_before_anything_is_written_and_memory_does(pictures, tmp_path, monkeypatch, caplog):
    expected = keeper(Tower(), tmp_path / "room").keep(pictures, pictures.keys()).states(slice(None))
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    kept = keeper(Tower(), tmp_path / "none").keep(pictures, pictures.keys())
    assert torch.equal(kept.states(slice(None)), expected) and not (tmp_path / "none").exists()
    assert "its disk has 0 MB left" in caplog.text and caplog.text.count("kept in memory, for this run alone") == 1
    assert torch.equal(pickle.loads(pickle.dumps(kept)).states([3]), expected[[3]])  # as a worker gets it
    monkeypatch.setattr(keeping, "IN_MEMORY", 100)
    with pytest.raises(UserError, match="its disk has 0 MB left"):
        keeper(Tower(), tmp_path / "none").keep(pictures, pictures.keys())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_folder_that_takes_no_more_is_said_once_and_memory_does(pictures, tmp_path, monkeypatch, caplog, code):
    expected = keeper(Tower(), tmp_path / "room").keep(pictures, pictures.keys()).states(slice(None))
    monkeypatch.setattr(keeping, "LARGEST_SHARD", 5 * 5 * 4)  # shards of five rows
    monkeypatch.setattr(stores, "write_atomically", failing_after(2, code))  # store.json and one shard
    kept = keeper(Tower(), tmp_path / "full").keep(pictures, pictures.keys())
    assert torch.equal(kept.states(slice(None)), expected)
    assert caplog.text.count(os.strerror(code)) == 1 and "kept in memory, for this run alone" in caplog.text
    assert len(list((tmp_path / "full").glob("*/shard-*"))) == 1
    monkeypatch.undo()
    tower = Tower()  # with room again only the others are read
    assert torch.equal(keeper(tower, tmp_path / "full").keep(pictures, pictures.keys()).states(slice(None)), expected)
    assert tower.read == 12 - 5 + 1
    assert not list((tmp_path / "full").glob("*/.*"))


def failing_after(count, code):
    """Writes so many files, then fails as a file system does."""
    left = [count]

    def write(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        write_atomically(path, content)

    return write


def test_a_folder_that_cannot_be_written_is_one_line(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--keep_dir"):
        keeper(Tower(), tmp_path / "file").keep(pictures, pictures.keys())


def test_one_command_clears_what_was_kept_and_nothing_else(pictures, tmp_path, capsys, monkeypatch):
    keeper(Tower(), tmp_path).keep(pictures, pictures.keys())
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "image_states-of-mine").mkdir()
    cli.main(["clear-kept", str(tmp_path)])
    said = capsys.readouterr().out
    assert "image_states-" in said and f"MB removed from {tmp_path}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_states-of-mine", "mine.txt"]
    monkeypatch.setenv("IMAGEDEX_KEEP_DIR", str(tmp_path / "none"))
    assert default_keep_dir() == tmp_path / "none" and clear_kept(default_keep_dir()) == {}
    monkeypatch.delenv("IMAGEDEX_KEEP_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(default_keep_dir()) == "/cache/imagedex/kept"
    with pytest.raises(SystemExit):
        cli.main(["clear-kept", "--what"])


def test_keys_are_of_the_pictures(pictures):
    assert len(np.unique(pictures.keys(), axis=0)) == 12
