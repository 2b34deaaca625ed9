"""A checkpoint is whole or not gone on from: what is missing, cut off or changed is named, and the next older one is taken."""

import errno
import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from imagedex.errors import UserError
from imagedex.training import whole_checkpoints
from imagedex.training.whole_checkpoints import (
    MANIFEST,
    fault,
    newest_whole,
    numbered,
    put_in_place,
    require_whole,
    rotate,
    write_manifest,
)

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def checkpoint(folder, step, listed=True):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    save_file({"weight": torch.full((64,), float(step))}, place / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, place / name)
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (place / "config.json").write_text("{}")
    if listed:
        write_manifest(place)
    return place


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_there_is_named(tmp_path, name, listed):
    place = checkpoint(tmp_path, 3, listed)
    assert fault(place) is None
    (place / name).unlink()
    expected = "the model's weights" if name.startswith("model") and not listed else name
    assert fault(place) == f"{expected} is not there"


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_named(tmp_path, name, listed):
    place = checkpoint(tmp_path, 3, listed)
    size = (place / name).stat().st_size
    os.truncate(place / name, size // 2)
    assert name in fault(place)


@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, name):
    place = checkpoint(tmp_path, 3)
    size = (place / name).stat().st_size
    for at in {0, size // 2, size - 1}:
        flip(place / name, at)
        assert fault(place) == f"{name} has changed since it was written"
        flip(place / name, at)
    assert fault(place) is None


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"files": 3}', '{"files": {"a": {}}}', "[" * 100_000])
def test_a_manifest_that_is_broken_vouches_for_nothing(tmp_path, content):
    place = checkpoint(tmp_path, 3)
    (place / MANIFEST).write_text(content)
    assert fault(place) == f"its {MANIFEST} is broken"


def test_folders_within_a_checkpoint_are_checked_too(tmp_path):
    place = checkpoint(tmp_path, 3, listed=False)
    (place / "model.safetensors").unlink()
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):  # as FSDP leaves them
        (place / folder).mkdir()
        (place / folder / "__0_0.distcp").write_bytes(b"shard")
    write_manifest(place)
    assert fault(place) is None
    flip(place / "optimizer_0" / "__0_0.distcp")
    assert fault(place) == "optimizer_0/__0_0.distcp has changed since it was written"


def test_the_newest_whole_one_is_taken_and_the_others_are_said(tmp_path, caplog):
    for step in (8, 9, 10, 11):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    flip(tmp_path / "checkpoint-11" / "model.safetensors")
    (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-9")
    assert [record.getMessage().rpartition("/")[2] for record in caplog.records] == [
        "checkpoint-11 is not whole and is passed over: model.safetensors has changed since it was written",
        "checkpoint-10 is not whole and is passed over: optimizer.pt is not there",
    ]


def test_one_without_a_manifest_is_taken_with_a_word(tmp_path, caplog):
    checkpoint(tmp_path, 4, listed=False)
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "could not be checked" in caplog.text


def test_one_that_is_named_has_to_be_whole(tmp_path):
    place = checkpoint(tmp_path, 4)
    assert require_whole(str(place)) == str(place)
    (place / "rng_state.pth").unlink()
    with pytest.raises(UserError, match="checkpoint-4 is not a whole checkpoint: rng_state.pth is not there"):
        require_whole(str(place))
    with pytest.raises(UserError, match="is not there; give one of those within it, such as .*checkpoint-4"):
        require_whole(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        require_whole(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("steps", "limit", "keep", "left"),
    [
        ([1, 2, 3], None, [3], [1, 2, 3]),
        ([1, 2, 3], 2, [3], [2, 3]),
        ([1, 2, 3], 2, [3, 1], [1, 3]),  # the best stays
        ([1, 2, 3], 1, [3, 1], [1, 3]),
        ([9, 10, 11], 1, [11], [11]),
        ([1, 2, 8, 9], 2, [2], [1, 2]),  # of a course that was given up
    ],
)
def test_rotation_keeps_what_it_must(tmp_path, steps, limit, keep, left):
    for step in steps:
        checkpoint(tmp_path, step)
    rotate(tmp_path, tmp_path / "_unfinished", limit, {tmp_path / f"checkpoint-{step}" for step in keep})
    assert [int(path.name[11:]) for path in numbered(tmp_path)] == left
    assert not (tmp_path / "_unfinished").exists()


def test_a_rotation_that_is_killed_leaves_no_torn_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, tmp_path / "_unfinished", 1, {tmp_path / "checkpoint-3"})
    assert [fault(path) for path in numbered(tmp_path)] == [None]


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path):
    checkpoint(tmp_path, 3)
    new = checkpoint(tmp_path / "_unfinished", 3)
    (new / "config.json").write_text('{"a": 1}')
    write_manifest(new)
    put_in_place(new, tmp_path / "checkpoint-3")
    assert fault(tmp_path / "checkpoint-3") is None and not list((tmp_path / "_unfinished").iterdir())
    assert (tmp_path / "checkpoint-3" / "config.json").read_text() == '{"a": 1}'


def test_what_cannot_be_read_is_not_whole(tmp_path, monkeypatch):
    place = checkpoint(tmp_path, 3)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(whole_checkpoints.hashlib, "file_digest", fails)
    assert fault(place) == "Input/output error"
