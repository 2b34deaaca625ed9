"""Answers over one gallery or two of the same pictures: what the page and the JSON endpoint share. Safe to be called by many."""

import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from imagedex.errors import UserError
from imagedex.gallery.gallery import Gallery
from imagedex.gallery.pictures import open_picture
from imagedex.gallery.query import Part
from imagedex.modeling.picture_reading import as_rgb

THUMBNAIL = 360  # pixels, the longer side
NEAR_DUPLICATE = 0.98  # cosine between two pictures
WITHOUT = 0.5  # weight of what the pictures are to be without: a whole one drives to the farthest, not to the rest
LONGEST_QUERY = 2000  # characters
MOST_FOUND = 200
MOST_FOLDED = 4096  # pictures that are looked at for a page of unlike ones
MOST_UPLOADS = 40


@dataclass
class Question:
    """What is asked. texts: sentences that are added; like: keys (hex) of pictures of the gallery that count, too; picture: one
    that was dropped on the page."""

    texts: Sequence[str] = ()
    without: str = ""
    like: Sequence[str] = ()
    picture: Image.Image | None = None
    where: str = ""
    top_k: int = 20
    fold: bool = True


@dataclass
class Upload:
    """A picture of one visitor, kept as long as the page is open and never written."""

    name: str
    vectors: list[np.ndarray]  # one a gallery
    biases: list[float]  # against hubs
    thumbnail: bytes


@dataclass
class Card:
    """A picture that was found. key: of its content; "" of an upload. folded: how many near-duplicates stand behind it."""

    key: str
    title: str
    score: float
    folded: int = 0
    upload: Upload | None = None


@dataclass
class Answer:
    cards: list[Card]
    milliseconds: float


class Service:
    """
    Args: galleries, opened; with two of them each question is put to both.
    """

    def __init__(self, galleries: Sequence[Gallery]):
        self.galleries = list(galleries)
        self._lock = threading.Lock()  # a model on one device answers one after the other
        self._paths = [
            {
                key.hex(): path
                for key, path in zip(*(g.table[name].to_pylist() for name in ("key", "path")), strict=True)
            }
            for g in self.galleries
        ]
        self.thumbnail = lru_cache(maxsize=2048)(self._thumbnail)
        for gallery in self.galleries:
            gallery.hidden = ("path", "root")  # strangers are not to ask for the folders of this machine
        for gallery in self.galleries:  # loads what the first visitor would wait for
            if len(gallery):
                gallery.search("a picture", top_k=1)

    def path(self, gallery: int, key: str) -> str | None:
        """Of a picture in the gallery; None of any other."""
        return self._paths[gallery].get(key) if 0 <= gallery < len(self._paths) else None

    def _thumbnail(self, gallery: int, key: str) -> bytes | None:
        path = self.path(gallery, key)
        return None if path is None else jpeg(open_picture(path), THUMBNAIL)

    def answer(self, number: int, question: Question, uploads: Sequence[Upload] = ()) -> Answer:
        """What one gallery finds. Raises `UserError`: nothing is asked, or the filter is none."""
        started, gallery = time.perf_counter(), self.galleries[number]
        top_k = min(question.top_k, MOST_FOUND)
        with self._lock:
            vector = self._vector(number, question)
            own, asked = [uploaded(number, upload, vector) for upload in uploads], top_k
            while True:
                found = gallery.search_vectors(vector[None], asked, question.where.strip() or None)[0]
                cards = [Card(one.row["key"].hex(), one.image_id, one.score) for one in found]
                cards = sorted([*cards, *own], key=lambda card: -card.score)
                cards = self._folded(number, cards) if question.fold else cards
                if len(cards) >= top_k or len(found) < asked or asked >= MOST_FOLDED:
                    break
                asked *= 4  # many are near-duplicates of one another
        return Answer(cards[:top_k], 1000 * (time.perf_counter() - started))

    def _vector(self, number: int, question: Question) -> np.ndarray:
        parts = [Part(text=text[:LONGEST_QUERY]) for text in question.texts if text.strip()]
        for key in question.like:
            path = self.path(number, key)
            if path is None:
                raise UserError("this picture is not in the gallery any more")
            parts.append(Part(path=path))
        if question.picture is not None:
            parts.append(Part(picture=question.picture))
        if not parts:
            raise UserError("Type a sentence, drop a picture, or both.")
        if question.without.strip():
            parts.append(Part(text=question.without[:LONGEST_QUERY], weight=-WITHOUT))
        return self.galleries[number].query_vector(parts)

    def upload(self, name: str, picture: Image.Image) -> Upload:
        """Raises `UserError` for a broken one."""
        try:
            upright = as_rgb(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{name} cannot be read") from error
        with self._lock:
            vectors = [gallery.query_vector([Part(picture=upright)]) for gallery in self.galleries]
            banks = [gallery.model.encoder.bank for gallery in self.galleries]
            pairs = zip(banks, vectors, strict=True)
            biases = [bank.bias(torch.from_numpy(own)[None]).item() if bank else 0.0 for bank, own in pairs]
        return Upload(name, vectors, biases, jpeg(upright, THUMBNAIL))

    def _folded(self, number: int, cards: list[Card]) -> list[Card]:
        """Near-duplicates behind the best of them."""
        keys = np.frombuffer(bytes.fromhex("".join(card.key for card in cards)), np.uint8).reshape(-1, 16)
        stored = iter(self.galleries[number].store.rows(keys).array("vectors").astype(np.float32))
        kept, vectors = [], []
        for card in cards:
            vector, card.folded = card.upload.vectors[number] if card.upload else next(stored), 0
            near = np.flatnonzero(np.stack(vectors) @ vector >= NEAR_DUPLICATE) if vectors else []
            if len(near):
                kept[near[0]].folded += 1
            else:
                kept.append(card)
                vectors.append(vector)
        return kept


def uploaded(number: int, upload: Upload, vector: np.ndarray) -> Card:
    return Card("", upload.name, float(upload.vectors[number] @ vector) - upload.biases[number], upload=upload)


def jpeg(picture: Image.Image, longest: int) -> bytes:
    picture = picture.copy()
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
