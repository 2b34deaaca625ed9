"""NQ10K: 10,000 documents and 10,000 questions out of Natural Questions, made as DSI-transformers makes it.

The same steps as https://github.com/ArvinZhuang/DSI-transformers (``data/NQ/create_NQ_train_vali.py``), which follows
DSI (arXiv 2202.06991):

1. all rows of the train split are put in the order that ``random.seed(313); random.shuffle`` gives to their numbers;
2. in that order, a row whose document has a title that was not seen yet is kept, until there are 10,000; the documents
   are numbered as they come, "0" to "9999";
3. the text is the tokens of the page that are not HTML, joined by blanks; all 10,000 documents are indexed;
4. the questions of the first 8,000 are trained, those of the other 2,000 are held out. A document has the one question
   of the row that was kept.

"document: ", "question: " and the cut to 32 tokens are added where training data is made. What differs:

- Of each text the first 512 words are kept (the original keeps all and reads 32 tokens): the tokenizer cuts inside words
  and never joins two, so up to 512 tokens the input is the same, and the result takes tens of MB, not hundreds.
- The original shuffled the rows of the copy that ``datasets`` 1.18 loaded, written by Apache Beam. The parquet files now on
  the Hub hold the same 307,373 rows; nothing promises the same order, so the same seed may pick other pages. Who has the
  files that the original wrote gives their folder as ``--dataset_name`` (:mod:`.documents`) and has exactly its documents.

The parquet files are 40 GB. No file is stored: footers and those leaves of the nested columns that are needed are read
over the network, titles and questions first (little), then the tokens of those row groups in which a document was chosen
(nearly all: perhaps 10 GB pass through memory, a row group at a time). ``datasets`` finds the files; pyarrow reads the
leaves, because ``datasets`` 5.2 streams a nested column only whole, and ``document`` holds the page's HTML. Each file's
share is kept as soon as it is read, so an interrupted build goes on where it stopped.
"""

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import datasets
import fsspec
import pyarrow
from datasets import Dataset
from huggingface_hub.utils import WeakFileLock
from pyarrow import parquet
from tqdm.auto import tqdm

from imagedex.corpora.documents.text_corpus import TextContents, TextCorpus, build_text_corpus, one_each
from imagedex.corpora.forms.tables import first_line
from imagedex.corpora.schema import counted
from imagedex.errors import UserError
from imagedex.files import A_DAY, clear_leftovers, whole_folder, write_atomically
from imagedex.hub import hub_reason

logger = logging.getLogger(__name__)

HUB_ID = "google-research-datasets/natural_questions"
CONFIG = "default"
SEED = 313
NUM_TRAIN = 8_000
NUM_HELD_OUT = 2_000
MAX_WORDS = 512
VERSION = 1  # of the stored result; to be raised when what is stored changes

TITLE, QUESTION = "document.title", "question.text"
TOKEN, IS_HTML = "document.tokens.token", "document.tokens.is_html"
_PAGES_AT_ONCE = 16  # a page has some 10,000 tokens


def find(folder: Path) -> Path | None:
    """``folder``, when there are parquet files in the schema of Natural Questions in it or in a folder of it."""
    file = next(itertools.chain(folder.glob("*.parquet"), folder.glob("*/*.parquet")), None)
    try:
        return folder if file and not _missing(parquet.read_schema(file)) else None
    except (pyarrow.ArrowInvalid, OSError):
        return None


def load_nq10k(
    source: str | os.PathLike = HUB_ID,
    *,
    pseudo_queries: Sequence[tuple[str, str]] = (),
    num_train: int = NUM_TRAIN,
    num_held_out: int = NUM_HELD_OUT,
    seed: int = SEED,
    max_words: int = MAX_WORDS,
) -> TextCorpus:
    """NQ10K, built at the first call and read from the datasets cache from then on.

    Args:
        source: a dataset on the Hub with the schema of Natural Questions, or a folder with its parquet files.
        pseudo_queries: (document_id, question), trained on beside the real questions.
        num_train, num_held_out: how many documents have their question trained, how many held out. Where there are fewer
            titles, all documents are indexed and fewer questions held out, as in the original, and a warning is given.
        seed: of the shuffle.
        max_words: how many words of each document are kept.

    Raises:
        UserError: the dataset cannot be reached or read, or has another schema.
    """
    options = {"num_train": num_train, "num_held_out": num_held_out, "seed": seed, "max_words": max_words}
    folder = _cache_folder(source, options)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(str(source), folder, **options)
    except OSError as error:
        raise UserError(f"NQ10K cannot be kept in {folder.parent}: {error.strerror or error}") from error
    table = Dataset.load_from_disk(str(folder))
    logger.info("NQ10K: %s, kept in %s (delete it to build it anew)", counted(len(table), "document"), folder)
    identifiers = table["document_id"][:]
    questions = one_each(zip(identifiers, table["question"][:], strict=True))
    if len(table) < num_train + num_held_out:
        logger.warning(
            "%s has only %s of different titles, not %d; %d of their questions are held out",
            source,
            counted(len(table), "document"),
            num_train + num_held_out,
            max(0, len(table) - num_train),
        )
    splits = {"train": questions[:num_train], "validation": questions[num_train:]}
    name = "NQ10K" if len(table) == NUM_TRAIN + NUM_HELD_OUT else f"NQ10K of {counted(len(table), 'document')}"
    return build_text_corpus(
        TextContents(
            f"{name} (seed {seed})",
            list(zip(identifiers, table["text"][:], strict=True)),
            {split: rows for split, rows in splits.items() if rows},
            list(pseudo_queries),
            texts_may_be_empty=True,
        )
    )


def choose_rows(titles: Sequence[Hashable], number: int, seed: int = SEED) -> list[int]:
    """The first ``number`` rows, in the order shuffled by ``seed``, that are the first with their title."""
    order = list(range(len(titles)))
    random.Random(seed).shuffle(order)  # the same order as random.seed(seed); random.shuffle(order)
    seen, chosen = set(), []
    for row in order:
        if len(chosen) == number:
            break
        if titles[row] not in seen:
            seen.add(titles[row])
            chosen.append(row)
    return chosen


def _build(source: str, folder: Path, num_train: int, num_held_out: int, seed: int, max_words: int) -> None:
    """Reads what is needed of ``source``, and stores the table of documents as ``folder``, whole or not at all."""
    files = _parquet_files(source)
    digest = hashlib.blake2b("\n".join(files).encode(), digest_size=8).hexdigest()
    partial = folder.with_name(f"{folder.name}-partial-{digest}")
    partial.mkdir(exist_ok=True)
    clear_leftovers(folder.parent, within=True, older_than=A_DAY)
    pages: list[list[str | None]] = []  # [title, question] of every row
    starts = [0]
    for number, file in enumerate(_progress(files, "NQ10K: titles and questions")):
        pages += _kept(partial / f"{number:05d}-titles.json", file, _read_pages, files, number)
        starts.append(len(pages))
    chosen = choose_rows([title for title, _ in pages], num_train + num_held_out, seed)
    texts: dict[int, str] = {}
    for number, file in enumerate(_progress(files, "NQ10K: documents")):
        rows = sorted(row - starts[number] for row in chosen if starts[number] <= row < starts[number + 1])
        read = _kept(partial / f"{number:05d}-texts.json", file, _read_texts, files, number, rows, max_words)
        texts |= {starts[number] + row: text for row, text in zip(rows, read, strict=True)}
    table = Dataset.from_dict(
        {
            "document_id": [str(number) for number in range(len(chosen))],
            "title": [pages[row][0] for row in chosen],
            "text": [texts[row] for row in chosen],
            "question": [pages[row][1] for row in chosen],
            "row": chosen,
        }
    )
    with whole_folder(folder) as temporary:
        table.save_to_disk(temporary)
    shutil.rmtree(partial)


def _cache_folder(source: str | os.PathLike, options: dict[str, int]) -> Path:
    """Where the result is kept. A folder's files count by name, size and time; what was built from the Hub stays."""
    facts: dict[str, object] = {"version": VERSION, "source": str(source), **options}
    if Path(source).is_dir():
        files = sorted(Path(source).rglob("*.parquet"))
        facts["files"] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "imagedex_nq10k" / f"v{VERSION}-seed{options['seed']}-{digest}"


def _parquet_files(source: str) -> list[str]:
    """The train split's parquet files in their order; on the Hub with the revision in their names."""
    try:
        builder = datasets.load_dataset_builder(source, CONFIG)
        files = [str(file) for file in (builder.config.data_files or {}).get("train", [])]
    except Exception as error:  # noqa: BLE001  builders, the Hub client and file systems each raise their own
        reason = hub_reason(error, "dataset") or first_line(error)
        raise UserError(
            f"NQ10K cannot be built, {source} cannot be read: {reason}; a folder with its parquet files, given as "
            "--dataset_name, serves as well"
        ) from error
    if not files or not all(file.endswith(".parquet") for file in files):
        raise UserError(f"NQ10K cannot be built: {source} has no train split in parquet files")
    return files


def _progress(files: list[str], what: str) -> tqdm:
    return tqdm(files, desc=what, unit="file", disable=None)  # a bar is noise in a file


def _kept(place: Path, file: str, read, files: list[str], number: int, *arguments) -> list:
    """What ``read`` gives for ``file``, from ``place`` when an earlier run came so far."""
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    try:
        with _open(file) as opened:
            found = read(opened, *arguments)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  the Hub client, its HTTP library, fsspec and pyarrow each raise their own
        raise UserError(
            f"NQ10K stopped at file {number + 1} of {len(files)}, {file}: {first_line(error)}; what was read so far is "
            "kept, the same command goes on from there"
        ) from error
    write_atomically(place, json.dumps(found, ensure_ascii=False))
    return found


def _open(file: str):
    """A parquet file, local or on the Hub; without the 5 MB that fsspec would read ahead of each of pyarrow's ranges."""
    files, path = fsspec.url_to_fs(file)
    return files.open(path, "rb", cache_type="none")


def _missing(schema: pyarrow.Schema) -> list[str]:
    """Which of the leaves that are needed a file does not have."""

    def has(kind: pyarrow.DataType, path: Sequence[str]) -> bool:
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return has(kind.value_type, path)
        if not path:
            return not pyarrow.types.is_struct(kind)
        return (
            pyarrow.types.is_struct(kind)
            and kind.get_field_index(path[0]) >= 0
            and has(kind.field(path[0]).type, path[1:])
        )

    root = pyarrow.struct(list(schema))
    return [leaf for leaf in (TITLE, QUESTION, TOKEN, IS_HTML) if not has(root, leaf.split("."))]


def _parquet(opened) -> parquet.ParquetFile:
    file = parquet.ParquetFile(opened, pre_buffer=True)
    missing = _missing(file.schema_arrow)
    if missing:
        raise UserError(
            f"NQ10K needs the schema of Natural Questions; {getattr(opened, 'path', None) or opened.name} has no "
            f"{', '.join(missing)} (its columns are {', '.join(file.schema_arrow.names)})"
        )
    return file


def _read_pages(opened) -> list[list[str | None]]:
    """[title, question] of each row."""
    rows = _parquet(opened).read(columns=[TITLE, QUESTION], use_threads=False).to_pylist()
    return [[row["document"]["title"], row["question"]["text"]] for row in rows]


def _read_texts(opened, rows: Sequence[int], max_words: int) -> list[str]:
    """The first ``max_words`` tokens that are not HTML, joined, of these rows (ascending) of a file."""
    if not rows:
        return []
    file, wanted, texts, start = _parquet(opened), set(rows), [], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if not wanted.isdisjoint(range(start, stop)):
            for row, page in enumerate(_tokens_of(file, group), start):
                if row in wanted:
                    texts.append(_text_of(page.as_py(), max_words))
        start = stop
    return texts


def _tokens_of(file: parquet.ParquetFile, group: int) -> Iterator[pyarrow.Scalar]:
    for batch in file.iter_batches(_PAGES_AT_ONCE, [group], [TOKEN, IS_HTML], use_threads=False):
        yield from batch.column("document")


def _text_of(document: dict, max_words: int) -> str:
    tokens = document["tokens"]
    if isinstance(tokens, dict):  # as datasets stores a sequence of structs: a struct of lists
        pairs = zip(tokens["token"], tokens["is_html"], strict=True)
    else:
        pairs = ((token["token"], token["is_html"]) for token in tokens)
    return " ".join(itertools.islice((token for token, is_html in pairs if not is_html), max_words))
