"""What a finished run leaves: the model, its card, the questions it was judged by, a table, and one last line."""

import csv
import functools
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer

from imagedex.checkpoints import read_model_type
from imagedex.corpora import RetrievalSplits, gallery_rows
from imagedex.corpora.provenance import QUERIES, Training, cell_of, possibly_trained, question, warning_of
from imagedex.corpora.splits import questions
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.errors import UserError
from imagedex.evaluation.baselines import baseline_rows, model_row
from imagedex.evaluation.rankings import Ranking, short_float, write_rankings
from imagedex.evaluation.table import table
from imagedex.files import write_atomically
from imagedex.training.cards import FIGURES, CardFacts, gallery_words, other_gallery, rate_rows, shortfall
from imagedex.training.publishing import public_name
from imagedex.training.run import EVAL_RESULTS, FINISHED, Run, at_work, read_json

logger = logging.getLogger(__name__)

BASELINES = "baselines.json"
COMPARE_FLAG = "compare_with_model"
MADE, DSI_MADE = "model, processor, code and card", "model, processor, identifiers, code and card"


def texts(splits: RetrievalSplits) -> tuple[dict[str, list[str]], list[tuple[str, tuple[str, ...]]]]:
    """(what may be searched by image_id, a document's text or a picture's trained captions; the questions)."""
    if getattr(splits, "documents", False):
        documents = zip(splits.item_ids, splits.item_texts(), strict=True)
        return {name: [text] for name, text in documents}, questions(splits.evaluation)
    return dict(zip(splits.train["image_id"], splits.train["captions"], strict=True)), questions(splits.evaluation)


def baselines(splits: RetrievalSplits, encoder: str | None, text_tower: str | None) -> dict[str, dict]:
    """BM25's and the caption vectors' figures on the questions; none where no picture asked for has a trained caption, since
    both find pictures by their captions.

    Args: encoder, of the caption vectors, whose failure is the user's to mend; without it the pretrained text_tower, and
    where that is no text encoder alone (T5, CLIP) the row is left out and the log says why.
    """
    known, asked = texts(splits)
    if not any(known.get(image_id) for _, right in asked for image_id in right):
        logger.warning("no rows of BM25 and caption vectors: no picture that is asked for has a trained caption")
        return {}
    rows = functools.partial(baseline_rows, known, asked, gallery=splits.gallery["image_id"])
    try:
        return rows(encoder or text_tower)
    except UserError as error:
        if encoder or not text_tower:
            raise
        logger.warning("no row of caption vectors: %s; --baseline_text_encoder names another", error)
        return rows(None)


def check_compared(names: Sequence[str] | None) -> None:
    """Before anything is read: --compare_with_model names models, each once. Raises `UserError`."""
    labels = [public_name(name) for name in names or ()]
    for name, label in zip(names or (), labels, strict=True):
        read_model_type(name, COMPARE_FLAG)
        if labels.count(label) > 1:
            raise UserError(f"--{COMPARE_FLAG} names {label} twice; give each model once, and a name of its own")


def compared_models(life: Run, splits: RetrievalSplits, names: Sequence[str]) -> dict[str, dict]:
    """Figures of dual encoders as they are, on the questions, in each gallery. Raises `UserError`."""
    args, rows = life.args, {}
    asked = [(sentence, image_id) for sentence, (image_id,) in questions(splits.evaluation)]  # pictures: one is right
    pictures, galleries = splits.galleries()
    targets = gallery_rows(pictures, [image_id for _, image_id in asked])
    ours = Training(life.arguments, {question(*one) for one in asked})
    for name in names:
        encoder, label = load_dual_encoder(name, device=args.device, flag=COMPARE_FLAG), public_name(name)
        rows[label] = model_row(
            encoder,
            [sentence for sentence, _ in asked],
            pictures,
            targets,
            galleries,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
        )
        trained = Training.of(name)
        for seen in possibly_trained({label: trained}, asked, captions=asked, origin=ours).values():
            count = sum(question(*one) in seen for one in asked)
            rows[label]["possibly_trained_queries"] = count
            if count:
                logger.warning("%s", warning_of(label, count, len(asked), trained, life.arguments))
    return rows


def measure_baselines(
    life: Run, splits: RetrievalSplits, text_tower: str | None = None, models: Sequence[str] | None = None
) -> dict[str, dict]:
    """`baselines` and `compared_models`, where they are asked for; on the main process, and not again when this run has
    measured them."""
    args = life.args
    if not (args.do_eval and args.process_index == 0 and (args.compare_with_baselines or models)):
        return {}
    if kept := life.kept(BASELINES):
        return kept
    rows = baselines(splits, args.baseline_text_encoder, text_tower) if args.compare_with_baselines else {}
    return rows | (compared_models(life, splits, models) if models else {})


def write_queries(path: Path, queries: list[tuple[str, tuple[str, ...]]]) -> None:
    """CSV of `caption,image`, as run_retrieval.py reads it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["caption", "image"])
    writer.writerows((sentence, cell_of(right)) for sentence, right in queries)
    write_atomically(path, buffer.getvalue())


def write_predictions(trainer: Trainer, splits: RetrievalSplits, k: int = 10) -> None:
    """rankings.jsonl: the k pictures found for each caption that is asked, as run_retrieval.py writes them."""
    with at_work(trainer):
        _write_predictions(trainer, splits, k)


def _write_predictions(trainer: Trainer, splits: RetrievalSplits, k: int) -> None:
    scores, images, *cosines = trainer.found(k, splits.gallery["image_id"][:])
    if trainer.is_world_process_zero():
        found = zip(questions(splits.evaluation), images, scores, strict=True)
        rankings = [
            Ranking(caption, names, [short_float(score) for score in values]) for (caption, _), names, values in found
        ]
        for ranking, values in zip(rankings, cosines[0] if cosines and cosines[0] else [], strict=False):
            ranking.cosines = [short_float(value) for value in values]
        write_rankings(rankings, Path(trainer.args.output_dir) / "rankings.jsonl")


def relative(path: Path | str) -> str:
    """The path as a person would type it from here."""
    path = Path(path).resolve()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def finish(life: Run, trainer: Trainer, splits: RetrievalSplits, facts: CardFacts, made: str = MADE) -> None:
    """Writes card, questions and baselines, prints the table and where everything is; pushes where asked.

    Args: life, carried out; made, what a trained model's folder holds, for the last line.
    """
    with at_work(trainer):
        _finish(life, trainer, splits, facts, made)


def _finish(life: Run, trainer: Trainer, splits: RetrievalSplits, facts: CardFacts, made: str) -> None:
    args, folder = trainer.args, life.folder
    nouns, made = getattr(splits, "nouns", ("captions", "pictures")), made if args.do_train else "figures"
    if args.do_train:
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        if splits.evaluation is not None and not life.has(QUERIES):
            write_queries(folder / QUERIES, questions(splits.evaluation))
        if facts.baselines and not life.has(BASELINES):
            write_atomically(folder / BASELINES, json.dumps(facts.baselines, indent=2) + "\n")
        if not life.complete:
            files = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != FINISHED)
            end = {"files": files, "made": made, "nouns": nouns, "asking": facts.asking}
            write_atomically(folder / FINISHED, json.dumps(end, indent=2) + "\n")
        say_figures(facts, nouns)
    pushed = None
    if args.push_to_hub:
        if not args.do_train:  # a model that was only judged is not in the folder yet
            trainer.save_model(_internal_call=True)
        pushed = trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(f"{made}: {relative(folder)}" + (f" and {pushed.repo_url}" if pushed else ""))


def say_again(life: Run) -> None:
    """Of a run that is finished: the table and the last line, from what it left."""
    if life.args.process_index:
        return
    folder, end = life.folder, life.finished
    logger.info("this run is finished, so nothing is done again; another --output_dir begins anew")
    measured = [read_json(folder / name) or {} for name in (EVAL_RESULTS, BASELINES)]
    facts = CardFacts("", "", "", end["asking"], *measured)
    say_figures(facts, end["nouns"])
    print(f"{end['made']}: {relative(folder)}")


def say_figures(facts: CardFacts, nouns: tuple[str, str]) -> None:
    """Prints what was measured, a table a gallery. Args: nouns, what asks and what is found."""
    metrics, (asking, found) = facts.metrics, nouns
    columns = {name: name for name in FIGURES}
    if "eval_hits@1" in metrics:
        queries, gallery = metrics["eval_queries"], metrics["eval_gallery_size"]
        folds = f" (the mean of {metrics['eval_folds']} folds)" if "eval_folds" in metrics else ""
        print(f"\n{queries} held-out {asking}, a gallery of {gallery} {found}{folds}{gallery_words(metrics)}\n")
        print(table(rate_rows(facts), columns) + "\n")
        if other := other_gallery(metrics):
            size = metrics[f"eval_{other}gallery_size"]
            print(f"the same {asking}, a gallery of {size} {found}{gallery_words(metrics, other)}\n")
            print(table(rate_rows(facts, other), columns) + "\n")
        for line in shortfall(facts):
            print(line + "\n")
    if "eval_memorised" in metrics:
        samples, gallery = metrics["eval_memorised_samples"], metrics["eval_gallery_size"]
        print(f"memorised: {metrics['eval_memorised']:.3f} of {samples} {found}, among {gallery}\n")
    elif "eval_hits@1" not in metrics and "eval_loss" in metrics:
        print(f"\n{metrics['eval_queries']} held-out {asking}: {metrics['eval_loss']:.3f} nats a token\n")
