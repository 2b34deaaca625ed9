"""BEIR's folders (arXiv 2104.08663): ``corpus.jsonl``, ``queries.jsonl``, and which answers which in ``qrels/<split>.tsv``.

Rows of ``qrels`` are ``query-id``, ``corpus-id`` and ``score``, below a header; a score above 0 means that the document
answers. A question with several such documents is one row with each of them.
"""

import logging
from pathlib import Path

from imagedex.corpora.documents.text_corpus import Asked, TextContents
from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.forms.delimited import read_delimited
from imagedex.corpora.schema import counted, listed
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
_COLUMNS = ("query-id", "corpus-id", "score")


def find(folder: Path) -> bool:
    return (folder / CORPUS).is_file() and (folder / QUERIES).is_file()


def contents(folder: Path, documents: list[tuple[str, str]], queries: list[tuple[str, str]]) -> TextContents:
    """Joins (document id, text) and (query id, text) by the judgements.

    Raises:
        UserError: no judgements, of another form, or of queries that are not there.
    """
    text = dict(queries)
    questions: dict[str, list[Asked]] = {"train": []}
    judged: set[str] = set()
    for split, file in _files(folder).items():
        right: dict[str, list[str]] = {}
        for query, document in _read_pairs(file):
            right.setdefault(query, []).append(document)
        unknown = [query for query in right if query not in text]
        if unknown:
            raise UserError(f"{file}: {counted(len(unknown), 'query id')} not in {QUERIES}: {listed(unknown, 5)}")
        several = sum(len(own) > 1 for own in right.values())
        if several:
            what = counted(several, "question")
            logger.info(
                "%s: %s with several right documents: trained for each, asked once, the best counts", file, what
            )
        questions[split] = [(tuple(own), text[query]) for query, own in right.items()]
        judged |= right.keys()
    rest = [query for query, _ in queries if query not in judged]
    if rest:
        what = counted(len(rest), "question")
        logger.warning("%s: %s without a right document, not used: %s", folder, what, listed(rest, 5))
    if not questions["train"]:
        logger.warning("%s has no %s/train.tsv: no question that was asked is trained", folder, QRELS)
    return TextContents("BEIR folder", documents, questions, texts_may_be_empty=True)


def _files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted((folder / QRELS).glob("*.tsv")):
        split = SPLIT_NAMES.get(file.stem.lower())
        if split is None or split in files:
            logger.warning("%s: not used, its name is no split's or a second one's", file)
        else:
            files[split] = file
    if not files:
        raise UserError(f"{folder} has no {QRELS}/train.tsv, dev.tsv or test.tsv, which say what answers what")
    return files


def _read_pairs(file: Path) -> list[tuple[str, str]]:
    """(query id, document id) of each row with a score above 0."""
    columns = read_delimited(file).columns
    if not set(_COLUMNS) <= columns.keys():
        raise UserError(f"{file} has the columns {listed(list(columns), 6)}; {', '.join(_COLUMNS)} are expected")
    pairs, wrong = [], 0
    for row, (query, document, score) in enumerate(zip(*(columns[name] for name in _COLUMNS), strict=True), start=1):
        try:
            right = float(score) > 0
        except ValueError as error:
            raise UserError(f"{file}, row {row}: the score {score[:40]!r} is no number") from error
        wrong += not right
        if right:
            pairs.append((query, document))
    if wrong:
        logger.info("%s: %s of score 0 left out", file, counted(wrong, "row"))
    return list(dict.fromkeys(pairs))
