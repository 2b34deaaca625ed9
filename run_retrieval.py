"""Ask a trained model for pictures: a gallery and a file of sentences in; rankings, figures and a contact sheet out.

    python run_retrieval.py --model_name_or_path runs/xmatching --image_dir ../my_photos \
        --queries sentences.txt --top_k 10 --output_dir runs/answers
    python run_retrieval.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name ../flickr8k \
        --queries captions.csv --output_dir runs/clip

The model is an XMatchingModel, or any dual encoder with get_text_features and get_image_features (CLIP, SigLIP).
The queries are .txt (one sentence a line), .csv, .jsonl or .parquet. When the file has a column `image` with the right
picture's image_id (its path relative to the gallery's folder), the figures are printed and written too.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers

import imagedex.cli as cli
from imagedex.errors import UserError
from imagedex.retrieval.contact_sheet import Thumbnails, build_sheet, write_sheet_image
from imagedex.retrieval.contact_sheet_html import write_sheet_page
from imagedex.retrieval.gallery import read_gallery
from imagedex.retrieval.loading import choose_device, load_dual_encoder, read_model_type
from imagedex.retrieval.queries import check_targets, read_queries
from imagedex.retrieval.rankings import Ranking, check_names, rankings_path, write_rankings
from imagedex.retrieval.retriever import Retriever, VectorRetriever
from imagedex.retrieval.vector_index import check_index, encode_gallery, gallery_fingerprint, model_fingerprint
from imagedex.training.arguments import argument
from metrics.hits_at_k.hits_at_k import summarize_ranks

logger = logging.getLogger(__name__)

RECORD = "retrieval_arguments.json"

# What may differ between a run and its continuation: where it writes, and how fast it goes.
MAY_DIFFER = {"output_dir", "device", "batch_size", "num_workers"}


@dataclass
class RetrievalArguments:
    """Which model, which pictures, which sentences."""

    _argument_group_name = "retrieval"

    model_name_or_path: str | None = argument("A trained retriever, or any CLIP-like model: a folder or a Hub id.")
    queries: str | None = argument("The sentences: .txt (one a line), .csv, .jsonl or .parquet.")
    query_column: str = argument("Column of the sentences (not for .txt).", "caption")
    image_dir: str | None = argument(
        "The gallery: every picture in this folder and below. With dataset_name: its pictures' root."
    )
    dataset_name: str | None = argument("The gallery: the pictures of a corpus (Hub id, built-in name or folder).")
    dataset_config_name: str | None = argument("Configuration of the dataset.")
    dataset_split: str = argument("Split of the dataset that is the gallery, or all of them.", "all")
    top_k: int = argument("Pictures to find for each sentence.", 10)
    output_dir: str | None = argument("Folder for rankings, figures, contact sheet and index.")
    output_format: Literal["jsonl", "parquet", "tsv"] = argument(
        "Form of the rankings; tsv has the file names only.", "jsonl"
    )
    contact_sheet_queries: int = argument(
        "Sentences on the contact sheet, evenly spaced over the file; 0 for no sheet.", 20
    )
    unreadable_images: Literal["error", "skip"] = argument(
        "A picture that cannot be read: stop, or leave it out and say so.", "error"
    )
    trust_remote_code: bool = argument("Run the code that a model on the Hub brings with it.", False)
    batch_size: int = argument("Pictures encoded at once.", 64)
    num_workers: int = argument("Processes that check, decode and resize pictures.", 0)
    device: str | None = argument("cpu, cuda, cuda:1, mps; by default the best there is.")

    def __post_init__(self):
        for name in ("model_name_or_path", "queries", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed; --help lists the arguments")
        if not self.image_dir and not self.dataset_name:
            raise ValueError("no gallery: give a folder of pictures with --image_dir, or a corpus with --dataset_name")
        for name, least in (("top_k", 1), ("contact_sheet_queries", 0), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {least} or more")


def main(argv=None):
    (args,) = cli.parse_arguments((RetrievalArguments,), __doc__, argv)
    logging.basicConfig(format="%(levelname).1s %(message)s", level=logging.WARNING, force=True)
    for name in ("imagedex", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()

    # everything that can be wrong is found before anything is written
    arguments = {name: value for name, value in dataclasses.asdict(args).items() if name not in MAY_DIFFER}
    output_dir = cli.check_output_dir(args.output_dir, arguments, RECORD)
    check_apart(output_dir, args)
    device = choose_device(args.device)
    read_model_type(args.model_name_or_path)  # before the gallery, which may take long to read
    queries = read_queries(args.queries, args.query_column)
    gallery = read_gallery(
        args.image_dir,
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.unreadable_images,
        args.num_workers or None,
    )
    check_targets(queries, gallery["image_id"], args.queries)
    check_names(gallery["image_id"], args.output_format)
    retriever = open_retriever(args, gallery, device, output_dir, arguments)

    if len(gallery) < args.top_k:
        logger.warning(
            "the gallery has %d pictures, so rankings have %d places, not %d", len(gallery), len(gallery), args.top_k
        )
    rankings = retriever.search(queries.sentences, args.top_k, queries.targets)
    written = [write_rankings(rankings, rankings_path(output_dir, args.output_format))]
    metrics, metrics_path = None, output_dir / "metrics.json"
    if queries.targets is not None:
        metrics = summarize_ranks([ranking.rank for ranking in rankings])
        written.append(write_metrics(metrics, retriever, len(rankings), metrics_path))
    else:
        metrics_path.unlink(missing_ok=True)  # of a run when the file of queries still had its column of images
    if args.contact_sheet_queries:
        written += write_sheets(rankings, metrics, retriever, gallery, args.contact_sheet_queries, output_dir)
    print(f"{len(rankings)} queries answered from {len(gallery)} pictures: {', '.join(map(str, written))}")


def check_apart(output_dir: Path, args: RetrievalArguments) -> None:
    """Refuses an output folder among the pictures: the next run would take the contact sheet for one of them."""
    for name in ("image_dir", "dataset_name"):
        source = getattr(args, name)
        if source and Path(source).is_dir() and output_dir.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(f"--output_dir {output_dir} lies inside --{name} {source}; give a folder outside of it")


def open_retriever(args: RetrievalArguments, gallery, device, output_dir: Path, arguments: dict) -> Retriever:
    """The model over the gallery. Begins the run, once model and index are known to be good."""
    encoder = load_dual_encoder(args.model_name_or_path, args.trust_remote_code, device)
    model, image_processor = encoder.model, encoder.image_processor
    index_dir = output_dir / "index"
    fingerprints = model_fingerprint(model, image_processor), gallery_fingerprint(gallery)
    check_index(index_dir, *fingerprints)
    begin(output_dir, arguments)
    vectors = encode_gallery(
        model,
        image_processor,
        gallery,
        index_dir,
        batch_size=args.batch_size,
        device=device,
        num_workers=args.num_workers,
        progress=True,
        fingerprints=fingerprints,
    )
    folder = Path(args.model_name_or_path).expanduser()
    return VectorRetriever(
        folder.resolve().name if folder.is_dir() else args.model_name_or_path,
        gallery["image_id"],
        vectors,
        model,
        encoder.tokenizer,
        device=device,
        text_kwargs=encoder.text_kwargs,
        progress=True,
    )


def begin(output_dir: Path, arguments: dict) -> None:
    try:
        cli.write_atomically(output_dir / RECORD, json.dumps(arguments, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error


def write_metrics(metrics: dict, retriever: Retriever, num_queries: int, path: Path) -> Path:
    """Writes the figures (JSON knows no infinity: a median rank that does not exist is null) and prints them."""
    figures = {name: None if math.isinf(value) else value for name, value in metrics.items()}
    size = len(retriever.image_ids)
    record = figures | {"gallery_size": size, "queries": num_queries, "model": retriever.name}
    cli.write_atomically(path, json.dumps(record, indent=2) + "\n")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"{retriever.name}: {shown}  ({num_queries} queries, gallery of {size} pictures)")
    return path


def write_sheets(
    rankings: list[Ranking], metrics, retriever: Retriever, gallery, num_shown: int, folder: Path
) -> list[Path]:
    """The contact sheet as a picture and as a page."""
    row_of = {image_id: row for row, image_id in enumerate(retriever.image_ids)}
    thumbnails = Thumbnails(lambda image_id: gallery[row_of[image_id]]["image"])
    figures = {retriever.name: metrics} if metrics else None
    sheet = build_sheet({retriever.name: rankings}, len(gallery), num_shown, figures)
    return [
        write_sheet_image(sheet, thumbnails, folder / "contact_sheet.jpg"),
        write_sheet_page(sheet, thumbnails, folder / "contact_sheet.html"),
    ]


if __name__ == "__main__":
    cli.run(main)
