"""A model's card, filled from the run that made it."""

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from imagedex import DATA
from imagedex.corpora import RetrievalSplits
from imagedex.corpora.arguments import CorpusArguments
from imagedex.evaluation.exact import OTHER_GALLERIES, figures_within
from imagedex.evaluation.table import cell_with_interval
from imagedex.files import write_atomically
from imagedex.training.adapters import reaches
from imagedex.training.publishing import public_name

TEMPLATES = DATA / "model_cards"
HYPERPARAMETERS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size",
    "learning_rate", "text_learning_rate", "vision_learning_rate", "embedding_learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay",
    "max_grad_norm", "optim", "bf16", "seed",
)  # fmt: skip
FIGURES = ("hits@1", "hits@5", "hits@10", "mrr", "median_rank")


@dataclass
class CardFacts:
    """What a card says of the run: the corpus, what asks for what, and the figures ("eval_..." as Trainer names them; none:
    nothing held out)."""

    corpus: str
    train_size: str
    held_out: str
    asking: str = "sentence → picture"
    metrics: dict = field(default_factory=dict)
    baselines: dict = field(default_factory=dict)

    @classmethod
    def of(cls, splits: RetrievalSplits, data: CorpusArguments) -> "CardFacts":
        streaming = getattr(data, "streaming", False)
        if streaming:
            size = f"a {splits.train.form}"
        else:
            asking, found = getattr(splits, "nouns", ("captions", "pictures"))
            size = f"{len(splits.train)} {found}, {sum(map(len, splits.train['captions']))} {asking}"
        if splits.evaluation is None:
            held_out = "Nothing was held out."
        elif data.held_out_captions_per_image:
            held_out = f"{data.held_out_captions_per_image} caption(s) of each picture were held out; all pictures were trained."
        elif data.held_out_images:
            held_out = f"All captions of {data.held_out_images:.0%} of the pictures were held out."
        elif streaming:
            held_out = "Evaluated on a corpus of its own."
        else:
            held_out = "Evaluated on the corpus's own split."
        name = (data.train_file or data.dataset_name) if streaming else (data.dataset_name or data.train_file)
        asking = "question → document" if getattr(splits, "documents", False) else cls.asking
        return cls(Path(name).name if Path(name).exists() else name, size, held_out, asking)


def other_gallery(metrics: dict) -> str | None:
    """How the figures of a second gallery begin, where the captions were also searched in one."""
    return next((prefix for prefix in OTHER_GALLERIES if f"eval_{prefix}gallery_size" in metrics), None)


def gallery_words(metrics: dict, prefix: str = "") -> str:
    """What is in a gallery besides how many pictures: ", ..." where there are two of them, else ""."""
    other = other_gallery(metrics)
    new = other == "whole_" if not prefix else prefix == "new_"
    return "" if other is None else ", the new ones alone" if new else ", new and trained ones"


def rate_rows(facts: CardFacts, prefix: str = "") -> dict[str, dict]:
    """The model's figures in both directions, then the baselines', within the gallery whose figures begin so."""
    figures = {name.removeprefix("eval_"): value for name, value in facts.metrics.items()}
    own = figures_within(figures, prefix)
    rows = {
        facts.asking: own,
        f"{facts.asking}, cosines alone": figures_within(own, "cosine_"),
        "picture → sentence": figures_within(own, "image_to_text_"),
    }
    rows |= {name: figures_within(row, prefix) for name, row in facts.baselines.items()}
    return {name: row for name, row in rows.items() if "hits@1" in row}


def shortfall(facts: CardFacts) -> list[str]:
    """A sentence for each baseline that has more Hits@1 than the model, in either gallery."""
    source = "the documents' texts" if "document" in facts.asking else "the trained captions"
    names = {"BM25": f"BM25 over {source}", "caption vectors": f"the mean vectors of {source}"}
    sentences, other = [], other_gallery(facts.metrics)
    for prefix in ("",) if other is None else ("", other):
        found, size = (facts.metrics.get(f"eval_{prefix}{name}") for name in ("hits@1", "gallery_size"))
        begin = f"Among {size} pictures it" if prefix else "This model"
        sentences += [
            f"{begin} finds less than {names.get(name, name)} (Hits@1 {found:.3f} against {row[prefix + 'hits@1']:.3f})."
            for name, row in facts.baselines.items()
            if found is not None and round(found, 3) < round(row.get(prefix + "hits@1", 0), 3)
        ]
    return sentences


def written_rows(facts: CardFacts, prefix: str = "") -> dict[str, dict[str, str]]:
    """`rate_rows` as a card writes them."""
    return {
        name: {figure: cell_with_interval(figure, row) for figure in FIGURES}
        for name, row in rate_rows(facts, prefix).items()
    }


def second_gallery(facts: CardFacts) -> dict | None:
    """What a card says of the other gallery: its size, what is in it, and the rows."""
    prefix = other_gallery(facts.metrics)
    if prefix is None:
        return None
    words = gallery_words(facts.metrics, prefix)
    return {"size": facts.metrics[f"eval_{prefix}gallery_size"], "words": words, "rows": written_rows(facts, prefix)}


def plain(value):
    """An enumeration's value ("cosine"), anything else as it is."""
    return getattr(value, "value", value)


def tower_name(config) -> str:
    name = getattr(config, "_name_or_path", "")
    return f"{config.model_type} (`{public_name(name)}`)" if name else config.model_type


def t5_name(config) -> str:
    """How large a T5 is, and where it started from."""
    name = getattr(config, "_name_or_path", "")
    layers = f"{config.num_layers} encoder and {config.num_decoder_layers} decoder layers of width {config.d_model}"
    return layers + (f", started from `{public_name(name)}`" if name else "")


def card_results(facts: CardFacts) -> list[EvalResult]:
    """The figures as the Hub reads them from a card's head."""
    return [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type="imagefolder",
            dataset_name=facts.corpus,
            metric_type=figure,
            metric_name=figure,
            metric_value=round(facts.metrics[f"eval_{figure}"], 4),
        )
        for figure in FIGURES
        if f"eval_{figure}" in facts.metrics
    ]


def write_model_card(
    path: Path | str,
    template: str,
    model,
    args,
    facts: CardFacts,
    pipeline_tag: str | None = "feature-extraction",
    **variables,
) -> None:
    """Renders `model_cards/<template>.md` to `path`.

    Args: model, a PreTrainedModel; args, its TrainingArguments; facts, what the run measured; variables, what else the
    template asks for.
    """
    model_id = args.hub_model_id or Path(args.output_dir).resolve().name
    config = model.config
    results = card_results(facts)
    data = ModelCardData(
        model_name=model_id.split("/")[-1],
        library_name="transformers",
        **({"pipeline_tag": pipeline_tag} if pipeline_tag else {}),
        tags=["imagedex", config.model_type, "image-retrieval", "text-to-image-retrieval"],
        **({"eval_results": results} if results else {}),
    )
    parameters = list(model.parameters())
    variables = {
        "model_name": model_id.split("/")[-1],
        "model_id": model_id,
        "config": config,
        "text_tower": tower_name(getattr(config, "text_config", config)),
        "vision_tower": tower_name(config.vision_config) if hasattr(config, "vision_config") else None,
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "trained_parameters": f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        "hyperparameters": {
            name: plain(value) for name in HYPERPARAMETERS if (value := getattr(args, name, None)) is not None
        },
        "rows": written_rows(facts),
        "gallery_words": gallery_words(facts.metrics),
        "second_gallery": second_gallery(facts),
        "queries": facts.metrics.get("eval_queries"),
        "gallery_size": facts.metrics.get("eval_gallery_size"),
        "folds": facts.metrics.get("eval_folds"),
        "compared": bool(facts.baselines),
        "shortfall": " ".join(shortfall(facts)),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "datasets")
        ),
        **{name: getattr(facts, name) for name in ("corpus", "train_size", "held_out", "metrics")},
    } | variables
    card = ModelCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **variables)
    if not Path(path).exists() or Path(path).read_text(encoding="utf-8") != str(card):
        write_atomically(path, str(card))


def write_xmatching_card(path: Path | str, trainer, facts: CardFacts) -> None:
    model, args, start, states = trainer.model, trainer.args, trainer.head_start, {}
    for side in ("text", "vision"):
        frozen = f"LoRA of rank {args.lora_rank}" if reaches(model.tower(side), args) else "frozen"
        states[f"{side}_state"] = frozen if getattr(model.config, f"freeze_{side}_tower") else "trained"
    begins = start and f"{start.kind}, regularisation {start.regularization:g}, {start.directions} directions"
    write_model_card(path, "xmatching", model, args, facts, bank=model.caption_bank, begins=begins, **states)


def write_dsi_card(
    path: Path | str, trainer, facts: CardFacts, nouns: tuple[str, str], step: str, training_mix: str | None = None
):
    """The card of a generative model.

    Args: trainer, a `DSITrainer`; nouns, what asks and what is found; step, "retrieval", "indexing" or "captioning";
    training_mix, how many items were shown.
    """
    model, identifiers = trainer.model, trainer.identifiers
    asking, found = nouns
    variables = {
        "t5": t5_name(model.config),
        "asking": asking,
        "found": found,
        "step": step,
        "training_mix": training_mix,
        "teacher": trainer.teacher.name if getattr(trainer, "teacher", None) else None,
        "num_beams": trainer.args.num_beams,
        "memorised": facts.metrics.get("eval_memorised"),
    }
    if identifiers is None:
        return write_model_card(path, "captioning", model, trainer.args, facts, None, **variables)
    variables |= {
        "gallery_size": len(identifiers),
        "identifier_scheme": identifiers.scheme,
        "identifier_length": identifiers.max_length,
        "prompt": trainer.processing_class.prompt,
        "metrics": facts.metrics if "eval_hits@1" in facts.metrics else {},  # of sentences; pictures have `memorised`
    }
    return write_model_card(path, model.config.model_type, model, trainer.args, facts, None, **variables)
