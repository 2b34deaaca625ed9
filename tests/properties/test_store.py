"""The store against a dictionary: any order of filling, sharing, removing, damaging and killing, and looking again."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imagedex import files
from imagedex.encoding.store import Store

NUMBERS = st.lists(st.integers(0, 40), min_size=1, max_size=15)  # repeated ones too


class Killed(BaseException):
    """As a signal is: no `except Exception` holds it up."""


def keys_of(numbers):
    return np.stack([np.frombuffer(int(n).to_bytes(16, "little"), np.uint8) for n in numbers])


def encoder(numbers, stop_after=None):
    """A row's vector is its number and its square; killed after so many batches."""

    def encode(batches):
        for place, batch in enumerate(batches):
            if place == stop_after:
                raise Killed
            values = np.asarray(numbers, np.float32)[batch]
            yield {"vectors": np.stack([values, values**2], 1)}

    return encode


class StoreIsADictionary(RuleBasedStateMachine):
    """What the store must have: every number that was filled and whose file nobody has touched since."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name, "store"), {"model": "m"})
        self.sure = set()

    def teardown(self):
        self.folder.cleanup()

    def shards(self):
        return sorted(self.store.folder.glob("shard-*"))

    def changed(self):
        """Files were touched from outside: what the rows of whole files are is read with the store's own keys."""
        self.store = Store(self.store.folder, {"model": "m"})
        whole = [shard.keys for shard in self.store.shards]
        self.sure &= {int.from_bytes(bytes(key[:8]), "little") for keys in whole for key in keys}

    @rule(numbers=NUMBERS, batch_size=st.integers(1, 4), rows_per_shard=st.integers(1, 6), processes=st.integers(1, 3))
    def fill(self, numbers, batch_size, rows_per_shard, processes):
        keys, shares = keys_of(numbers), [(rank, processes) for rank in range(processes)]
        stores = [Store(self.store.folder, {"model": "m"}) for _ in shares]
        for store, share in zip(stores, shares, strict=True):
            store.fill(keys, encoder(numbers), batch_size, share, rows_per_shard)
        self.store.reload()
        self.sure |= set(numbers)
        assert not len(self.store.missing(keys))

    @rule(numbers=NUMBERS, stop_after=st.integers(0, 3), rows_per_shard=st.integers(1, 6))
    def killed_while_encoding(self, numbers, stop_after, rows_per_shard):
        with contextlib.suppress(Killed):
            self.store.fill(keys_of(numbers), encoder(numbers, stop_after), 2, rows_per_shard=rows_per_shard)
        self.store = Store(self.store.folder, {"model": "m"})

    @rule(numbers=NUMBERS, part=st.integers(0, 200))
    def killed_while_writing(self, numbers, part):
        """The process ends before the rename: a part of a file lies beside, under the name it had until then."""
        content = []

        def killed(source, target):
            content.append((source, target, Path(source).read_bytes()))
            raise Killed

        replace, files.os.replace = files.os.replace, killed
        try:
            with contextlib.suppress(Killed):
                self.store.fill(keys_of(numbers), encoder(numbers), 2)
        finally:
            files.os.replace = replace
        for source, _, written in content:
            Path(source).write_bytes(written[:part])
        self.store = Store(self.store.folder, {"model": "m"})

    @rule(data=st.data())
    def remove_a_file(self, data):
        if shards := self.shards():
            data.draw(st.sampled_from(shards)).unlink()
            self.changed()

    @rule(data=st.data(), byte=st.integers(0, 255))
    def change_a_byte(self, data, byte):
        if shards := self.shards():
            path = data.draw(st.sampled_from(shards))
            content = bytearray(path.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] = byte
            path.write_bytes(content)
            self.changed()

    @rule(data=st.data())
    def cut_a_file(self, data):
        if shards := self.shards():
            path = data.draw(st.sampled_from(shards))
            content = path.read_bytes()
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            self.changed()

    @rule(data=st.data())
    def a_file_of_another_model(self, data):
        other = Store(Path(self.folder.name, "other"), {"model": "another"})
        numbers = data.draw(NUMBERS)
        other.fill(
            keys_of(numbers), lambda batches: ({"vectors": np.zeros((len(b), 2), np.float32)} for b in batches), 4
        )
        self.store.folder.mkdir(exist_ok=True)
        for path in other.folder.glob("shard-*"):
            os.replace(path, self.store.folder / path.name)
        self.changed()

    @invariant()
    def what_is_there_is_right(self):
        everything = np.arange(41)
        missing = self.store.missing(keys_of(everything))
        assert not self.sure & set(missing.tolist())
        there = np.setdiff1d(everything, missing)
        if len(there):
            rows = self.store.rows(keys_of(there))
            assert rows.array("vectors").tolist() == [[n, n**2] for n in there.tolist()]
            assert [rows.row("vectors", row)[0] for row in range(len(there))] == there.tolist()


StoreIsADictionary.TestCase.settings = settings(max_examples=30, stateful_step_count=12)
TestStore = StoreIsADictionary.TestCase
