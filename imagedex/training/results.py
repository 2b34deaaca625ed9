"""What a finished run leaves: the model, its card, the questions it was judged by, a table, and one last line."""

import csv
import functools
import io
import json
import logging
import os
from pathlib import Path

from transformers import Trainer

from imagedex.corpora import RetrievalSplits
from imagedex.errors import UserError
from imagedex.evaluation.baselines import baseline_rows
from imagedex.evaluation.rankings import Ranking, short_float, write_rankings
from imagedex.files import write_atomically
from imagedex.training.cards import FIGURES, CardFacts, rate_rows

logger = logging.getLogger(__name__)

QUERIES = "eval_queries.csv"
BASELINES = "baselines.json"
MADE, DSI_MADE = "model, processor, code and card", "model, processor, identifiers, code and card"


def texts(splits: RetrievalSplits) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """(what may be searched by image_id, a document's text or a picture's trained captions; the questions)."""
    if getattr(splits, "documents", False):
        documents = zip(splits.item_ids, splits.item_texts(), strict=True)
        return {name: [text] for name, text in documents}, questions(splits)
    return dict(zip(splits.train["image_id"], splits.train["captions"], strict=True)), questions(splits)


def questions(splits: RetrievalSplits) -> list[tuple[str, str]]:
    """(caption, image_id) of each caption that is asked."""
    rows = zip(splits.evaluation["image_id"], splits.evaluation["captions"], strict=True)
    return [(caption, image_id) for image_id, captions in rows for caption in captions]


def baselines(splits: RetrievalSplits, encoder: str | None, text_tower: str | None) -> dict[str, dict]:
    """BM25's and the caption vectors' figures on the questions.

    Args: encoder, of the caption vectors, whose failure is the user's to mend; without it the pretrained text_tower, and
    where that is no text encoder alone (T5, CLIP) the row is left out and the log says why.
    """
    rows = functools.partial(baseline_rows, *texts(splits), gallery=splits.gallery["image_id"])
    try:
        return rows(encoder or text_tower)
    except UserError as error:
        if encoder or not text_tower:
            raise
        logger.warning("no row of caption vectors: %s; --baseline_text_encoder names another", error)
        return rows(None)


def write_queries(path: Path, queries: list[tuple[str, str]]) -> None:
    """CSV of `caption,image`, as run_retrieval.py reads it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["caption", "image"])
    writer.writerows(queries)
    write_atomically(path, buffer.getvalue())


def write_predictions(trainer: Trainer, splits: RetrievalSplits, k: int = 10) -> None:
    """rankings.jsonl: the k pictures found for each caption that is asked, as run_retrieval.py writes them."""
    scores, images = trainer.found(k, splits.gallery["image_id"][:])
    if trainer.is_world_process_zero():
        found = zip(questions(splits), images, scores, strict=True)
        rankings = [
            Ranking(caption, names, [short_float(score) for score in values]) for (caption, _), names, values in found
        ]
        write_rankings(rankings, Path(trainer.args.output_dir) / "rankings.jsonl")


def table(rows: dict[str, dict], columns) -> str:
    """Rows of figures as aligned text: rates with three decimals, other numbers as they are, a dash where there is none."""

    def cell(column, value):
        if value is None:
            return "–"
        return f"{value:.3f}" if "@" in column or column == "mrr" else f"{value:g}"

    cells = [["", *columns], *([name, *(cell(c, figures.get(c)) for c in columns)] for name, figures in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def relative(path: Path | str) -> str:
    """The path as a person would type it from here."""
    path = Path(path).resolve()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def finish(trainer: Trainer, splits: RetrievalSplits, facts: CardFacts, made: str = MADE) -> None:
    """Writes model, card, questions and baselines, prints the table and where everything is; pushes where asked.

    Args: made, what a trained model's folder holds, for the last line.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if args.do_train:
        trainer.save_model(_internal_call=True)  # pushed once, below, when everything is there
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        if splits.evaluation is not None:
            write_queries(folder / QUERIES, questions(splits))
        if facts.baselines:
            write_atomically(folder / BASELINES, json.dumps(facts.baselines, indent=2) + "\n")
        say_figures(facts, getattr(splits, "nouns", ("captions", "pictures")))
    pushed = trainer.push_to_hub() if args.push_to_hub else None
    if trainer.is_world_process_zero():
        made = made if args.do_train else "figures"
        print(f"{made}: {relative(folder)}" + (f" and {pushed.repo_url}" if pushed else ""))


def say_figures(facts: CardFacts, nouns: tuple[str, str]) -> None:
    """Prints what was measured. Args: nouns, what asks and what is found."""
    metrics, (asking, found) = facts.metrics, nouns
    if "eval_hits@1" in metrics:
        queries, gallery = metrics["eval_queries"], metrics["eval_gallery_size"]
        folds = f" (the mean of {metrics['eval_folds']} folds)" if "eval_folds" in metrics else ""
        print(f"\n{queries} held-out {asking}, a gallery of {gallery} {found}{folds}\n")
        print(table(rate_rows(facts), FIGURES) + "\n")
    if "eval_memorised" in metrics:
        samples, gallery = metrics["eval_memorised_samples"], metrics["eval_gallery_size"]
        print(f"memorised: {metrics['eval_memorised']:.3f} of {samples} {found}, among {gallery}\n")
    elif "eval_hits@1" not in metrics and "eval_loss" in metrics:
        print(f"\n{metrics['eval_queries']} held-out {asking}: {metrics['eval_loss']:.3f} nats a token\n")
