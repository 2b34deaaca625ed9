"""Text corpora: folders of documents and questions in JSONL, and the built-in ``nq10k``.

A JSONL folder holds, one JSON object a line::

    documents.jsonl        {"document_id": "d17", "text": "...", "title": "..."}     title is optional, and put before the text
    train.jsonl            {"document_id": "d17", "question": "..."}                 or questions.jsonl
    validation.jsonl       the same, held out; also test.jsonl; both optional
    pseudo_queries.jsonl   the same, written by a model, trained on beside the rest; optional

The names that other tools give these columns are known as well (:data:`ID_NAMES`, ...); which were taken is said aloud.
The second form is what DSI-transformers' script writes (``NQ_10k_multi_task_train.json``, ``NQ_10k_valid.json``: lines of
``{"text_id", "text"}``, the text being ``document: ...`` or ``question: ...``). The third is a folder with the parquet
files of Natural Questions, from which NQ10K is made (:mod:`.natural_questions`). The fourth is BEIR's (:mod:`.beir`).
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from imagedex.corpora.documents import beir, natural_questions
from imagedex.corpora.documents.natural_questions import load_nq10k
from imagedex.corpora.documents.text_corpus import TextContents, TextCorpus, build_text_corpus, one_each
from imagedex.corpora.paths import require_folder
from imagedex.corpora.schema import listed
from imagedex.corpora.splits import check_held_out
from imagedex.errors import UserError

__all__ = ["TextCorpus", "is_text_corpus", "load_documents", "load_text_corpus"]

logger = logging.getLogger(__name__)

DOCUMENT_FILE = "documents.jsonl"
TRAIN_FILES = ("train.jsonl", "questions.jsonl")
HELD_OUT_FILES = {"validation": ("validation.jsonl", "valid.jsonl", "dev.jsonl"), "test": ("test.jsonl",)}
PSEUDO_QUERY_FILE = "pseudo_queries.jsonl"
MULTI_TASK_TRAIN, MULTI_TASK_VALID = "*multi_task_train.json", "*valid.json"
PROMPTS = ("document: ", "question: ")

# In this order: a file of questions may have an "id" of its own beside the id of the document.
ID_NAMES = ("document_id", "doc_id", "docid", "text_id", "_id", "id")
TEXT_NAMES = ("text", "document", "contents", "content", "passage", "body")
QUESTION_NAMES = ("question", "query", "pseudo_query", "text")


def is_text_corpus(dataset_name: str | None) -> bool:
    """Whether ``--dataset_name`` names documents and questions: ``nq10k``, Natural Questions, or a folder of a known form."""
    if not dataset_name:
        return False
    if dataset_name in ("nq10k", natural_questions.HUB_ID):
        return True
    folder = Path(dataset_name).expanduser()
    return folder.is_dir() and (
        (folder / DOCUMENT_FILE).is_file()
        or beir.find(folder)
        or _multi_task_file(folder) is not None
        or natural_questions.find(folder) is not None
    )


def load_text_corpus(
    dataset_name: str,
    *,
    pseudo_queries_file: str | os.PathLike | None = None,
    held_out_captions_per_image: int = 0,
    held_out_images: float = 0.0,
    split_seed: int = 0,
    eval_split: str | None = None,
) -> TextCorpus:
    """Loads documents and questions, whatever their form, and says which was recognised.

    Args:
        dataset_name: ``nq10k`` (the same as Natural Questions' id on the Hub), or a folder.
        pseudo_queries_file: JSONL of ``{"document_id", "question"}``, trained on beside the real questions, for documents
            with trained and with held-out questions alike (NQ10K's ids are ``"0"`` to ``"9999"``).
        held_out_captions_per_image: for a corpus without a split of its own, so many questions of each document are asked.
        held_out_images: for such a corpus, the fraction of documents none of whose questions is trained.
        split_seed: with the document's id, decides the membership.
        eval_split: ``"validation"`` (default where there is one) or ``"test"``.

    Raises:
        UserError: anything about the corpus that the user can mend.
    """
    split = {
        "held_out_captions_per_image": held_out_captions_per_image,
        "held_out_images": held_out_images,
        "split_seed": split_seed,
        "eval_split": eval_split,
    }
    folder = Path(os.path.abspath(os.path.expanduser(dataset_name)))
    built_in = dataset_name in ("nq10k", natural_questions.HUB_ID)
    jsonl = (folder / DOCUMENT_FILE).is_file() or beir.find(folder) or (folder.is_dir() and _multi_task_file(folder))
    if not built_in and jsonl:
        return load_documents(folder, pseudo_queries_file=pseudo_queries_file, **split)
    if not built_in and not (folder.is_dir() and natural_questions.find(folder)):
        require_folder(folder, "--dataset_name")
        raise UserError(
            f"--dataset_name {folder} holds no documents and questions: put {DOCUMENT_FILE} and {TRAIN_FILES[0]} in it, "
            "or use nq10k"
        )
    check_held_out(["validation"], held_out_captions_per_image, held_out_images, eval_split, "questions")
    pseudo_queries = read_questions(pseudo_queries_file, "--pseudo_queries_file") if pseudo_queries_file else []
    return load_nq10k(natural_questions.HUB_ID if built_in else folder, pseudo_queries=pseudo_queries)


def load_documents(
    folder: str | os.PathLike, *, pseudo_queries_file: str | os.PathLike | None = None, **split
) -> TextCorpus:
    """A folder of documents and questions in JSONL, or as BEIR or DSI-transformers have them; see the top of this file.

    Args:
        pseudo_queries_file: instead of the ``pseudo_queries.jsonl`` of the folder.
        split: as in :func:`load_text_corpus`.

    Raises:
        UserError: a file or a column is missing, a line is malformed, ids are used twice, texts are empty, or a question
            is of a document that is not there.
    """
    folder = require_folder(folder, "--dataset_name")
    if (folder / DOCUMENT_FILE).is_file():
        contents = _read_jsonl_folder(folder)
    elif beir.find(folder):
        queries = read_questions(folder / beir.QUERIES, "--dataset_name")
        contents = beir.contents(folder, read_documents(folder / beir.CORPUS), queries)
    else:
        contents = _read_multi_task(folder, _multi_task_file(folder))
    file = pseudo_queries_file or folder / PSEUDO_QUERY_FILE
    if pseudo_queries_file or Path(file).is_file():
        contents.pseudo_queries = read_questions(file, "--pseudo_queries_file")
    return build_text_corpus(contents, **split)


def _read_jsonl_folder(folder: Path) -> TextContents:
    files = {"train": _only(folder, TRAIN_FILES)}
    files |= {split: _only(folder, names) for split, names in HELD_OUT_FILES.items()}
    if files["train"] is None:
        pseudo = (folder / PSEUDO_QUERY_FILE).is_file()
        if not pseudo and not any(files.values()):
            raise UserError(f"{folder} has documents but no questions: put {' or '.join(TRAIN_FILES)} beside them")
        logger.warning("%s has no %s: no question that was asked is trained", folder, " or ".join(TRAIN_FILES))
    questions = {split: one_each(read_questions(file, "--dataset_name")) for split, file in files.items() if file}
    return TextContents(
        "JSONL documents and questions", read_documents(folder / DOCUMENT_FILE), {"train": [], **questions}
    )


def _only(folder: Path, names: Sequence[str]) -> Path | None:
    there = [folder / name for name in names if (folder / name).is_file()]
    if len(there) > 1:
        raise UserError(f"{folder} holds {listed([file.name for file in there])}, which mean the same; keep one")
    return there[0] if there else None


def read_documents(file: Path) -> list[tuple[str, str]]:
    """(document_id, text) of each line. A ``title`` comes first in the text, unless the text starts with it anyway."""
    rows, identifier, text = _read_columns(file, "--dataset_name", TEXT_NAMES, "text")
    documents = []
    for number, row in rows:
        title, body = _text_of(row, "title", file, number).strip(), _text_of(row, text, file, number)
        documents.append((_id_of(row, identifier, file, number), body if body.startswith(title) else f"{title} {body}"))
    return documents


def read_questions(file: str | os.PathLike, flag: str) -> list[tuple[str, str]]:
    """(document_id, question) of each line of a JSONL file; ``flag`` names it in messages."""
    rows, identifier, question = _read_columns(Path(file).expanduser(), flag, QUESTION_NAMES, "question")
    return [
        (_id_of(row, identifier, file, number), _text_of(row, question, file, number).removeprefix(PROMPTS[1]))
        for number, row in rows
    ]


def _multi_task_file(folder: Path) -> Path | None:
    """The training file of DSI-transformers, when the folder has just one beside one validation file."""
    train, valid = list(folder.glob(MULTI_TASK_TRAIN)), list(folder.glob(MULTI_TASK_VALID))
    return train[0] if len(train) == len(valid) == 1 else None


def _read_multi_task(folder: Path, train_file: Path) -> TextContents:
    documents, questions = [], {"train": [], "validation": []}
    for split, file in (("train", train_file), ("validation", next(folder.glob(MULTI_TASK_VALID)))):
        rows, identifier, text = _read_columns(file, "--dataset_name", ("text",), "text")
        for number, row in rows:
            document, value = _id_of(row, identifier, file, number), _text_of(row, text, file, number)
            if value.startswith(PROMPTS[0]) and split == "train":
                documents.append((document, value.removeprefix(PROMPTS[0])))
            elif value.startswith(PROMPTS[1]):
                questions[split].append(((document,), value.removeprefix(PROMPTS[1])))
            else:
                allowed = " or ".join(repr(prompt) for prompt in PROMPTS[split == "validation" :])
                raise UserError(f"{file}, line {number}: the text starts with {value[:20]!r} instead of {allowed}")
    return TextContents(f"DSI-transformers {train_file.name}", documents, questions, texts_may_be_empty=True)


def _read_columns(
    file: Path, flag: str, text_names: Sequence[str], what: str
) -> tuple[list[tuple[int, dict]], str, str]:
    """The rows of a file with their line numbers, and the columns of ids and texts, as its first row names them."""
    rows = _read_lines(file, flag)
    names = list(rows[0][1])
    identifier = next((name for name in ID_NAMES if name in names), None)
    text = next((name for name in text_names if name in names), None)
    for column, known, meaning in ((identifier, ID_NAMES, "document id"), (text, text_names, what)):
        if column is None:
            raise UserError(
                f"{file} has no column with the {meaning}; its columns are {listed(names)}; known are {', '.join(known)}"
            )
    logger.info("%s: ids from column %s, %ss from %s", file, identifier, what, text)
    return rows, identifier, text


def _read_lines(file: Path, flag: str) -> list[tuple[int, dict]]:
    if not file.is_file():
        raise UserError(f"{flag}: there is no file {file}")
    rows = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(
                tqdm(lines, desc=f"Reading {file.name}", unit=" lines", delay=2, disable=None), start=1
            ):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: a JSON object is expected, got {line.strip()[:40]}")
                rows.append((number, row))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {number}: no valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise UserError(f"{file} holds no row")
    return rows


def _id_of(row: dict, column: str, file: str | os.PathLike, number: int) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{file}, line {number}: {column} is {value!r}; a document id is text or a whole number")
    return str(value)


def _text_of(row: dict, column: str, file: str | os.PathLike, number: int) -> str:
    """The text of a column, "" where the row has none (what is empty is reported together, by document)."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{file}, line {number}: {column} is no text but {value!r:.60}")
    return value or ""
