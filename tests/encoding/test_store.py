"""Rows on disk by key: found again in any order, whole or not there, of one maker, and never trusted when a byte has changed."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from imagedex.encoding import store as stores
from imagedex.encoding.store import Store, check_room, picture_keys, weights_fingerprint, with_checksum
from imagedex.errors import UserError
from imagedex.retrieval.gallery import read_gallery

MAKER = {"model": "m"}


def keys_of(numbers) -> np.ndarray:
    return np.stack([np.frombuffer(int(n).to_bytes(16, "little"), np.uint8) for n in numbers])


def doubling(numbers, seen=None):
    """Encodes a row as its number and its double."""

    def encode(batches):
        for batch in batches:
            if seen is not None:
                seen.append(len(batch))
            values = np.asarray(numbers, np.float32)[batch]
            yield {"vectors": np.stack([values, 2 * values], 1), "bias": values}

    return encode


def filled(folder, numbers, seen=None, **options):
    store = Store(folder, MAKER)
    store.fill(keys_of(numbers), doubling(numbers, seen), options.pop("batch_size", 3), **options)
    return store


def shard_files(folder):
    return sorted(folder.glob("shard-*"))


def test_rows_come_back_in_any_order(tmp_path):
    numbers = [5, 3, 900, 7, 1, 12, 44]
    store = filled(tmp_path, numbers, rows_per_shard=3)
    assert len(store) == 7 and len(shard_files(tmp_path)) == 3
    asked = [44, 5, 5, 900, 1]
    for again in (store, Store(tmp_path, MAKER)):
        rows = again.rows(keys_of(asked))
        assert rows.array("bias").tolist() == asked
        assert rows.array("vectors").tolist() == [[n, 2 * n] for n in asked]
        assert rows.array("bias", [3, 0]).tolist() == [900, 44]
        assert [rows.row("vectors", place).tolist() for place in range(len(rows))] == [[n, 2 * n] for n in asked]
        assert str(tmp_path) in Path("/proc/self/maps").read_text()  # mapped, not read
    with pytest.raises(KeyError, match="1 of 2 rows"):
        store.rows(keys_of([5, 6]))


def test_many_shards_take_no_file_descriptors(tmp_path):
    numbers = list(range(60))
    filled(tmp_path, numbers, rows_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    stores_open = [Store(tmp_path, MAKER) for _ in range(2)]
    assert len(os.listdir("/proc/self/fd")) - before < 5
    assert stores_open[1].rows(keys_of(numbers)).array("bias").tolist() == numbers


def test_a_worker_maps_the_files_again_instead_of_getting_their_content(tmp_path):
    numbers = list(range(3000))
    rows = filled(tmp_path, numbers, batch_size=500).rows(keys_of([7, 2999]))
    sent = pickle.dumps(rows)
    assert len(sent) < 2000
    assert pickle.loads(sent).array("bias").tolist() == [7, 2999]


def test_whole_shards_are_verified_once(tmp_path, monkeypatch):
    numbers = list(range(12))
    store = filled(tmp_path, numbers, rows_per_shard=4)
    verified = []
    monkeypatch.setattr(stores, "checksum", lambda arrays, honest=stores.checksum: verified.append(1) or honest(arrays))
    store.reload()
    assert not verified
    victim = shard_files(tmp_path)[0]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store.reload()
    assert len(verified) == 1 and len(store) == 8


def test_only_what_is_missing_is_encoded_and_equal_rows_once(tmp_path):
    filled(tmp_path, range(10))
    seen = []
    store = filled(tmp_path, [3, 77, 9, 77, 78], seen)
    assert sum(seen) == 2 and len(store) == 12
    assert store.rows(keys_of([77, 77, 0])).array("bias").tolist() == [77, 77, 0]


def test_a_stopped_run_has_the_batches_of_one_that_was_not(tmp_path):
    numbers, batches = list(range(23)), []
    filled(tmp_path / "whole", numbers, batches, rows_per_shard=5)

    def stops(all_batches, after=5):
        for number, part in enumerate(doubling(numbers)(all_batches)):
            if number == after:
                raise KeyboardInterrupt
            yield part

    store = Store(tmp_path / "stopped", MAKER)
    with pytest.raises(KeyboardInterrupt):
        store.fill(keys_of(numbers), stops, 3, rows_per_shard=5)
    assert len(shard_files(tmp_path / "stopped")) == 2  # of the third a batch was lost
    rest = []
    filled(tmp_path / "stopped", numbers, rest, rows_per_shard=5)
    assert rest == batches[4:]
    for one, other in zip(*(shard_files(tmp_path / name) for name in ("whole", "stopped")), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_processes_that_share_the_work_write_what_one_writes(tmp_path):
    numbers = list(range(31))
    filled(tmp_path / "one", numbers, rows_per_shard=4)
    shared = [Store(tmp_path / "three", MAKER) for _ in range(3)]  # each has looked before anyone writes
    seen = []
    for rank, store in enumerate(shared):
        store.fill(keys_of(numbers), doubling(numbers, seen), 3, (rank, 3), rows_per_shard=4)
    assert sum(seen) == len(numbers)
    for one, other in zip(*(shard_files(tmp_path / name) for name in ("one", "three")), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header"])
def test_a_damaged_shard_is_found_and_made_anew(tmp_path, damage, caplog):
    numbers = list(range(12))
    filled(tmp_path, numbers, rows_per_shard=4)
    victim = shard_files(tmp_path)[1]
    content = victim.read_bytes()
    broken = {
        "cut": content[:-3],
        "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        "empty": b"",
        "header": b"\xff" * 8 + content[8:],
    }[damage]
    victim.write_bytes(broken)
    seen = []
    store = filled(tmp_path, numbers, seen, rows_per_shard=4)
    assert f"{victim} is damaged" in caplog.text and sum(seen) == 4
    assert victim.read_bytes() == content
    assert store.rows(keys_of(numbers)).array("bias").tolist() == numbers


def test_every_flipped_byte_of_a_shard_is_found(tmp_path, caplog):
    """Of header and rows alike: never an exception, never a wrong row."""
    filled(tmp_path, range(3))
    (victim,) = shard_files(tmp_path)
    content = victim.read_bytes()
    for place in range(len(content)):
        caplog.clear()
        victim.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        assert len(Store(tmp_path, MAKER)) == 0 and str(victim) in caplog.text, place
    for length in range(0, len(content), 7):
        victim.write_bytes(content[:length])
        assert len(Store(tmp_path, MAKER)) == 0, length
    filled(tmp_path, range(3))
    assert victim.read_bytes() == content


def test_every_flipped_byte_of_the_record_is_found_and_mended(tmp_path, caplog):
    filled(tmp_path, range(3))
    record = tmp_path / "store.json"
    content = record.read_bytes()
    unharmed = 0
    for place in range(len(content)):
        caplog.clear()
        record.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        seen = []
        filled(tmp_path, range(3), seen)
        assert not seen  # the rows know themselves whose they are
        if "store.json is damaged" in caplog.text:
            assert record.read_bytes() == content, place
        else:
            unharmed += 1  # the checksum's own name, without which it is a record as it used to be
    assert unharmed <= len("checksum")


def test_a_folder_that_is_deleted_meanwhile_is_made_anew(tmp_path, caplog):
    numbers = list(range(10))

    def deletes(batches, at=3, times=[1]):  # noqa: B006  one for all calls
        for number, part in enumerate(doubling(numbers)(batches)):
            if number == at and times[0]:
                times[0] -= 1
                shutil.rmtree(tmp_path / "store")
            yield part

    store = Store(tmp_path / "store", MAKER)
    store.fill(keys_of(numbers), deletes, 2, rows_per_shard=2)
    assert store.rows(keys_of(numbers)).array("bias").tolist() == numbers
    assert "has lost rows" in caplog.text and len(Store(tmp_path / "store", MAKER)) == 10

    def always(batches):
        for part in doubling(numbers)(batches):
            shutil.rmtree(tmp_path / "other", ignore_errors=True)
            yield part

    with pytest.raises(UserError, match="something deletes it"):
        Store(tmp_path / "other", MAKER).fill(keys_of(numbers), always, 2, rows_per_shard=2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_more_is_one_line_and_breaks_nothing(tmp_path, monkeypatch, code):
    numbers, written = list(range(9)), []

    def fails(handle, data, honest=os.fdopen):
        written.append(1)
        if len(written) > 3:  # store.json and two shards
            raise OSError(code, os.strerror(code))
        return honest(handle, data)

    monkeypatch.setattr(os, "fdopen", fails)
    with pytest.raises(UserError, match=os.strerror(code)):
        filled(tmp_path, numbers, rows_per_shard=3)
    monkeypatch.undo()
    assert len(Store(tmp_path, MAKER)) == 6 and not list(tmp_path.glob(".*"))
    seen = []
    filled(tmp_path, numbers, seen, rows_per_shard=3)
    assert sum(seen) == 3


def test_a_shard_of_another_maker_is_not_taken(tmp_path, caplog):
    filled(tmp_path / "a", range(4))
    other = Store(tmp_path / "b", {"model": "other"})
    other.fill(keys_of(range(4, 8)), doubling(range(4, 8)), 3)
    (foreign,) = shard_files(tmp_path / "b")
    (tmp_path / "a" / foreign.name).write_bytes(foreign.read_bytes())
    store = Store(tmp_path / "a", MAKER)
    assert len(store) == 4 and "is of another store" in caplog.text


def test_a_folder_of_another_maker_or_format_is_refused(tmp_path):
    filled(tmp_path, range(4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="index of another model"):
        Store(tmp_path, {"model": "other"}, "index")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    record = json.loads((tmp_path / "store.json").read_text())
    del record["checksum"]
    (tmp_path / "store.json").write_text(json.dumps(with_checksum(record | {"format": 999})))
    with pytest.raises(UserError, match="another format"):
        Store(tmp_path, MAKER)
    (tmp_path / "store.json").unlink()
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="older format"):
        Store(tmp_path, MAKER)


KILLED = """
import sys, time
import numpy as np
sys.path[:0] = {path!r}
from imagedex.encoding.store import Store
keys = np.arange(4000 * 16, dtype=np.int64).astype(np.uint8).reshape(-1, 16)
keys[:, :8] = np.arange(4000, dtype=np.int64).view(np.uint8).reshape(-1, 8)
def encode(batches):
    for batch in batches:
        time.sleep(0.002)
        yield {{"vectors": np.repeat(np.asarray(batch, np.float32)[:, None], 8, 1)}}
Store({folder!r}, {{"model": {maker!r}}}).fill(keys, encode, 4, rows_per_shard=40)
"""


def test_a_kill_loses_at_most_the_shard_at_work_and_never_mixes_makers(tmp_path):
    def start(folder, maker):
        code = KILLED.format(path=[p for p in sys.path if p], folder=str(tmp_path / folder), maker=maker)
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ""})

    process = start("killed", "m")
    deadline = time.time() + 60
    while len(shard_files(tmp_path / "killed")) < 5 and time.time() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    whole = [path for path in shard_files(tmp_path / "killed")]
    assert 5 <= len(whole) < 100
    store = Store(tmp_path / "killed", MAKER)
    assert len(store) == 40 * len(whole)  # every shard that is there is whole
    with pytest.raises(UserError, match="another model"):
        Store(tmp_path / "killed", {"model": "other"})
    assert start("killed", "m").wait() == 0 and start("whole", "m").wait() == 0
    for one, other in zip(*(shard_files(tmp_path / name) for name in ("whole", "killed")), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_two_runs_over_one_folder_are_both_right(tmp_path):
    code = KILLED.format(path=[p for p in sys.path if p], folder=str(tmp_path / "shared"), maker="m")
    both = [subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ""}) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    store = Store(tmp_path / "shared", MAKER)
    assert len(store) == 4000 and not list((tmp_path / "shared").glob(".*"))


def test_room(tmp_path, monkeypatch):
    check_room(tmp_path / "not" / "yet", 10)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: type("usage", (), {"free": 3_000_000}))
    with pytest.raises(UserError, match="needs 5 MB and its disk has 3 MB left"):
        check_room(tmp_path, 5_000_000)


def test_the_fingerprint_sees_weights_and_settings(tiny_clip):
    import torch
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(tiny_clip)
    known = weights_fingerprint(model, {"size": 30})
    assert weights_fingerprint(CLIPModel.from_pretrained(tiny_clip), {"size": 30}) == known
    assert weights_fingerprint(model, {"size": 31}) != known
    model.config.text_config.num_attention_heads *= 2  # the same weights, other states
    assert weights_fingerprint(model, {"size": 30}) != known
    model.config.text_config.num_attention_heads //= 2
    model.config._name_or_path = "elsewhere"  # where it came from does not matter
    assert weights_fingerprint(model, {"size": 30}) == known
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    assert weights_fingerprint(model, {"size": 30}) != known
    assert weights_fingerprint(CLIPModel.from_pretrained(tiny_clip, dtype=torch.bfloat16), {"size": 30}) != known


def test_a_changed_picture_has_another_key(picture_folder, tmp_path):
    (tmp_path / "a.png").write_bytes((picture_folder / "copy.png").read_bytes())
    first = picture_keys(read_gallery(str(tmp_path)))
    assert (picture_keys(read_gallery(str(tmp_path))) == first).all()
    other = next(picture_folder.glob("*.png"))
    (tmp_path / "a.png").write_bytes(other.read_bytes() + b"\0")
    assert (picture_keys(read_gallery(str(tmp_path))) != first).any()


def test_embedded_pictures_have_keys_of_their_bytes(picture_folder):
    paths = read_gallery(str(picture_folder)).select(range(3))

    def embedded(extra=b""):
        return paths.map(
            lambda row: {"image": {"bytes": (picture_folder / row["image_id"]).read_bytes() + extra, "path": None}}
        )

    keys = picture_keys(embedded())
    assert (picture_keys(embedded()) == keys).all() and len(np.unique(keys, axis=0)) == 3
    assert (picture_keys(embedded(b"\0")) != keys).any(1).all()
