"""Answers over one gallery or two of the same pictures: what the page and the JSON endpoint share. Safe to be called by many."""

import io
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch
from PIL import Image

from imagedex.gallery import catalog
from imagedex.gallery.gallery import Gallery
from imagedex.gallery.pictures import content_of
from imagedex.gallery.query import Part
from imagedex.modeling.picture_reading import as_rgb
from imagedex.page.answers import Answer, Question, Seen, answers, writes
from imagedex.page.together import Together

THUMBNAIL = 360  # pixels, the longer side
THUMBNAILS = 2048  # of some 15 KiB each, in memory
KEY = re.compile("[0-9a-f]{32}")
DRAWING = 2  # pictures are decoded at once; more threads would take their turns from the answers


class Service:
    """
    Args: galleries, opened; with two of them each question is put to both.
    """

    def __init__(self, galleries: Sequence[Gallery]):
        self.galleries = list(galleries)
        self._turns = Together(self._answers)  # a model on one device answers one after the other
        self._keys: dict[int, catalog.Keys] = {}
        self._times = [time_of(gallery) for gallery in self.galleries]
        self._drawing = ThreadPoolExecutor(DRAWING, thread_name_prefix="pictures")
        self._thumbnail = lru_cache(maxsize=THUMBNAILS)(lambda key, path: drawn(path, THUMBNAIL))
        for number, gallery in enumerate(self.galleries):
            gallery.hidden = ("path", "root")  # strangers are not to ask for the folders of this machine
            if len(gallery):  # loads what the first visitor would wait for
                self.ask(number, Question(["a picture"], top_k=1)).result()

    # pictures

    def path(self, number: int, key: str) -> str | None:
        """Of a picture in the gallery, by its key in hexadecimal digits; None of any other, whatever a visitor sends."""
        if not 0 <= number < len(self.galleries) or not isinstance(key, str) or not KEY.fullmatch(key):
            return None
        table, known = self.galleries[number].table, self._keys.get(number)
        if known is None or known.table is not table:
            known = self._keys[number] = catalog.Keys(table)
        return known.path(bytes.fromhex(key))

    def thumbnail(self, number: int, key: str) -> "Future[bytes | None]":
        """JPEG, of a picture in the gallery; None of any other. The future raises what a decoder raises."""
        return self._drawing.submit(self._picture, number, key, self._thumbnail)

    def picture(self, number: int, key: str, longest: int) -> "Future[bytes | None]":
        """As `thumbnail`, so large."""
        return self._drawing.submit(self._picture, number, key, lambda key, path: drawn(path, longest))

    def _picture(self, number: int, key: str, draw: Callable[[str, str], bytes]) -> bytes | None:
        """What is not there is not kept: it may come."""
        path = self.path(number, key)
        return None if path is None else draw(key, path)

    def seen(self, name: str, picture: Image.Image) -> Seen:
        """A visitor's picture, encoded in its turn. Raises what a decoder raises."""
        upright = as_rgb(picture)
        return self._turns.alone(self._encoded, name, upright).result()

    def _encoded(self, name: str, picture: Image.Image) -> Seen:
        vectors, biases = [], []
        for gallery in self.galleries:
            vector = None if writes(gallery) else gallery.query_vector([Part(picture=picture)])
            bank = None if writes(gallery) else gallery.model.encoder.bank
            vectors.append(vector)
            biases.append(bank.bias(torch.from_numpy(vector)[None]).item() if bank else 0.0)
        return Seen(name, vectors, biases, jpeg(picture, THUMBNAIL))

    # questions

    def ask(self, number: int, question: Question, uploads: Sequence[Seen] = ()) -> "Future[Answer]":
        """What one gallery finds, in its turn. The future raises `UserError`: nothing is asked, the filter is none, ..."""
        return self._turns.ask((number, question, uploads))

    def _answers(self, asked: Sequence[tuple]) -> list:
        """Args: (gallery, question, uploads) of each. Returns: an `Answer` or a `UserError` for each."""
        done: dict[int, Answer | Exception] = {}
        for number, gallery in enumerate(self.galleries):
            places = [place for place, (own, _, _) in enumerate(asked) if own == number]
            if not places:
                continue
            if time_of(gallery) != self._times[number]:  # `imagedex index` has changed it
                self._times[number] = time_of(gallery)
                gallery.refresh()
            questions = [asked[place][1:] for place in places]
            done |= dict(zip(places, answers(gallery, number, questions, self.path), strict=True))
        return [done[place] for place in range(len(asked))]


def time_of(gallery: Gallery) -> int:
    try:
        return os.stat(gallery.folder / catalog.FILE).st_mtime_ns
    except OSError:
        return 0


def smaller(picture: Image.Image, longest: int) -> Image.Image:
    """Where the format can, it is made smaller while it is decoded: a photograph takes an eighth of the time."""
    picture.draft("RGB", (longest, longest))
    return picture


def drawn(path: str, longest: int) -> bytes:
    with Image.open(io.BytesIO(content_of(path))) as picture:
        return jpeg(as_rgb(smaller(picture, longest)), longest)


def jpeg(picture: Image.Image, longest: int) -> bytes:
    picture = picture.copy()
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
