"""Indexes through changes, against products of all stored vectors; what becomes of an index that is not this gallery's."""

import errno
import importlib.util
import logging
import shutil
import sys

import numpy as np
import pytest

from imagedex.encoding.store import Store
from imagedex.errors import UserError
from imagedex.gallery.engines import milvus, searcher
from imagedex.gallery.engines.index import Pictures
from imagedex.gallery.engines.searcher import Searcher

SIZE = 24
needs_milvus = pytest.mark.skipif(
    importlib.util.find_spec("milvus_lite") is None, reason="milvus-lite is not installed"
)
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
ENGINES = [pytest.param("faiss", marks=needs_faiss), pytest.param("milvus", marks=needs_milvus)]


class World:
    """Vectors in a store, and any of their rows as a gallery's pictures."""

    def __init__(self, folder, count, biased=False, kind=np.float32, clusters=12, seed=0):
        rng = np.random.default_rng(seed)
        middles = rng.standard_normal((clusters, SIZE))
        self.cluster = rng.integers(0, clusters, count)
        vectors = middles[self.cluster] + 0.4 * rng.standard_normal((count, SIZE))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(kind)
        self.middles = middles / np.linalg.norm(middles, axis=1, keepdims=True)
        self.keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        self.bias = rng.random(count).astype(np.float32) if biased else None
        self.store = Store(folder, {"model": "x"})
        for part in np.array_split(np.arange(count), 5):
            self.store.write(
                self.keys[part], vectors=self.vectors[part], **({"bias": self.bias[part]} if biased else {})
            )
        self.store.reload()

    def pictures(self, chosen, maker="m"):
        names = [f"{(int(row) * 7919) % 100_003:06}-{at}" for at, row in enumerate(chosen)]
        bias = None if self.bias is None else "bias"
        return Pictures(self.keys[chosen], self.store.rows(self.keys[chosen]), names, bias, maker)

    def best(self, query, chosen, names, k, allowed=None):
        scores = (self.vectors[chosen].astype(np.float64) * query.astype(np.float64)).sum(1)
        if self.bias is not None:
            scores = scores - self.bias[chosen]
        there = range(len(chosen)) if allowed is None else np.flatnonzero(allowed)
        return sorted(there, key=lambda row: (-scores[row], names[row]))[:k]


def questions(count, seed=1):
    vectors = np.random.default_rng(seed).standard_normal((count, SIZE))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def everywhere(monkeypatch):
    """Indexes that look at all of their cells, and that are asked however few pictures there are."""
    monkeypatch.setattr("imagedex.gallery.engines.index.Index.few", 0)
    monkeypatch.setattr(milvus, "VISITED", milvus.CELLS)
    monkeypatch.setattr("imagedex.gallery.engines.faiss_ivf.TARGET", 1.0)
    measured = "imagedex.gallery.engines.faiss_ivf.FaissIndex._measured"
    monkeypatch.setattr(measured, lambda self, *_: np.full(11, self.index.nlist))


def asked(engine, world, chosen, queries, k, allowed=None):
    pictures = world.pictures(chosen)
    found = engine.search(queries, pictures, k, allowed)
    expected = [world.best(query, chosen, pictures.names, k, allowed) for query in queries]
    assert [[row for row, _ in answer] for answer in found] == expected
    return found


@pytest.fixture
def exactly_never(monkeypatch):
    """So that what answers is the index."""
    monkeypatch.setattr("imagedex.gallery.engines.index.exact.search", lambda *_, **__: pytest.fail("exact search"))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_the_order_of_exact_products_through_changes_and_filters(tmp_path, everywhere, exactly_never, name, biased):
    world, rng = World(tmp_path / "v", 900, biased, np.float16), np.random.default_rng(3)
    engine, queries = Searcher(tmp_path, name), questions(4)
    chosen = rng.permutation(900)[:400]
    for _ in range(4):
        asked(engine, world, chosen, queries, 10)
        for share in (0.9, 0.2, 0.05):
            allowed = rng.random(len(chosen)) < share
            asked(engine, world, chosen, queries, min(7, int(allowed.sum()) - 1), allowed)
        kept = rng.permutation(chosen)[: len(chosen) * 3 // 4]
        chosen = np.concatenate([kept, rng.permutation(np.setdiff1d(np.arange(900), kept))[:150]])
    again = Searcher(tmp_path, name)  # from disk: in step before it is asked
    asked(again, world, chosen, queries, 10)
    index = again.follow(world.pictures(chosen))
    assert not index.lacking(world.keys[chosen]).any() and index.delete_others(world.keys[chosen]) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_pictures_that_lie_there_twice_and_equal_vectors(tmp_path, everywhere, name):
    world = World(tmp_path / "v", 600)
    world.vectors[100:500] = world.vectors[100]  # more equal ones than an index is asked for
    shutil.rmtree(tmp_path / "v")
    world.store = Store(tmp_path / "v", {"model": "x"})
    world.store.write(world.keys, vectors=world.vectors)
    world.store.reload()
    chosen = np.concatenate([np.arange(600), np.repeat(7, 30), [100, 101]])
    queries = np.stack([world.vectors[100], world.vectors[7], *questions(2)])
    asked(Searcher(tmp_path, name), world, chosen, queries, 20)


@pytest.mark.parametrize("name", ENGINES)
def test_an_index_of_another_gallery_is_made_anew(tmp_path, everywhere, name, caplog):
    world, other = World(tmp_path / "v", 300), World(tmp_path / "w", 300, seed=5)
    other.keys = world.keys  # the same pictures, as another model sees them
    shutil.rmtree(tmp_path / "w")
    other.store = Store(tmp_path / "w", {"model": "x"})
    other.store.write(other.keys, vectors=other.vectors)
    other.store.reload()
    chosen = np.arange(300)
    asked(Searcher(tmp_path, name), world, chosen, questions(3), 5)
    engine, pictures = Searcher(tmp_path, name), other.pictures(chosen, maker="another")
    found = engine.search(questions(3), pictures, 5, None)
    expected = [other.best(query, chosen, pictures.names, 5) for query in questions(3)]
    assert [[row for row, _ in answer] for answer in found] == expected
    assert "is made anew" in caplog.text


@needs_faiss
@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "foreign", "older"])
def test_a_damaged_index_is_made_anew_and_one_left_behind_catches_up(tmp_path, everywhere, damage, caplog):
    world, chosen = World(tmp_path / "v", 400), np.arange(300)
    asked(Searcher(tmp_path, "faiss"), world, chosen, questions(3), 5)
    file = tmp_path / "faiss" / "index"
    content = bytearray(file.read_bytes())
    later = np.arange(100, 400)
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    elif damage == "older":  # killed after the catalog was written and before the index was
        asked(Searcher(tmp_path, "faiss"), world, later, questions(3), 5)
    sizes = {"cut": len(content) // 3, "empty": 0}
    file.write_bytes(b"something else" if damage == "foreign" else bytes(content[: sizes.get(damage)]))
    asked(Searcher(tmp_path, "faiss"), world, later, questions(3), 5)
    assert ("is damaged" in caplog.text) == (damage != "older")


@needs_faiss
def test_clusters_are_used_and_cells_without_an_allowed_picture_are_passed_over(tmp_path, monkeypatch, exactly_never):
    monkeypatch.setattr("imagedex.gallery.engines.index.Index.few", 0)
    world = World(tmp_path / "v", 6000, clusters=60)
    engine, chosen, rng = Searcher(tmp_path, "faiss"), np.arange(6000), np.random.default_rng(2)
    pictures = world.pictures(chosen)
    index = engine.follow(pictures)
    assert index.visited[4] < index.index.nlist / 2
    near = rng.standard_normal((40, SIZE)) / SIZE**0.5 + world.vectors[rng.integers(0, 6000, 40)]
    near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    for allowed in (None, rng.random(6000) < 0.1):
        found = engine.search(near, pictures, 10, allowed)
        hits = [
            len({row for row, _ in answer} & set(world.best(query, chosen, pictures.names, 10, allowed)))
            for query, answer in zip(near, found, strict=True)
        ]
        assert np.mean(hits) >= 9.5
    for cluster in range(5):  # the pictures that pass lie where the question never looks
        away = (-world.middles[cluster])[None].astype(np.float32)
        asked(engine, world, chosen, away, 10, world.cluster == cluster)


@needs_faiss
def test_it_is_made_anew_when_the_gallery_has_doubled_and_never_holds_more_places_than_it_had_pictures(
    tmp_path, everywhere
):
    world, engine = World(tmp_path / "v", 900), Searcher(tmp_path, "faiss")
    sizes = []
    for chosen in (np.arange(200), np.arange(390), np.arange(300, 690), np.arange(900), np.arange(40)):
        asked(engine, world, chosen, questions(2), 5)
        sizes.append((engine.follow(world.pictures(chosen)).record["trained"], len(engine._index.keys)))
    assert sizes == [(200, 200), (200, 390), (200, 390), (900, 900), (40, 40)]


@needs_faiss
@pytest.mark.parametrize("when", ["before", "within"])
def test_an_index_that_cannot_be_written_is_kept_for_the_run(tmp_path, everywhere, caplog, monkeypatch, when):
    world, chosen = World(tmp_path / "v", 300), np.arange(300)
    if when == "before":
        (tmp_path / "faiss").write_text("in the way")
    else:
        monkeypatch.setattr("imagedex.gallery.engines.faiss_ivf.Digested", FullDisk)
    asked(Searcher(tmp_path, "faiss"), world, chosen, questions(2), 5)
    assert "kept for this run alone" in caplog.text
    assert when == "before" or list((tmp_path / "faiss").iterdir()) == []


class FullDisk:
    def __init__(self, file):
        self.room = 10_000

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content)


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_exact_up_to_a_size_and_says_what_it_takes_beyond(tmp_path, monkeypatch, caplog, there):
    if there:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(searcher, "EXACT_UP_TO", 250)
    world, engine = World(tmp_path / "v", 300), Searcher(tmp_path)
    assert engine.follow(world.pictures(np.arange(250))) is None and not caplog.text
    for _ in range(2):
        asked(engine, world, np.arange(300), questions(2), 5)
    lines = [record.message for record in caplog.records if "300 pictures, more than 250" in record.message]
    assert len(lines) == 1 and ("faiss proposes" if there else "pip install 'imagedex[faiss]'") in lines[0]
    assert (tmp_path / "faiss" / "index").is_file() == there


@pytest.mark.parametrize(
    "engine, says",
    [
        ("fais", "there are auto, exact, faiss, milvus or milvus:URI"),
        ("milvus:", "give milvus:http"),
        ("milvus:somewhere", "ends in .db"),
        ("milvus:http://me:secret@host:19530", "MILVUS_TOKEN"),
        ("milvus:http://host:19530#no name", "a collection's name"),
    ],
)
def test_an_engine_that_there_is_not(tmp_path, engine, says):
    with pytest.raises(UserError, match=says) as error:
        Searcher(tmp_path, engine)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("engine, package", [("faiss", "faiss"), ("milvus", "pymilvus")])
def test_a_missing_package_is_named_with_the_command_that_brings_it(tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'imagedex\[{engine}\]', or give --engine exact"):
        Searcher(tmp_path, engine)


@needs_milvus
def test_milvus_after_a_kill_a_lost_file_and_a_stranger(tmp_path, everywhere):
    world, chosen = World(tmp_path / "v", 400), np.arange(300)
    asked(Searcher(tmp_path, "milvus"), world, chosen, questions(2), 5)
    index = milvus.MilvusIndex(tmp_path)
    index.follow(world.pictures(chosen))
    index.delete_others(world.keys[:200])  # ... and killed: it has not come to `save`
    asked(Searcher(tmp_path, "milvus"), world, np.arange(100, 400), questions(2), 5)
    index.client.delete(index.collection, ids=index.ids_of(world.keys[100:150]).tolist())  # by another hand
    asked(Searcher(tmp_path, "milvus"), world, np.arange(100, 400), questions(2), 5)
    (tmp_path / "milvus.json").write_text("{")
    asked(Searcher(tmp_path, "milvus"), world, np.arange(400), questions(2), 5)


@needs_milvus
def test_a_milvus_that_does_not_answer_or_is_no_milvus(tmp_path, monkeypatch):
    monkeypatch.setattr(milvus, "PATIENCE", 1)
    with pytest.raises(UserError, match="Milvus at http://127.0.0.1:9"):
        Searcher(tmp_path, "milvus:http://127.0.0.1:9").ready()
    (tmp_path / "milvus.db").write_text("no database")
    with pytest.raises(UserError, match="milvus.db"):
        Searcher(tmp_path, "milvus").ready()
