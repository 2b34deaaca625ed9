"""A gallery against brute force: files are painted, spoilt, copied, renamed and deleted, the gallery is brought in step, killed
at any write and opened again, pictures are taken out, in any order; then any question under any filter."""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from PIL import Image

from imagedex import files
from imagedex.errors import UserError
from imagedex.gallery import catalog, compaction
from imagedex.gallery import gallery as gallery_module
from imagedex.gallery.gallery import Gallery

WIDTH, KINDS = 6, 12
ROWS, SMALL = 4, 2  # of a shard, and small shards beyond what is needed: so few that these borders are met
ROOTS = ("first", "second")
NAMES = [f"{folder}{number}.bmp" for folder in ("", "sea/", "wood/deep/") for number in range(5)]
NAME, ROOT, KIND = st.sampled_from(NAMES), st.sampled_from(ROOTS), st.integers(0, KINDS - 1)
SEED = st.integers(0, 2**32)


class Killed(BaseException):
    """As a signal is: no `except Exception` holds it up."""


class Picture(NamedTuple):
    """kind: which of the directions its vector has; None where it cannot be decoded. width: in pixels, None where unknown."""

    content: bytes
    kind: int | None
    width: int | None


def paint(kind: int, width: int) -> Picture:
    with tempfile.TemporaryFile() as file:
        Image.new("RGB", (width, 1), (kind, 0, 0)).save(file, "bmp")
        file.seek(0)
        return Picture(file.read(), kind, width)


def directions() -> np.ndarray:
    """(KINDS, WIDTH) float32: threes so close that float32 products may mistake their order, and float16 makes them one."""
    rng = np.random.default_rng(0)
    near = np.repeat(rng.standard_normal((KINDS // 3, WIDTH)), 3, axis=0)
    return (near + 3e-7 * rng.standard_normal((KINDS, WIDTH))).astype(np.float32)


@functools.cache
def unit_vector(kind: int) -> np.ndarray:
    return torch.nn.functional.normalize(torch.from_numpy(directions()[kind]), dim=0).numpy()


class Pixels(torch.nn.Module):
    """A dual encoder for which a picture is the red of its first pixel."""

    def __init__(self):
        super().__init__()
        self.directions = torch.nn.Parameter(torch.from_numpy(directions()))

    def get_image_features(self, pixel_values):
        return self.directions[pixel_values]


class FirstPixels:
    def __call__(self, images, **kwargs):
        return {"pixel_values": torch.tensor([picture.getpixel((0, 0))[0] % KINDS for picture in images])}


class Bank:
    """A bias against hubs that depends on the vector alone."""

    fingerprint = "bank"

    def bias(self, vectors):
        return vectors[:, 0] / 2


class PixelModel:
    """As a `GalleryModel`."""

    name, files = "pixels", []

    def __init__(self, biased: bool):
        bank = Bank() if biased else None
        self.encoder = SimpleNamespace(model=Pixels(), image_processor=FirstPixels(), bank=bank)
        self.maker = {"model": "pixels", "bank": str(biased)}


FILTERS = {  # the expression, and whether it holds of an image_id and a width
    "folder == 'sea'": lambda name, width: name.rpartition("/")[0] == "sea",
    "width >= 3": lambda name, width: width is not None and width >= 3,
    "1 < width < 4": lambda name, width: width is not None and 1 < width < 4,
    "width > 100": lambda name, width: False,
    "not image_id.startswith('second/')": lambda name, width: not name.startswith("second/"),
    "image_id in ['0.bmp', 'second/sea/1.bmp']": lambda name, width: name in ("0.bmp", "second/sea/1.bmp"),
}
WHERE = st.lists(st.sampled_from(sorted(FILTERS)), max_size=3)


def holds(where: list[str], name: str, picture: Picture) -> bool:
    return all(FILTERS[part](name, picture.width) for part in where)


class GalleryIsBruteForce(RuleBasedStateMachine):
    """on_disk: root -> name -> what lies there. inside: image_id -> what the gallery holds."""

    def __init__(self):
        super().__init__()
        self.folder, self.moments = Path(tempfile.mkdtemp()), itertools.count(1)
        self.on_disk, self.inside = {root: {} for root in ROOTS}, {}
        self.patches = contextlib.ExitStack()
        small = (
            (gallery_module, "ROWS_PER_SHARD", ROWS),
            (compaction, "ROWS_PER_SHARD", ROWS),
            (compaction, "MOST_SMALL", SMALL),
        )
        for where, name, value in small:
            self.patches.enter_context(mock.patch.object(where, name, value))

    @initialize(vector_type=st.sampled_from(["float32", "float16"]), biased=st.booleans(), seed=SEED)
    def begin(self, vector_type, biased, seed):
        self.vector_type, self.biased, self.model = vector_type, biased, PixelModel(biased)
        for root in ROOTS:
            (self.folder / root).mkdir()
        self.gallery = self.opened()
        self.paint(seed)
        self.gallery.add(*self.sources(ROOTS))
        self.reader, self.states = self.opened(), []
        self.now(self.in_step(ROOTS))

    def teardown(self):
        self.patches.close()
        shutil.rmtree(self.folder)

    def opened(self) -> Gallery:
        header, table = catalog.read(self.folder / "gallery") or (None, catalog.empty())
        return Gallery(self.folder / "gallery", self.model, header, table, self.vector_type)

    def sources(self, roots):
        return [self.folder / root for root in roots]

    # what people do with files

    def put(self, root, name, picture):
        path = self.folder / root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.content)
        moment = next(self.moments)
        os.utime(path, ns=(moment, moment))
        self.on_disk[root][name] = picture

    @rule(seed=SEED)
    def paint(self, seed):
        """Some of equal content, in both folders."""
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 20)):
            self.put(rng.choice(ROOTS), rng.choice(NAMES), paint(rng.randrange(KINDS), rng.randint(1, 4)))

    @rule(root=ROOT, name=NAME, kind=KIND, cut=st.integers(0, 3))
    def spoil(self, root, name, kind, cut):
        """No picture at all, or one that ends too early: its head can be read."""
        whole = paint(kind, 4).content
        self.put(root, name, Picture(whole[:-cut], None, 4) if cut else Picture(b"no picture", None, None))

    @rule(data=st.data(), source=ROOT, root=ROOT, name=NAME, stays=st.booleans())
    def copy_or_rename(self, data, source, root, name, stays):
        if self.on_disk[source]:
            old = data.draw(st.sampled_from(sorted(self.on_disk[source])))
            self.put(root, name, self.on_disk[source][old])
            if not stays and (source, old) != (root, name):
                self.delete(source, old)

    @rule(data=st.data(), root=ROOT)
    def delete_some(self, data, root):
        if self.on_disk[root]:
            for name in data.draw(st.lists(st.sampled_from(sorted(self.on_disk[root])), max_size=6, unique=True)):
                self.delete(root, name)

    def delete(self, root, name):
        (self.folder / root / name).unlink()
        del self.on_disk[root][name]

    # what they do with the gallery

    @rule(roots=st.lists(ROOT, min_size=1, unique=True), seed=SEED)
    def bring_in_step(self, roots, seed):
        self.gallery.add(*self.sources(roots))
        self.now(self.in_step(roots))
        self.check_disk()
        self.ask(seed)
        changes = self.gallery.add(*self.sources(roots))
        assert changes.unchanged == sum(len(self.on_disk[root]) for root in roots)
        assert not (changes.added or changes.changed or changes.removed)

    def in_step(self, roots) -> dict[str, Picture]:
        inside = dict(self.inside)
        for root in roots:
            prefix = {"first": "", "second": "second/"}[root]
            inside = {n: picture for n, picture in inside.items() if n.startswith("second/") != bool(prefix)}
            inside |= {prefix + name: picture for name, picture in self.on_disk[root].items()}
        return inside

    def now(self, inside):
        self.inside = inside
        self.states.append(inside)

    @rule(data=st.data(), where=WHERE, seed=SEED)
    def take_out(self, data, where, seed):
        names = data.draw(st.lists(st.sampled_from(sorted(self.inside)), max_size=4)) if self.inside else []
        expression = " and ".join(where) or None
        gone = {name for name, picture in self.inside.items() if expression and holds(where, name, picture)}
        assert self.gallery.remove(names, expression) == sorted(gone | set(names))
        self.now({name: picture for name, picture in self.inside.items() if name not in gone | set(names)})
        self.check_disk()
        self.ask(seed)

    @rule(
        roots=st.permutations(ROOTS),
        count=st.integers(0, 8),
        what=st.sampled_from(["replace", "full", "unlink", "encode"]),
    )
    def killed(self, roots, count, what):
        """Before a file gets its name or is removed, within the encoder; or the disk is full. All has happened, or nothing."""
        where, name, error = {
            "replace": (files.os, "replace", Killed()),
            "full": (files.os, "replace", OSError(28, "No space left on device")),
            "unlink": (Path, "unlink", Killed()),
            "encode": (FirstPixels, "__call__", Killed()),
        }[what]
        real, left = getattr(where, name), itertools.count(-count)

        def fails_once(*args, **kwargs):
            if next(left) == 0:
                raise error
            return real(*args, **kwargs)

        with mock.patch.object(where, name, fails_once), contextlib.suppress(Killed, OSError, UserError):
            self.gallery.add(*self.sources(roots))
        self.gallery = self.opened()
        then = self.in_step(roots)
        keys = {row["image_id"]: row["key"] for row in self.gallery.table.select(["image_id", "key"]).to_pylist()}
        wanted = {name: hashlib.blake2b(picture.content, digest_size=16).digest() for name, picture in then.items()}
        if keys == wanted:
            self.now(then)

    @rule()
    def open_again(self):
        self.gallery = self.opened()

    @precondition(lambda self: self.inside)
    @rule(seed=SEED)
    def ask(self, seed):
        rng = random.Random(seed)
        for _ in range(8):
            query = (
                [rng.gauss(0, 1) for _ in range(WIDTH)] if rng.random() < 0.3 else directions()[rng.randrange(KINDS)]
            )
            query = (np.array(query) / np.linalg.norm(query)).astype(np.float32)
            where = [rng.choice(sorted(FILTERS)) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
            asked = query, rng.randint(1, 20), where
            assert self.found(self.gallery, *asked) == self.brute_force(self.inside, *asked)
            # another process, which opened it at the beginning, answers as it was at one moment since then
            seen = self.found(self.reader, *asked)
            assert any(seen == self.brute_force(state, *asked) for state in self.states)

    def found(self, gallery, query, k, where):
        expression = " and ".join(f"({part})" for part in where) or None
        return [one.image_id for one in gallery.search_vectors(query[None], k, expression)[0]]

    def brute_force(self, inside, query, k, where):
        scores = {}
        for name, picture in inside.items():
            if picture.kind is not None and holds(where, name, picture):
                unit = unit_vector(picture.kind)
                products = unit.astype(self.vector_type).astype(np.float64) * query.astype(np.float64)
                scores[name] = math.fsum(products) - (float(unit[0] / 2) if self.biased else 0)
        return sorted(scores, key=lambda name: (-scores[name], name))[:k]

    def check_disk(self):
        """Rows at most 1.2 times those that live, in few files."""
        live = len({picture.content for picture in self.inside.values() if picture.kind is not None})
        shards = self.gallery.store.shards
        assert sum(len(shard.keys) for shard in shards) <= 1.2 * live + 1
        assert len(shards) <= 2 * math.ceil(live / ROWS) + SMALL


GalleryIsBruteForce.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestGallery = GalleryIsBruteForce.TestCase
