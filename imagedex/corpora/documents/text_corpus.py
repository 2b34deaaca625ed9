"""The schema of text corpora, documents and the questions they answer, and what is trained and what is asked.

The forms (:mod:`.documents`, :mod:`.natural_questions`) only read what is written down; the checks that hold for all of
them, the split and the tables are here. A document stands where a picture stands in :mod:`.schema`, a question where a
caption stands: every document is indexed, whether or not a question of it is trained.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, Features, List, Value

from imagedex.corpora.cached import cached_rows
from imagedex.corpora.schema import counted, listed
from imagedex.corpora.splits import check_held_out, hash_fraction, held_out_positions
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

DOCUMENTS = Features({"document_id": Value("string"), "text": Value("string")})
QUESTIONS = Features({"document_id": Value("string"), "question": Value("string")})
ASKED = Features({**QUESTIONS, "also_right": List(Value("string"))})

Asked = tuple[tuple[str, ...], str]  # the documents that answer, and the question


@dataclass
class TextContents:
    """What a form has read: rows of (document_id, text); by split, rows of (document_ids that answer, question); and rows of
    (document_id, pseudo-query)."""

    form: str
    documents: list[tuple[str, str]]
    questions: dict[str, list[Asked]]
    pseudo_queries: list[tuple[str, str]] = field(default_factory=list)
    texts_may_be_empty: bool = False  # a form that another program defines keeps its documents, whatever they hold


@dataclass
class TextCorpus:
    """Documents and questions. No text carries a prompt: those are added where training data is made.

    Attributes:
        form: what was recognised, e.g. ``"JSONL documents and questions"``.
        documents: ``document_id`` and ``text``, one row a document, ids unique, all of them to be indexed.
        train: ``document_id`` and ``question``, of a question with several right documents a row for each; the pseudo-queries
            come last.
        evaluation: the questions that are held out, a row each; where some have several right documents, the others' ids are
            in ``also_right``. None when nothing is held out.
        num_pseudo_queries: how many of the last rows of ``train`` nobody asked but a model wrote.
    """

    form: str
    documents: Dataset
    train: Dataset
    evaluation: Dataset | None
    num_pseudo_queries: int = 0


def build_text_corpus(
    contents: TextContents,
    *,
    held_out_captions_per_image: int = 0,
    held_out_images: float = 0.0,
    split_seed: int = 0,
    eval_split: str | None = None,
) -> TextCorpus:
    """Checks what a form has read, splits the questions, and makes the tables (written once to the datasets cache).

    Args: as in :func:`imagedex.corpora.splits.split_corpus`, with a document for a picture and a question for a caption;
    membership is a hash of ``document_id`` and ``split_seed``.

    Raises:
        UserError: ids used twice, empty texts or questions, questions of documents that are not there, or a split
            that contradicts the corpus or holds out nothing.
    """
    _check_rows(contents)
    train, evaluation = split_questions(
        contents.questions, held_out_captions_per_image, held_out_images, split_seed, eval_split
    )
    pairs = pairs_of(train)
    _report_repetition(contents, pairs, evaluation)
    corpus = TextCorpus(
        contents.form,
        make_table(contents.documents, DOCUMENTS),
        make_table([*pairs, *contents.pseudo_queries], QUESTIONS),
        asked_table(evaluation) if evaluation else None,
        len(contents.pseudo_queries),
    )
    report(corpus)
    return corpus


def one_each(rows: Iterable[tuple[str, str]]) -> list[Asked]:
    """Of (document_id, question): questions that one document answers."""
    return [((document,), question) for document, question in rows]


def pairs_of(questions: Sequence[Asked]) -> list[tuple[str, str]]:
    """(document_id, question) of each document that answers."""
    return [(document, question) for documents, question in questions for document in documents]


def split_questions(
    questions: dict[str, list[Asked]],
    n_held_out: int,
    fraction: float,
    split_seed: int,
    eval_split: str | None,
) -> tuple[list[Asked], list[Asked]]:
    """(trained, asked). The corpus's own split where it has one; else by hash, as pictures and captions are split. A question
    that is held out for one of its documents is trained for none."""
    own = [split for split in questions if split != "train"]
    check_held_out(own, n_held_out, fraction, eval_split, "questions")
    rows = questions["train"]
    if own:
        chosen = eval_split or ("validation" if "validation" in own else own[0])
        logger.info("Evaluating on the corpus's own %s questions", chosen)
        return rows, questions[chosen]
    by_document: dict[str, list[int]] = {}
    for row, (documents, _) in enumerate(rows):
        for document in documents:
            by_document.setdefault(document, []).append(row)
    if n_held_out:
        held = {
            places[position]
            for document, places in by_document.items()
            for position in held_out_positions(document, len(places), n_held_out, split_seed)
        }
        if not held:
            raise UserError(
                f"--held_out_captions_per_image {n_held_out}: no document has two questions or more, so nothing could "
                "be held out; use --held_out_images"
            )
    elif fraction:
        out = {document for document in by_document if hash_fraction(split_seed, document) < fraction}
        if not out or len(out) == len(by_document):
            raise UserError(
                f"--held_out_images {fraction} holds out the questions of {len(out)} of "
                f"{counted(len(by_document), 'document')}; choose another fraction or --split_seed"
            )
        held = {row for document in out for row in by_document[document]}
    else:
        held = set()
    return (
        [question for row, question in enumerate(rows) if row not in held],
        [question for row, question in enumerate(rows) if row in held],
    )


def asked_table(questions: Sequence[Asked]) -> Dataset:
    if all(len(documents) == 1 for documents, _ in questions):
        return make_table(pairs_of(questions), QUESTIONS)
    return make_table([(first, question, also) for (first, *also), question in questions], ASKED)


def make_table(rows: Sequence[tuple], features: Features) -> Dataset:
    """Rows as a dataset on disk, under a fingerprint of their content, so that every later ``map`` of it is cached."""
    if not rows:  # a generator without a row has no table to write
        return Dataset.from_dict({name: [] for name in features}, features=features)
    digest = hashlib.blake2b(repr(features).encode(), digest_size=16)
    for row in rows:
        digest.update(repr(row).encode())
    return cached_rows(_yield_rows, features, {"rows": rows, "names": tuple(features)}, f"text-{digest.hexdigest()}")


def _yield_rows(rows: Sequence[tuple], names: tuple[str, ...]) -> Iterator[dict]:
    for row in rows:
        yield dict(zip(names, row, strict=True))


def report(corpus: TextCorpus) -> None:
    """Says what was recognised, and how much of it is indexed, trained and asked."""
    logger.info(
        "Corpus recognised as %s: %s indexed; %s trained, %d pseudo-queries; %s held out",
        corpus.form,
        counted(len(corpus.documents), "document"),
        counted(len(corpus.train) - corpus.num_pseudo_queries, "question"),
        corpus.num_pseudo_queries,
        counted(len(corpus.evaluation) if corpus.evaluation is not None else 0, "question"),
    )


def check_known(questions: Sequence[tuple[str, str]], known: set[str], what: str) -> None:
    """Raises UserError for questions without text and for questions of documents that are not in ``known``."""
    empty = [document for document, question in questions if not question.strip()]
    if empty:
        raise UserError(f"{what}: {counted(len(empty), 'question')} without text, of document {listed(empty, 5)}")
    unknown = list(dict.fromkeys(document for document, _ in questions if document not in known))
    if unknown:
        raise UserError(
            f"{what}: questions of {counted(len(unknown), 'document')} that the corpus does not have: "
            f"{listed(unknown, 5)}; add them to the documents or leave the questions out"
        )


def _check_rows(contents: TextContents) -> None:
    if not contents.documents:
        raise UserError(f"{contents.form}: there is no document")
    counts = Counter(document for document, _ in contents.documents)
    twice = [document for document, number in counts.items() if number > 1]
    if twice:
        raise UserError(
            f"{contents.form}: {counted(len(twice), 'document id')} used more than once: {listed(twice, 5)}"
        )
    empty = [document for document, text in contents.documents if not text.strip()]
    if empty:
        message = f"{contents.form}: {counted(len(empty), 'document')} without text: {listed(empty, 5)}"
        if not contents.texts_may_be_empty:
            raise UserError(message)
        logger.warning("%s", message)
    questions = {split: pairs_of(rows) for split, rows in contents.questions.items()}
    for split, rows in (questions | {"pseudo-queries": contents.pseudo_queries}).items():
        check_known(rows, set(counts), f"{contents.form}, {split}")


def _report_repetition(contents: TextContents, train: Sequence[tuple[str, str]], evaluation: Sequence[Asked]) -> None:
    """What makes figures worse or better than they should be: equal documents, and held-out questions trained on."""
    same = len(contents.documents) - len({text for _, text in contents.documents})
    if same:
        logger.warning("%s with the text of another one: no question can tell them apart", counted(same, "document"))
    for rows, what in ((train, "question"), (contents.pseudo_queries, "pseudo-query")):
        trained = {(document, question.strip().lower()) for document, question in rows}
        repeated = sum(
            any((document, question.strip().lower()) in trained for document in documents)
            for documents, question in evaluation
        )
        if repeated:
            logger.warning(
                "%s also trained, word for word, as a %s of the same document",
                counted(repeated, "held-out question"),
                what,
            )
