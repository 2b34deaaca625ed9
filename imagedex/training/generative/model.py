"""Builds a generative model with everything it needs, in the one order that works."""

import logging
from dataclasses import dataclass

from transformers.utils import logging as hf_logging

from imagedex.checkpoints import take_style
from imagedex.configuration.configuration_codebook_t5 import CodebookT5Config
from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.indexed import IndexedSplits
from imagedex.modeling import GENERATIVE
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.processing_retrieval import SentenceProcessor
from imagedex.training.arguments import ModelArguments
from imagedex.training.generative.arguments import DSITrainingArguments, IdentifierArguments, T5Arguments, TextArguments
from imagedex.training.generative.checks import WITH_PICTURES
from imagedex.training.generative.identify import Assigner, brought_identifiers, check_brought, check_rows, check_wanted
from imagedex.training.generative.rows import DSIRows, ItemInputs
from imagedex.training.generative.starts.identifier_rows import start_rows
from imagedex.training.generative.starts.lexical import start_from_texts
from imagedex.training.image_processor import output_size
from imagedex.training.processors import build_processor
from imagedex.training.towers import (
    build_tower_config,
    decide_freezing,
    forget_folders,
    of_parts,
    open_trained,
    tokenizer_fields,
    warn_of_random_towers,
)
from imagedex.training.trainer_parts import trained_model

logger = logging.getLogger(__name__)

NEW_PROMPT = "question: "  # before each sentence, of a model that was not trained with another


@dataclass
class Parts:
    """A generative model ready to be trained. identifiers: None of captioning, which needs none."""

    processor: SentenceProcessor
    model: object
    identifiers: Identifiers | None
    rows: DSIRows


def build_parts(
    kind: str,
    splits: IndexedSplits,
    checkpoint: str | None,
    args: DSITrainingArguments,
    data: CorpusArguments,
    model_args: ModelArguments,
    t5: T5Arguments,
    texts: TextArguments,
    wanted: IdentifierArguments | None,
) -> Parts:
    """Texts -> processor -> model -> identifiers -> embeddings -> start.

    The model starts with the tokenizer's own words; then items get identifiers, which may need the model's vision tower and
    add tokens; then the embeddings grow to the tokenizer's new length; a lexical start fills them last.

    Args:
        checkpoint: of the run that goes on; processor, model and identifiers come from there.
        wanted: the identifiers asked for; None: no item gets one.

    Raises: `UserError`.
    """
    name = model_args.model_name_or_path
    identifiers = brought_identifiers(checkpoint or name)
    style = texts.style() | {"max_text_length": data.max_text_length}
    if identifiers is not None:
        style |= {key: value for key, value in take_style(identifiers).items() if style[key] is None}
    processor = build_processor(
        model_args,
        ("resume_from_checkpoint", checkpoint) if checkpoint else ("model_name_or_path", name),
        t5.text_model_name_or_path,
        data.image_size,
        splits.training_texts(),
        style,
        with_pictures=kind in WITH_PICTURES,
        new_prompt=NEW_PROMPT,
    )
    model = build_model(model_args, t5, kind, processor, checkpoint)
    items = ItemInputs(splits, model, processor, args, data, texts.document_prompt)
    if wanted is None:
        return Parts(processor, model, None, DSIRows(items, None))

    if identifiers is not None:
        if not checkpoint:
            check_wanted(identifiers, wanted)
        check_brought(identifiers, splits.item_ids, processor.tokenizer)
        resize_embeddings(model, processor.tokenizer, True)  # a pretrained T5 that goes on has its own words alone
    else:
        knows_words = bool(name or t5.text_model_name_or_path)
        check_rows(wanted, knows_words)
        identifiers = Assigner(wanted, items, bool(name or model_args.vision_model_name_or_path))()
        resize_embeddings(model, processor.tokenizer, knows_words)
        if knows_words:
            start_identifiers(items, identifiers, wanted)
        elif t5.t5_start == "lexical":
            known = [processor.cleaned(text) for text in splits.item_texts()]
            pairs = [(processor.cleaned(sentence), processor.cleaned(rest)) for sentence, rest in splits.known_pairs()]
            start_from_texts(model, processor.tokenizer, identifiers, known, pairs, wanted.identifier_seed)
    return Parts(processor, model, identifiers, DSIRows(items, identifiers))


def start_identifiers(items: ItemInputs, identifiers: Identifiers, wanted: IdentifierArguments) -> None:
    """Fills the embeddings that identifiers added beside pretrained words, as --identifier_rows says."""
    if wanted.identifier_rows == "mean":
        return
    model, args, tokenizer = items.model.to(items.args.device), items.args, items.processor.tokenizer
    known = items.known_sentences() if wanted.identifier_rows != "random" else [[]] * len(identifiers)
    start_rows(
        model, tokenizer, identifiers, known, items.picture_vectors, wanted.identifier_seed, not args.disable_tqdm
    )


def build_model(model: ModelArguments, t5: T5Arguments, kind: str, processor, checkpoint: str | None = None):
    """The model in the sizes of the processor. Raises `UserError` for parts that do not fit each other.

    Args: checkpoint, of a run that goes on; its model stands for what the arguments name, see `trained_model`.
    """
    trained = trained_model(checkpoint) or model.model_name_or_path
    fields = t5.config_fields()
    if model.vision_config:
        fields["freeze_vision_tower"] = freezing_of_new_tower(t5, kind)
    made = make_model(trained, model, t5, kind, processor, fields)
    # for its card: what the run started from, and not the checkpoint that it goes on from
    made.config._name_or_path = model.model_name_or_path or t5.text_model_name_or_path or ""
    if kind in WITH_PICTURES:
        if model.config_name and not trained:
            warn_of_random_towers(made.config)
        forget_folders(made.config)
    return made


def freezing_of_new_tower(t5: T5Arguments, kind: str) -> bool:
    """Whether a vision tower from scratch is frozen. The fixed codebook passes no gradient, so it always is there."""
    if kind == "codebook_t5" and t5.quantization != "learned":
        logger.warning(
            "the vision tower starts from scratch, and --quantization fixed never trains it: the visual tokens are random "
            "words; give --vision_model_name_or_path, or --quantization learned"
        )
        return True if t5.freeze_vision_tower is None else t5.freeze_vision_tower
    return decide_freezing("vision", t5.freeze_vision_tower)


def make_model(trained: str | None, model: ModelArguments, t5: T5Arguments, kind: str, processor, fields: dict):
    """Args: trained, a whole model; fields, of its config. Raises `UserError`, see `build_model`."""
    model_class = GENERATIVE[kind]
    config_class = model_class.config_class
    tokenizer = processor.tokenizer
    sizes = tokenizer_fields(tokenizer) | {"decoder_start_token_id": tokenizer.pad_token_id}
    hf_logging.set_verbosity_error()  # the load report lists what is new on purpose
    try:
        if trained:
            return open_trained(model_class, trained, fields)
        if kind == "codebook_t5":
            fields |= CodebookT5Config.codebook_fields(tokenizer)
        if model.config_name:
            return model_class(config_class.from_pretrained(model.config_name, **sizes, **fields))
        t5_config = build_tower_config(t5.t5_config, "t5_config", **sizes)
        if t5_config is not None:
            t5_config.decoder_start_token_id = tokenizer.pad_token_id
        if kind == "t5":
            return model_class(t5_config) if t5_config else model_class.from_pretrained(t5.text_model_name_or_path)
        pixels = output_size(processor.image_processor)
        square = {"image_size": pixels[0]} if pixels and pixels[0] == pixels[1] else {}
        return model_class.from_t5_vision_pretrained(
            t5.text_model_name_or_path,
            model.vision_model_name_or_path,
            t5_config=t5_config,
            vision_config=build_tower_config(model.vision_config, "vision_config", **square),
            **fields,
        )
    except Exception as error:
        raise of_parts(error) from error
    finally:
        hf_logging.set_verbosity_warning()


def resize_embeddings(model, tokenizer, pretrained_words: bool) -> None:
    """Grows the word embeddings to the tokenizer's length. New words start as T5's do; beside pretrained words, as draws from
    their distribution."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        hf_logging.set_verbosity_error()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=pretrained_words)
        hf_logging.set_verbosity_warning()
