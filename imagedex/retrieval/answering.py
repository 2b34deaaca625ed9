"""What run_retrieval.py does with opened models: asks each, and writes rankings, figures, one table and one contact sheet."""

import dataclasses
import json
import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import transformers

from imagedex.errors import UserError
from imagedex.evaluation.intervals import intervals, without_intervals
from imagedex.evaluation.rankings import Ranking, rankings_path, write_rankings
from imagedex.evaluation.table import cell_with_interval, table
from imagedex.files import write_atomically
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks
from imagedex.retrieval import comparison
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments
from imagedex.retrieval.contact_sheet import Thumbnails, build_sheet, write_sheet_image
from imagedex.retrieval.contact_sheet_html import write_sheet_page
from imagedex.retrieval.opening import Opened
from imagedex.retrieval.queries import Queries
from imagedex.retrieval.retriever import Retriever

logger = logging.getLogger(__name__)

RECORD = "retrieval_arguments.json"
COMPARISON = "comparison.json"

# What may differ between a run and its continuation: where it writes, and how fast it goes.
MAY_DIFFER = {"output_dir", "device", "batch_size", "num_workers"}


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
    """What a model answered. metrics: None where the right pictures are not known; facts: of its row in the comparison."""

    name: str
    rankings: list[Ranking]
    metrics: dict[str, float] | None
    facts: dict
    written: list[Path]


def recorded(args: RetrievalArguments, generative: GenerativeArguments) -> dict:
    """The arguments that make two runs the same; those of generative models only where they say something."""
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name not in MAY_DIFFER}
    if len(args.model_name_or_path) == 1:
        arguments["model_name_or_path"] = args.model_name_or_path[0]
    unsaid = GenerativeArguments()
    said = {name: v for name, v in dataclasses.asdict(generative).items() if v != getattr(unsaid, name)}
    return arguments | said


def check_apart(output_dir: Path, args: RetrievalArguments) -> None:
    """Refuses an output folder among the pictures: the next run would take the contact sheet for one of them."""
    for name in ("image_dir", "dataset_name"):
        source = getattr(args, name)
        if source and Path(source).is_dir() and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--output_dir {output_dir} lies inside --{name} {source}; give a folder outside of it")


def begin(output_dir: Path, arguments: dict) -> None:
    try:
        write_atomically(output_dir / RECORD, json.dumps(arguments, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error


def answer(
    opened: Opened, queries: Queries, args: RetrievalArguments, folder: Path, alone: bool, trained: int | None = None
) -> Answer:
    """Asks one model, and writes its rankings and figures into its folder.

    Args: trained, on how many of the queries the model may have been trained; None where nobody knows.
    """
    retriever = opened.start()
    started = time.perf_counter()
    rankings = retriever.search(queries.sentences, args.top_k, queries.targets)
    facts = opened.facts | {"ms_per_query": 1000 * (time.perf_counter() - started) / len(rankings)}
    if not alone:
        facts |= {"bytes": sum(comparison.size_on_disk(*kept) for kept in opened.kept)}
    written = [write_rankings(rankings, rankings_path(folder, args.output_format))]
    metrics, metrics_path = None, folder / "metrics.json"
    if queries.targets is None:
        metrics_path.unlink(missing_ok=True)  # of a run when the file of queries still had its column of images
    else:
        ranks = [ranking.rank for ranking in rankings]
        metrics = summarize_ranks(ranks) | intervals((ranks, queries.targets))
        by_cosine = [ranking.cosine_rank for ranking in rankings if ranking.cosine_rank is not None]
        cosine = summarize_ranks(by_cosine) if by_cosine else {}
        groups = comparison.group_figures(rankings, opened.new_image_ids, len(retriever.image_ids))
        known = {} if trained is None else {"possibly_trained_queries": trained}
        added = groups | known | (facts if opened.facts or not alone else {})
        added |= {f"cosine_{name}": figure for name, figure in cosine.items()}
        facts |= known
        written.append(write_metrics(metrics, retriever, len(rankings), metrics_path, added))
        if cosine:
            shown = "  ".join(f"{name} {figure:.3f}" for name, figure in cosine.items())
            print(f"{retriever.name}, cosines alone (--hub_bias false): {shown}")
        if groups:
            print(comparison.group_table(groups))
    facts |= {"gallery_size": len(retriever.image_ids)}
    return Answer(retriever.name, rankings, metrics, facts, written)


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


def compare(answers: list[Answer], args: RetrievalArguments, queries: Queries, gallery, output_dir: Path) -> Path:
    """One table of all models, printed and written, beside what they have to beat and what cannot be beaten."""
    rows = {one.name: (one.metrics or {}) | one.facts for one in answers}
    where = args.dataset_name, args.dataset_config_name
    references = comparison.reference_rows(args.model_name_or_path, queries, *where, gallery)
    print(f"\n{len(queries.sentences)} queries, a gallery of {len(gallery)} pictures\n")
    print(table(rows | references, comparison.COLUMNS, "model") + "\n")
    record = {"queries": len(queries.sentences), "gallery_size": len(gallery)}
    record |= {
        part: {name: without_infinity(row) for name, row in some.items()}
        for part, some in (("models", rows), ("references", references))
    }
    write_atomically(output_dir / COMPARISON, json.dumps(record, indent=2) + "\n")
    return output_dir / COMPARISON


def write_sheets(answers: list[Answer], gallery, num_shown: int, folder: Path) -> list[Path]:
    """The contact sheet as a picture and as a page; none of documents."""
    if "image" not in gallery.column_names:
        return []
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    thumbnails = Thumbnails(lambda image_id: gallery[row_of[image_id]]["image"])
    figures = {one.name: without_intervals(one.metrics) for one in answers if one.metrics}
    sheet = build_sheet({one.name: one.rankings for one in answers}, len(gallery), num_shown, figures or None)
    return [
        write_sheet_image(sheet, thumbnails, folder / "contact_sheet.jpg"),
        write_sheet_page(sheet, thumbnails, folder / "contact_sheet.html"),
    ]
