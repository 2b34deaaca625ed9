"""What run_retrieval.py does with opened models: asks each, and writes rankings, figures, one table and one contact sheet."""

import dataclasses
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers

from imagedex.encoding.vectors import progress_bar
from imagedex.errors import UserError
from imagedex.evaluation.figures import Figures
from imagedex.evaluation.intervals import without_intervals
from imagedex.evaluation.rankings import Ranking
from imagedex.evaluation.table import cell_with_interval, table
from imagedex.files import Lock, check_output_dir, clear_leftovers, write_atomically, writing
from imagedex.retrieval import comparison
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments
from imagedex.retrieval.contact_sheet import Thumbnails, build_sheet, shown_places, write_sheet_image
from imagedex.retrieval.contact_sheet_html import write_sheet_page
from imagedex.retrieval.opening import Opened
from imagedex.retrieval.queries import Queries, QueryFile
from imagedex.retrieval.retriever import Retriever
from imagedex.retrieval.unfinished import Unfinished

logger = logging.getLogger(__name__)

RECORD = "retrieval_arguments.json"
COMPARISON = "comparison.json"

# What may differ between a run and its continuation: where it writes, and how fast it goes.
MAY_DIFFER = {"output_dir", "device", "batch_size", "num_workers"}
OF_DIALOGUES = {"turns", "turn_separator", "last_turn_is_response"}


def setup_logging() -> None:
    """Our own log lines, and of the libraries only what is wrong."""
    logging.basicConfig(format="%(levelname).1s %(message)s", level=logging.WARNING, force=True)
    for name in ("imagedex", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


@dataclass
class Answer:
    """What a model answered.

    Attributes:
        shown: the rankings that the contact sheet shows.
        metrics: None where the right pictures are not known.
        facts: of its row in the comparison.
        unfinished: to be cleared when everything is written.
    """

    name: str
    shown: list[Ranking]
    metrics: dict[str, float] | None
    facts: dict
    written: list[Path]
    unfinished: Unfinished


def recorded(args: RetrievalArguments, generative: GenerativeArguments) -> dict:
    """The arguments that make two runs the same; those of generative models and of dialogues only where they say something."""
    left_out = MAY_DIFFER if args.turns else MAY_DIFFER | OF_DIALOGUES
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name not in left_out}
    if len(args.model_name_or_path) == 1:
        arguments["model_name_or_path"] = args.model_name_or_path[0]
    unsaid = GenerativeArguments()
    said = {name: v for name, v in dataclasses.asdict(generative).items() if v != getattr(unsaid, name)}
    return arguments | said


def check_apart(output_dir: Path, args: RetrievalArguments) -> None:
    """Refuses an output folder among the pictures: the next run would take the contact sheet for one of them."""
    for name in ("image_dir", "dataset_name", "gallery"):
        source = getattr(args, name)
        if source and Path(source).is_dir() and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--output_dir {output_dir} lies inside --{name} {source}; give a folder outside of it")


@contextmanager
def begun(output_dir: Path, arguments: dict) -> Iterator[None]:
    """The output folder, with the record of what makes it, for one run alone. Raises `UserError`."""
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    with Lock(output_dir, f"--output_dir {output_dir}") as lock:
        check_output_dir(output_dir, arguments, RECORD)  # again: another run may have begun in the meantime
        if lock.held:
            clear_leftovers(output_dir, within=True)
        record = json.dumps(arguments, indent=2, sort_keys=True) + "\n"
        with writing(output_dir):
            write_atomically(output_dir / RECORD, record)
        yield
        with writing(output_dir):  # also where somebody has deleted the folder while pictures were encoded
            write_atomically(output_dir / RECORD, record)


def search(
    retriever: Retriever, queries: Queries | QueryFile, args: RetrievalArguments, folder: Path, shown: Sequence[int]
) -> Unfinished:
    """Asks a model, block by block, and keeps what it found; a run that was killed goes on after its last whole block."""
    asked = [
        retriever.fingerprint(),
        queries.fingerprint,
        args.query_column,
        args.top_k,
        args.output_format,
        len(shown),
    ]
    asked += list(dataclasses.astuple(args.read_turns)) if args.read_turns else []
    fingerprint = hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()
    found = Unfinished(folder, args.output_format, fingerprint, set(shown))
    with progress_bar(len(queries), "queries", True, "answering", found.done) as bar:
        for block in queries.blocks(retriever.queries_at_once, found.done):
            started = time.perf_counter()
            rankings = retriever.search(block.sentences, args.top_k, block.targets)
            found.append(rankings, time.perf_counter() - started)
            bar.update(len(block))
    for remark in retriever.remarks():
        logger.warning("%s", remark)
    return found


def answer(
    opened: Opened,
    queries: Queries | QueryFile,
    args: RetrievalArguments,
    folder: Path,
    alone: bool,
    trained: int | None = None,
) -> Answer:
    """Asks one model, and writes its rankings and figures into its folder.

    Args: trained, on how many of the queries the model may have been trained; None where nobody knows.
    """
    retriever = opened.start()
    places = shown_places(len(queries), args.contact_sheet_queries) if args.contact_sheet_queries else []
    found = search(retriever, queries, args, folder, places)
    facts = opened.facts | {"ms_per_query": 1000 * found.seconds / len(queries)}
    if not alone:
        facts |= {"bytes": sum(comparison.size_on_disk(*kept) for kept in opened.kept)}
    known = {} if trained is None or not queries.has_targets else {"possibly_trained_queries": trained}
    written, metrics, metrics_path = [], None, folder / "metrics.json"
    with writing(folder):
        if queries.has_targets:
            added = known | (facts if opened.facts or not alone else {})
            metrics = judge(retriever, found, opened.new_image_ids, metrics_path, added)
            written.append(metrics_path)
        else:
            metrics_path.unlink(missing_ok=True)  # of a run when the file of queries still had its column of images
    facts |= known | {"gallery_size": len(retriever.image_ids)}
    shown = [ranking for ranking in found.judged() if ranking.query]
    written.insert(0, found.finish())
    return Answer(retriever.name, shown, metrics, facts, written, found)


def judge(
    retriever: Retriever, found: Unfinished, new_image_ids: set[str], path: Path, added: dict
) -> dict[str, float]:
    """The figures, with their intervals; printed, and written with what is added to them."""
    figures, by_cosine = Figures(), Figures()
    for ranking in found.judged():
        figures.add(ranking.rank, tuple(ranking.targets))
        if ranking.cosine_rank is not None:
            by_cosine.add(ranking.cosine_rank, tuple(ranking.targets))
    metrics, cosine = figures.summary() | figures.intervals(), by_cosine.summary() if len(by_cosine) else {}
    groups = comparison.group_figures(found.judged(), new_image_ids, len(retriever.image_ids))
    added = groups | added | {f"cosine_{name}": figure for name, figure in cosine.items()}
    write_metrics(metrics, retriever, len(figures), path, added)
    if cosine:
        shown = "  ".join(f"{name} {figure:.3f}" for name, figure in cosine.items())
        print(f"{retriever.name}, cosines alone (--hub_bias false): {shown}")
    if groups:
        print(comparison.group_table(groups))
    return metrics


def without_infinity(figures: dict) -> dict:
    """JSON knows no infinity: a median rank that does not exist is null."""
    return {name: None if isinstance(v, float) and math.isinf(v) else v for name, v in figures.items()}


def write_metrics(metrics: dict, retriever: Retriever, num_queries: int, path: Path, added: dict | None = None) -> Path:
    """Writes the figures, and what is added to them, and prints them."""
    size = len(retriever.image_ids)
    record = metrics | {"gallery_size": size, "queries": num_queries, "model": retriever.name} | (added or {})
    write_atomically(path, json.dumps(without_infinity(record), indent=2) + "\n")
    shown = "  ".join(f"{name} {cell_with_interval(name, metrics)}" for name in without_intervals(metrics))
    print(f"{retriever.name}: {shown}  ({num_queries} queries, gallery of {size} pictures)")
    return path


def finish(
    answers: list[Answer], args: RetrievalArguments, queries: Queries | QueryFile, gallery, output_dir: Path
) -> list[Path]:
    """Table and contact sheet of all models; returns all that was written. What an unfinished run needs goes last of all."""
    written = [path for one in answers for path in one.written]
    with writing(output_dir):
        if len(answers) > 1:
            written.append(compare(answers, args, queries, gallery, output_dir))
        if args.contact_sheet_queries:
            written += write_sheets(answers, gallery, len(queries), output_dir)
    for one in answers:
        one.unfinished.clear()
    return written


def compare(
    answers: list[Answer], args: RetrievalArguments, queries: Queries | QueryFile, gallery, output_dir: Path
) -> Path:
    """One table of all models, printed and written, beside what they have to beat and what cannot be beaten."""
    rows = {one.name: (one.metrics or {}) | one.facts for one in answers}
    where = args.dataset_name, args.dataset_config_name
    references = comparison.reference_rows(args.model_name_or_path, queries, *where, gallery)
    print(f"\n{len(queries)} queries, a gallery of {len(gallery)} pictures\n")
    print(table(rows | references, comparison.COLUMNS, "model") + "\n")
    record = {"queries": len(queries), "gallery_size": len(gallery)}
    record |= {
        part: {name: without_infinity(row) for name, row in some.items()}
        for part, some in (("models", rows), ("references", references))
    }
    write_atomically(output_dir / COMPARISON, json.dumps(record, indent=2) + "\n")
    return output_dir / COMPARISON


def write_sheets(answers: list[Answer], gallery, num_queries: int, folder: Path) -> list[Path]:
    """The contact sheet as a picture and as a page; none of documents."""
    if "image" not in gallery.column_names:
        return []
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    thumbnails = Thumbnails(lambda image_id: gallery[row_of[image_id]]["image"])
    figures = {one.name: without_intervals(one.metrics) for one in answers if one.metrics}
    shown = {one.name: one.shown for one in answers}
    most = len(answers[0].shown)
    sheet = build_sheet(shown, len(gallery), most, figures or None, num_queries)
    return [
        write_sheet_image(sheet, thumbnails, folder / "contact_sheet.jpg"),
        write_sheet_page(sheet, thumbnails, folder / "contact_sheet.html"),
    ]
