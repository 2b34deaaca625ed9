"""Ask trained models for pictures: a gallery and a file of sentences in; rankings, figures and a contact sheet out.

    python run_retrieval.py --model_name_or_path runs/xmatching --image_dir ../my_photos \
        --queries sentences.txt --top_k 10 --output_dir runs/answers
    python run_retrieval.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name ../flickr8k \
        --queries captions.csv --output_dir runs/clip
    python run_retrieval.py --model_name_or_path runs/codebook_t5 --rerank_with runs/xmatching --dataset_name ../flickr8k \
        --queries captions.csv --output_dir runs/reranked
    python run_retrieval.py --model_name_or_path runs/xmatching runs/codebook_t5 --dataset_name ../flickr8k \
        --queries captions.csv --output_dir runs/compared

A model is an XMatchingModel, any dual encoder with get_text_features and get_image_features (CLIP, SigLIP), or one that
writes identifiers (T5, CodebookT5, VisionGroundedT5), which finds the pictures it has learned; with --add_new_images also
others, without training. Several models are compared in one table and on one contact sheet.

The queries are .txt (one sentence a line), .csv, .jsonl or .parquet. When the file has a column `image` with the right
picture's image_id (its path relative to the gallery's folder), the figures are printed and written too.
"""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import transformers

from imagedex import command_line, files
from imagedex.checkpoints import choose_device
from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking, check_names, rankings_path, write_rankings
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks
from imagedex.retrieval import comparison
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments
from imagedex.retrieval.contact_sheet import Thumbnails, build_sheet, write_sheet_image
from imagedex.retrieval.contact_sheet_html import write_sheet_page
from imagedex.retrieval.gallery import read_gallery
from imagedex.retrieval.opening import Opened, Opener, check_kinds
from imagedex.retrieval.queries import Queries, check_targets, read_queries
from imagedex.retrieval.retriever import Retriever

logger = logging.getLogger(__name__)

RECORD = "retrieval_arguments.json"
COMPARISON = "comparison.json"

# What may differ between a run and its continuation: where it writes, and how fast it goes.
MAY_DIFFER = {"output_dir", "device", "batch_size", "num_workers"}


def main(argv=None):
    args, generative = command_line.parse_arguments((RetrievalArguments, GenerativeArguments), __doc__, argv)
    logging.basicConfig(format="%(levelname).1s %(message)s", level=logging.WARNING, force=True)
    for name in ("imagedex", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()

    # everything that can be wrong is found before anything is written
    arguments = recorded(args, generative)
    output_dir = files.check_output_dir(args.output_dir, arguments, RECORD)
    check_apart(output_dir, args)
    device = choose_device(args.device)
    check_kinds(args.model_name_or_path, generative)  # before the gallery, which may take long to read
    labels = comparison.model_labels(args.model_name_or_path)
    queries = read_queries(args.queries, args.query_column)
    gallery = read_gallery(
        args.image_dir,
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.unreadable_images,
        args.num_workers or None,
        generative.held_out,
    )
    check_targets(queries, gallery["image_id"], args.queries)
    check_names(gallery["image_id"], args.output_format)
    opener, alone = Opener(args, generative, gallery, queries.sentences, device, output_dir), len(labels) == 1
    folders = {label: output_dir if alone else output_dir / comparison.folder_of(label) for label in labels}
    opened = {label: opener.open(label, name, folders[label]) for label, name in labels.items()}
    begin(output_dir, arguments)

    if len(gallery) < args.top_k:
        logger.warning(
            "the gallery has %d pictures, so rankings have %d places, not %d", len(gallery), len(gallery), args.top_k
        )
    answers = [answer(part, queries, args, folders[label], alone) for label, part in opened.items()]
    written = [path for one in answers for path in one.written]
    if not alone:
        written.append(compare(answers, args, queries, gallery, output_dir))
    if args.contact_sheet_queries:
        written += write_sheets(answers, gallery, args.contact_sheet_queries, output_dir)
    by = "" if alone else f" by {len(answers)} models"
    noun = "pictures" if "image" in gallery.column_names else "documents"
    print(f"{len(queries.sentences)} queries answered{by} from {len(gallery)} {noun}: {', '.join(map(str, written))}")


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
        files.write_atomically(output_dir / RECORD, json.dumps(arguments, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error


def answer(opened: Opened, queries: Queries, args: RetrievalArguments, folder: Path, alone: bool) -> Answer:
    """Asks one model, and writes its rankings and figures into its folder."""
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
        metrics = summarize_ranks([ranking.rank for ranking in rankings])
        groups = comparison.group_figures(rankings, opened.new_image_ids, len(retriever.image_ids))
        added = groups | (facts if opened.facts or not alone else {})
        written.append(write_metrics(metrics, retriever, len(rankings), metrics_path, added))
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
    files.write_atomically(path, json.dumps(without_infinity(record), indent=2) + "\n")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"{retriever.name}: {shown}  ({num_queries} queries, gallery of {size} pictures)")
    return path


def compare(answers: list[Answer], args: RetrievalArguments, queries: Queries, gallery, output_dir: Path) -> Path:
    """One table of all models, printed and written, beside what they have to beat and what cannot be beaten."""
    rows = {one.name: (one.metrics or {}) | one.facts for one in answers}
    where = args.dataset_name, args.dataset_config_name
    references = comparison.reference_rows(args.model_name_or_path, queries, *where, gallery)
    print(f"\n{len(queries.sentences)} queries, a gallery of {len(gallery)} pictures\n")
    print(comparison.table(rows | references) + "\n")
    record = {"queries": len(queries.sentences), "gallery_size": len(gallery)}
    record |= {
        part: {name: without_infinity(row) for name, row in some.items()}
        for part, some in (("models", rows), ("references", references))
    }
    files.write_atomically(output_dir / COMPARISON, json.dumps(record, indent=2) + "\n")
    return output_dir / COMPARISON


def write_sheets(answers: list[Answer], gallery, num_shown: int, folder: Path) -> list[Path]:
    """The contact sheet as a picture and as a page; none of documents."""
    if "image" not in gallery.column_names:
        return []
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    thumbnails = Thumbnails(lambda image_id: gallery[row_of[image_id]]["image"])
    figures = {one.name: one.metrics for one in answers if one.metrics}
    sheet = build_sheet({one.name: one.rankings for one in answers}, len(gallery), num_shown, figures or None)
    return [
        write_sheet_image(sheet, thumbnails, folder / "contact_sheet.jpg"),
        write_sheet_page(sheet, thumbnails, folder / "contact_sheet.html"),
    ]


if __name__ == "__main__":
    command_line.run(main)
