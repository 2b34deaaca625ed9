"""Questions of visitors to one gallery, many at once: a model's pass and a look at the vectors serve all that wait."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from imagedex.encoding.vectors import encode_texts
from imagedex.errors import UserError
from imagedex.gallery.gallery import Found, Gallery
from imagedex.gallery.query import Part

NEAR_DUPLICATE = 0.98  # cosine between two pictures
WITHOUT = 0.5  # weight of what the pictures are to be without: a whole one drives to the farthest, not to the rest
LONGEST_QUERY = 2000  # characters
MOST_FOUND = 200
SPARE = 12  # pictures beyond a page that stand in for near-duplicates
MOST_FOLDED = 4096  # pictures that are looked at for a page of unlike ones
NOTHING_ASKED = "Type a sentence, drop a picture, or both."


@dataclass
class Seen:
    """A picture of one visitor, kept as long as the page is open and never written."""

    name: str
    vectors: list  # one a gallery, (D,) float32; None where its model writes identifiers
    biases: list[float]  # against hubs
    thumbnail: bytes


@dataclass
class Question:
    """What is asked. texts: sentences that are added; like: keys (hex) of pictures of the gallery that count, too; picture: one
    that was dropped on the page; keep: the share of right pictures that the cut-off keeps, None: no cut-off."""

    texts: Sequence[str] = ()
    without: str = ""
    like: Sequence[str] = ()
    picture: Seen | None = None
    where: str = ""
    top_k: int = 20
    fold: bool = True
    keep: float | None = None

    @property
    def sentences(self) -> list[str]:
        return [text[:LONGEST_QUERY] for text in self.texts if text.strip()]


@dataclass
class Card:
    """A picture that was found. key: of its content; "" of an upload. folded: how many near-duplicates stand behind it.
    probable: whether it passes the cut-off."""

    key: str
    title: str
    score: float
    folded: int = 0
    upload: Seen | None = None
    probable: bool = True


@dataclass
class Answer:
    """paths: of a model that writes identifiers, for each of the first cards the steps in which its identifier was written."""

    cards: list[Card]
    milliseconds: float
    paths: list = field(default_factory=list)


def writes(gallery: Gallery) -> bool:
    """Whether its model writes identifiers, and can say how; others compare vectors."""
    return hasattr(gallery.model, "paths")


def knows_when_nothing_matches(gallery: Gallery) -> bool:
    """Whether its model has a calibrated cut-off."""
    bank = None if writes(gallery) else gallery.model.encoder.bank
    return bank is not None and bank.right_confidences is not None


def answers(gallery: Gallery, number: int, asked: Sequence[tuple[Question, Sequence[Seen]]], path_of: Callable) -> list:
    """An `Answer` for each question, or the `UserError` that says what is wrong with it.

    Args: number of the gallery, asked: (question, the visitor's own pictures); path_of(number, key) of a picture.
    """
    started = time.perf_counter()
    done = _written(gallery, number, asked, path_of) if writes(gallery) else _compared(gallery, number, asked, path_of)
    for answer in done:
        if isinstance(answer, Answer):
            answer.milliseconds = 1000 * (time.perf_counter() - started)
    return done


# models that compare vectors


def _compared(gallery: Gallery, number: int, asked: Sequence[tuple], path_of: Callable) -> list:
    done: list = [None] * len(asked)
    known = _sentence_vectors(gallery, [question for question, _ in asked])
    vectors: dict[int, np.ndarray] = {}
    filters: dict[str, list[int]] = {}
    for place, (question, _) in enumerate(asked):
        try:
            vectors[place] = gallery.query_vector(_parts(gallery, number, question, known, path_of))
            filters.setdefault(question.where.strip(), []).append(place)
        except UserError as error:
            done[place] = error
    for where, places in filters.items():
        block, most = np.stack([vectors[place] for place in places]), max(_first_look(asked[one][0]) for one in places)
        try:
            found = gallery.search_vectors(block, most, where or None)
        except UserError as error:
            found = [error] * len(places)
        for place, own in zip(places, found, strict=True):
            done[place] = _chosen(gallery, number, *asked[place], vectors[place], own)
    return done


def _sentence_vectors(gallery: Gallery, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """Those of all questions, in one pass."""
    own = [text for one in questions for text in (*one.sentences, one.without[:LONGEST_QUERY]) if text.strip()]
    texts, encoder = list(dict.fromkeys(own)), gallery.model.encoder
    vectors = encode_texts(encoder.model, encoder.tokenizer, texts, text_kwargs=encoder.text_kwargs)
    return dict(zip(texts, vectors, strict=True))


def _parts(gallery: Gallery, number: int, question: Question, known: dict, path_of: Callable) -> list[Part]:
    parts = [Part(text=text, vector=known[text]) for text in question.sentences]
    for key, _ in _liked(number, question, path_of):
        vector = _stored(gallery, [key])[0]
        parts.append(Part(vector=torch.from_numpy(vector)))
    if question.picture is not None:
        parts.append(Part(vector=torch.from_numpy(question.picture.vectors[number])))
    if not parts:
        raise UserError(NOTHING_ASKED)
    if question.without.strip():
        without = question.without[:LONGEST_QUERY]
        parts.append(Part(text=without, vector=known[without], weight=-WITHOUT))
    return parts


def _liked(number: int, question: Question, path_of: Callable) -> list[tuple[str, str]]:
    """(key, path) of the gallery's pictures that are asked with. Raises `UserError`."""
    liked = [(key, path_of(number, key)) for key in question.like]
    if None in (path for _, path in liked):
        raise UserError("this picture is not in the gallery any more")
    return liked


def _first_look(question: Question) -> int:
    """So many that near-duplicates seldom ask for a second one."""
    top_k = min(question.top_k, MOST_FOUND)
    return top_k + SPARE if question.fold else top_k


def _chosen(
    gallery: Gallery, number: int, question: Question, uploads, vector: np.ndarray, found
) -> Answer | UserError:
    """Args: found, the best of the gallery, or what was wrong with asking for them."""
    if isinstance(found, UserError):
        return found
    try:
        least = gallery.least_scores(vector[None], question.keep)[0]
        cards = _unlike(gallery, number, question, uploads, vector, found[: _first_look(question)])
    except UserError as error:
        return error
    for card in cards:
        card.probable = card.score >= least
    return Answer(cards, 0.0)


def _unlike(gallery: Gallery, number: int, question: Question, uploads, vector, found: list[Found]) -> list[Card]:
    """The cards to show. The gallery is asked once more where near-duplicates of a few were found."""
    top_k, asked = min(question.top_k, MOST_FOUND), _first_look(question)
    own = [_of_upload(number, upload, vector) for upload in uploads]
    while True:
        cards = [Card(one.row["key"].hex(), one.image_id, one.score) for one in found]
        cards = sorted([*cards, *own], key=lambda card: -card.score)
        cards = _folded(gallery, number, cards, top_k) if question.fold else cards
        if len(cards) >= top_k or len(found) < asked or asked >= MOST_FOLDED:
            return cards[:top_k]
        asked *= 4
        found = gallery.search_vectors(vector[None], asked, question.where.strip() or None)[0]


def _of_upload(number: int, upload: Seen, vector: np.ndarray) -> Card:
    return Card("", upload.name, float(upload.vectors[number] @ vector) - upload.biases[number], upload=upload)


def _stored(gallery: Gallery, keys: Sequence[str]) -> np.ndarray:
    """(N, D) float32. Args: keys in hexadecimal digits."""
    places = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 16)
    try:
        return gallery.store.rows(places).array("vectors").astype(np.float32)
    except (KeyError, FileNotFoundError):
        raise UserError("the gallery has just been changed; ask again") from None


def _folded(gallery: Gallery, number: int, cards: list[Card], most: int) -> list[Card]:
    """Near-duplicates behind the best of them; no more is looked at when `most` unlike ones are found."""
    stored = iter(_stored(gallery, [card.key for card in cards if card.key]))
    vectors = (
        np.stack([card.upload.vectors[number] if card.upload else next(stored) for card in cards]) if cards else []
    )
    kept: list[int] = []
    for place, card in enumerate(cards):
        card.folded = 0
        near = np.flatnonzero(vectors[kept] @ vectors[place] >= NEAR_DUPLICATE) if kept else []
        if len(near):
            cards[kept[near[0]]].folded += 1
        elif len(kept) < most:
            kept.append(place)
    return [cards[place] for place in kept]


# models that write identifiers

DRAWN = 8  # identifiers whose way through the trie is shown


def _written(gallery: Gallery, number: int, asked: Sequence[tuple], path_of: Callable) -> list:
    """One by one: such a model searches with beams."""
    done: list = []
    for question, _ in asked:
        try:
            done.append(_written_one(gallery, number, question, path_of))
        except UserError as error:
            done.append(error)
    return done


def _written_one(gallery: Gallery, number: int, question: Question, path_of: Callable) -> Answer:
    parts = [Part(text=text) for text in question.sentences]
    parts += [Part(path=path) for _, path in _liked(number, question, path_of)]
    if question.picture is not None:
        parts.append(Part(picture=Image.open(io.BytesIO(question.picture.thumbnail))))
    if not parts:
        raise UserError(NOTHING_ASKED)
    if question.without.strip():
        parts.append(Part(text=question.without, weight=-WITHOUT))
    found = gallery.search(*parts, top_k=min(question.top_k, MOST_FOUND), where=question.where.strip() or None)
    cards = [Card(one.row["key"].hex(), one.image_id, one.score) for one in found]
    paths = []
    if len(parts) == 1 and parts[0].text and cards:
        paths = gallery.model.paths(parts[0].text, [card.title for card in cards[:DRAWN]])
    return Answer(cards, 0.0, paths)
