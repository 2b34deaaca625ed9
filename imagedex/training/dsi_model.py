"""Builds a generative model, its processor and its identifiers from the arguments.

The order matters. The model starts with the tokenizer's own words; then items get identifiers, which may need the model's
vision tower and may add tokens; last the embeddings grow to the tokenizer's new length.
"""

import logging
from dataclasses import dataclass

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    T5Config,
)
from transformers.utils import logging as hf_logging

from configuration.configuration_codebook_t5 import CodebookT5Config
from imagedex.errors import UserError
from imagedex.retrieval.identifier_schemes import VECTOR_SCHEMES, add_tokens, assign_identifiers
from imagedex.retrieval.loading import GENERATIVE
from imagedex.training.arguments import ModelArguments
from imagedex.training.dsi_arguments import IdentifierArguments, T5Arguments
from imagedex.training.dsi_rows import DSIRows
from imagedex.training.identifier_vectors import (
    choose_source,
    latent_semantic_vectors,
    vision_vectors,
    xmatching_vectors,
)
from imagedex.training.image_processor import build_image_processor, output_size
from imagedex.training.lexical_start import start_from_texts
from imagedex.training.tokenizer import train_tokenizer
from imagedex.training.towers import (
    build_tower_config,
    choose_image_processor,
    first_given,
    from_hub,
    tokenizer_fields,
)
from modeling.identifiers import Identifiers
from modeling.processing_picture_t5 import PictureT5Processor

logger = logging.getLogger(__name__)

WITH_PICTURES = ("codebook_t5", "vision_grounded_t5")
SOURCES = {"text": "latent semantic analysis of the texts", "vision": "the vision tower's mean states"}


def check_model(model: ModelArguments, t5: T5Arguments, indexing: bool = False) -> str:
    """Which model it is, before anything is read: it comes from exactly one place, and its parts fit its kind.

    Args: indexing, whether this is the script that teaches pictures alone. Raises `UserError`.
    """
    allowed = WITH_PICTURES if indexing else tuple(GENERATIVE)
    whole = "model_name_or_path" if model.model_name_or_path else "config_name"
    name = model.model_name_or_path or model.config_name
    if name:
        kind = from_hub(PreTrainedConfig.get_config_dict, name, whole)[0].get("model_type", "nameless")
        if kind not in allowed:
            raise UserError(f"--{whole} {name} is a {kind} model; this script trains {', '.join(allowed)}")
        if t5.model_type not in (None, kind):
            raise UserError(f"--{whole} {name} is a {kind} model, but --model_type says {t5.model_type}; leave it out")
    else:
        kind = t5.model_type
        if kind is None:
            raise UserError(f"no model: give --model_type ({', '.join(allowed)}) or --model_name_or_path")
        if kind not in allowed:
            raise UserError(f"--model_type {kind}: this script trains {', '.join(allowed)}")
    if model.image_processor_config:
        if model.image_processor_name:
            raise UserError("give --image_processor_name or --image_processor_config, not both")
        build_image_processor(model.image_processor_config)
    if kind == "vision_grounded_t5" and not indexing:
        check_second_step(model)
    _check_parts(model, t5, kind, whole if name else None)
    return kind


def check_second_step(model: ModelArguments) -> None:
    """Raises `UserError` when vision_grounded_t5 is to be taught captions before it has learned the pictures."""
    name = model.model_name_or_path
    if brought_identifiers(name) is None:
        raise UserError(
            "vision_grounded_t5 learns pictures first and captions second, and this is the second step: give "
            "--model_name_or_path the output folder of run_image_indexing.py"
            + (f" ({name} brings no identifiers)" if name else "")
        )


def _check_parts(model: ModelArguments, t5: T5Arguments, kind: str, whole: str | None) -> None:
    sides = {
        "T5": ("text_model_name_or_path", "t5_config"),
        "vision tower": ("vision_model_name_or_path", "vision_config"),
    }
    given = {name: getattr(t5, name, None) or getattr(model, name, None) for names in sides.values() for name in names}
    if kind == "t5":
        for name in sides.pop("vision tower"):
            if given[name]:
                raise UserError(
                    f"--{name}: a t5 reads no pictures; give --model_type codebook_t5 or vision_grounded_t5"
                )
    known = GENERATIVE[kind].config_class().to_dict().keys() - T5Config().to_dict().keys() if kind != "t5" else set()
    for name in t5.config_fields():
        if name not in known:
            raise UserError(f"--{name}: a {kind} has no such field")
    for side, names in sides.items():
        there = [name for name in names if given[name]]
        if whole and there:
            raise UserError(f"--{whole} brings its {side}, so --{there[0]} cannot be given with it")
        if not whole and len(there) != 1:
            raise UserError(
                f"{'both given for the' if there else 'no'} {side}: give --{names[0]} (pretrained) or --{names[1]} (from "
                "scratch)"
            )
    if t5.t5_start == "lexical" and (whole or not given["t5_config"]):
        raise UserError("--t5_start lexical is for a T5 from scratch; give --t5_config, or leave it out")
    if given["t5_config"]:
        if given["t5_config"]["model_type"] != "t5":
            raise UserError(f"--t5_config has model_type {given['t5_config']['model_type']}; it must be t5")
        build_tower_config(given["t5_config"], "t5_config")
    if given["vision_config"]:
        build_tower_config(given["vision_config"], "vision_config")
    for name in ("text_model_name_or_path", "vision_model_name_or_path"):
        if given[name]:
            found = from_hub(AutoConfig.from_pretrained, given[name], name).model_type
            if name.startswith("text") and found != "t5":
                raise UserError(f"--{name} {given[name]} is a {found} model; a t5 is needed")


def build_processor(model: ModelArguments, t5: T5Arguments, kind: str, image_size, texts, checkpoint: str | None):
    """Tokenizer, with an image processor beside it for the models that see pictures: those of the checkpoint that a run
    goes on from, those named, or a tokenizer trained on `texts` and plain resizing to `image_size`."""
    if checkpoint:
        found = "resume_from_checkpoint", checkpoint
    else:
        found = first_given(
            tokenizer_name=model.tokenizer_name,
            model_name_or_path=model.model_name_or_path,
            text_model_name_or_path=t5.text_model_name_or_path,
        )
    if found:
        tokenizer = from_hub(AutoTokenizer.from_pretrained, found[1], found[0])
    else:
        tokenizer = train_tokenizer(texts, model.tokenizer_vocab_size)
    if kind not in WITH_PICTURES:
        return tokenizer
    image_processor = choose_image_processor(model, checkpoint or model.model_name_or_path, image_size)
    return PictureT5Processor(image_processor=image_processor, tokenizer=tokenizer)


def tokenizer_of(processor):
    """The tokenizer, of a processor or itself."""
    return getattr(processor, "tokenizer", processor)


def image_processor_of(processor):
    """The image processor; None of a tokenizer."""
    return getattr(processor, "image_processor", None)


def build_model(model: ModelArguments, t5: T5Arguments, kind: str, processor):
    """The model in the sizes of the processor. Raises `UserError` for parts that do not fit each other."""
    model_class = GENERATIVE[kind]
    config_class = model_class.config_class
    tokenizer, fields = tokenizer_of(processor), t5.config_fields()
    sizes = tokenizer_fields(tokenizer) | {"decoder_start_token_id": tokenizer.pad_token_id}
    hf_logging.set_verbosity_error()  # the load report lists what is new on purpose
    try:
        if model.model_name_or_path:
            config = config_class.from_pretrained(model.model_name_or_path, **fields)
            return model_class.from_pretrained(model.model_name_or_path, config=config)
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
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())[:400]) from error
    finally:
        hf_logging.set_verbosity_warning()


def identify(
    rows: DSIRows, wanted: IdentifierArguments, model: ModelArguments, t5: T5Arguments, resumed: bool
) -> Identifiers:
    """The identifiers that the model (or, when the run is resumed, its checkpoint) brings, checked against the corpus; or new
    ones, and the model's embeddings grown to hold their tokens. Raises `UserError`."""
    tokenizer, identifiers = rows.collator.tokenizer, rows.identifiers
    if identifiers is not None:
        if not resumed:
            check_wanted(identifiers, wanted)
        try:
            identifiers.check_gallery(rows.splits.item_ids)
            identifiers.check_tokenizer(tokenizer)
        except ValueError as error:
            raise UserError(f"--model_name_or_path: {error}; give the corpus it was indexed with") from error
    else:
        identifiers = Assigner(wanted, rows, bool(model.model_name_or_path or model.vision_model_name_or_path))()
        resize_embeddings(rows.model, tokenizer, bool(model.model_name_or_path or t5.text_model_name_or_path))
        if t5.t5_start == "lexical":
            cleaned = rows.sentence_writer.cleaned
            texts = [cleaned(text) for text in rows.splits.item_texts()]
            pairs = [(cleaned(sentence), cleaned(rest)) for sentence, rest in rows.splits.known_pairs()]
            start_from_texts(rows.model, tokenizer, identifiers, texts, pairs, wanted.identifier_seed)
    rows.label(identifiers)
    return identifiers


def resize_embeddings(model, tokenizer, pretrained_words: bool) -> None:
    """Grows the word embeddings to the tokenizer's length. New words start as T5's do; beside pretrained words, as draws from
    their distribution."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        hf_logging.set_verbosity_error()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=pretrained_words)
        hf_logging.set_verbosity_warning()


def brought_identifiers(name_or_path: str | None) -> Identifiers | None:
    """The identifiers that a model brings; None where it has none. Raises `UserError` when they are broken."""
    if name_or_path is None:
        return None
    try:
        return Identifiers.from_pretrained(name_or_path)
    except OSError:
        return None
    except ValueError as error:
        raise UserError(f"--model_name_or_path {name_or_path}: {error}") from error


def check_wanted(identifiers: Identifiers, wanted: IdentifierArguments) -> None:
    """Raises `UserError` when other identifiers are asked for than those that the model brings."""
    if wanted.identifier_scheme not in (None, identifiers.scheme):
        raise UserError(
            f"--model_name_or_path brings {identifiers.scheme} identifiers, so --identifier_scheme "
            f"{wanted.identifier_scheme} cannot be given with it"
        )
    if wanted.identifier_vectors_from:
        raise UserError("--model_name_or_path brings its identifiers; leave --identifier_vectors_from out")


@dataclass
class Assigner:
    """Gives everything in the gallery new identifiers, and the tokenizer their tokens.

    Attributes:
        wanted: the scheme and its options.
        rows: of the run, with its corpus, model and arguments.
        trained_tower: whether the vision tower has learned to see before this run.
    """

    wanted: IdentifierArguments
    rows: DSIRows
    trained_tower: bool

    def __call__(self) -> Identifiers:
        """The main process makes them and sends them to the others, so that another machine's rounding cannot make others."""
        splits, args, tokenizer = self.rows.splits, self.rows.args, self.rows.collator.tokenizer
        sent: list = [None, None]
        if args.process_index == 0:
            try:
                vectors, source = self.vectors()
                options = self.wanted.options() | {"source": source}
                sent[0] = assign_identifiers(self.scheme, splits.item_ids, tokenizer, vectors, **options)
            except UserError as error:
                sent[1] = str(error)
        if args.world_size > 1:
            broadcast_object_list(sent)
        identifiers, problem = sent
        if problem:
            raise UserError(problem)
        add_tokens(tokenizer, sorted(identifiers.new_tokens, key=identifiers.new_tokens.get))
        identifiers.check_tokenizer(tokenizer)
        longest = identifiers.max_length
        logger.info("%s identifiers of %d %s, up to %d tokens", self.scheme, len(identifiers), splits.nouns[1], longest)
        return identifiers

    @property
    def scheme(self) -> str:
        return self.wanted.identifier_scheme or "atomic"

    def vectors(self) -> tuple[np.ndarray | None, dict]:
        """One vector an item, where the scheme needs them, and what to remember of where they come from."""
        wanted, rows = self.wanted, self.rows
        if self.scheme not in VECTOR_SCHEMES:
            if wanted.identifier_vectors_from:
                raise UserError(
                    f"--identifier_vectors_from: {self.scheme} identifiers use no vectors; take semantic or rq"
                )
            return None, {}
        if wanted.identifier_vectors_from:
            return xmatching_vectors(wanted.identifier_vectors_from, rows), {"vectors": "xmatching"}
        source = choose_source(wanted.identifier_vectors, rows.splits, self.trained_tower and rows.sees_pictures)
        logger.info("vectors for %s identifiers: %s", self.scheme, SOURCES[source])
        if source == "text":
            return latent_semantic_vectors(rows.splits.item_texts(), seed=wanted.identifier_seed), {"vectors": "text"}
        return vision_vectors(rows), {"vectors": "vision"}
