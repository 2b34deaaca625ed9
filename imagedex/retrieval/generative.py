"""Models that write identifiers: opened with those they learned, and asked for pictures."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from imagedex.checkpoints import (
    MODEL_FLAG,
    check_tokenizer,
    dtype_on,
    loading,
    one_line,
    read_model_type,
    require_whole,
    source_of,
    take_style,
)
from imagedex.encoding.store import weights_fingerprint
from imagedex.encoding.vectors import UNKNOWN, count_unknown
from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking, short_float
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_list
from imagedex.modeling import GENERATIVE
from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.retrieval.retriever import Retriever, tokenizer_settings

logger = logging.getLogger(__name__)

BEAMS_AT_ONCE = 1024  # decoder rows of one batch


@dataclass
class GenerativeModel:
    """A model that writes identifiers, and what it needs to be asked.

    Attributes:
        name: as the user named it.
        model: T5ForConditionalGeneration, CodebookT5 or VisionGroundedT5.
        processor: `RetrievalProcessor`; of a T5, which reads no pictures, `SentenceProcessor`.
        identifiers: of the pictures (or documents) it learned.
    """

    name: str
    model: torch.nn.Module
    processor: SentenceProcessor
    identifiers: Identifiers


def load_generative(name_or_path: str, device="cpu") -> GenerativeModel:
    """Loads a T5, CodebookT5 or VisionGroundedT5 with the identifiers it learned, by this repository's code.

    Args: device, see `load_dual_encoder`.

    Raises:
        UserError: the model cannot be loaded, is of another type (named), brings no identifiers or no tokenizer, or its
            identifiers are not made of its tokens.
    """
    model_type, shown = read_model_type(name_or_path), f"--{MODEL_FLAG} {name_or_path}"
    source = source_of(name_or_path)
    if model_type not in GENERATIVE:
        raise UserError(f"{shown} is a {model_type} model, which writes no identifiers")
    identifiers = load_identifiers(name_or_path)
    with loading(f"the processor of {shown}"):
        processor = (SentenceProcessor if model_type == "t5" else RetrievalProcessor).from_pretrained(source)
        check_tokenizer(processor.tokenizer, shown)
        for name, value in take_style(identifiers).items():
            setattr(processor, name, value)
    with loading(f"the model of {shown}"):
        options = {"dtype": dtype_on(device), "output_loading_info": True}
        model, report = GENERATIVE[model_type].from_pretrained(source, **options)
    require_whole(report, model_type, shown)
    try:
        identifiers.check_tokenizer(processor.tokenizer)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from error
    if identifiers.trie.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{shown}: its identifiers use token {identifiers.trie.vocab_size - 1}, but it has only "
            f"{model.config.vocab_size} tokens; the identifiers are those of another model"
        )
    return GenerativeModel(name_or_path, model.to(device).eval(), processor, identifiers)


def load_identifiers(name_or_path: str) -> Identifiers:
    """The identifiers that a generative model brings. Raises `UserError`: there are none, or they are broken."""
    try:
        return Identifiers.from_pretrained(source_of(name_or_path))
    except OSError as error:
        raise UserError(
            f"--{MODEL_FLAG} {name_or_path} brings no identifiers.json, so it can name no picture; give the output folder "
            "of run_dsi.py"
        ) from error
    except ValueError as error:
        raise UserError(f"--{MODEL_FLAG} {name_or_path}: {one_line(error)}") from error


class GenerativeRetriever(Retriever):
    """A generative model over the pictures that have identifiers.

    Args:
        parts: the model and its tokenizer.
        identifiers: those that can be written, `parts.identifiers` or some of them or more.
        num_beams: of the search; no more pictures than that are found, and a right picture that is not among them has no rank.
        batch_size: queries at once, fewer where there are many beams.
    """

    queries_at_once = 256  # slower than vectors: a run that is killed loses no more than seconds

    def __init__(
        self,
        name: str,
        parts: GenerativeModel,
        identifiers: Identifiers | None = None,
        num_beams: int = 10,
        batch_size: int = 64,
    ):
        self.identifiers = parts.identifiers if identifiers is None else identifiers
        super().__init__(name, self.identifiers.image_ids)
        self.parts, self.num_beams = parts, num_beams
        self.batch_size = max(1, min(batch_size, BEAMS_AT_ONCE // num_beams))
        self.asked = self.cut = self.unknown = 0

    def fingerprint(self) -> str:
        own, parts = self.identifiers, self.parts
        sequences = torch.from_numpy(own.tokens), torch.from_numpy(own.offsets)
        settings = tokenizer_settings(parts.processor), own.image_ids, sequences, own.eos_token_id, self.num_beams
        return weights_fingerprint(parts.model, *settings)

    def remarks(self) -> list[str]:
        limit = self.parts.processor.max_text_length
        cut = [f"{self.cut} of {self.asked} sentences are longer than {limit} tokens and were cut"] if self.cut else []
        return cut + ([UNKNOWN % (self.unknown, self.asked)] if self.unknown else [])

    def written(self, queries: Sequence[str]) -> list[dict]:
        """One {"input_ids", "attention_mask"} a query; those that are cut are counted."""
        tokens, cut = self.parts.processor.tokens(queries)
        self.asked, self.cut = self.asked + len(queries), self.cut + sum(cut)
        self.unknown += count_unknown(self.parts.processor.tokenizer, tokens["input_ids"])
        pairs = zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]

    def candidates(self, queries: Sequence[str]) -> list[Ranking]:
        """Everything that each query's beams found, best first; scores are log-probabilities in nats. Raises `UserError`: the
        model's weights are NaN."""
        model, processor = self.parts.model, self.parts.processor
        rows = self.written(queries)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
        rankings: list[Ranking] = [Ranking(query, [], []) for query in queries]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = processor.tokenizer.pad([rows[row] for row in batch], return_tensors="pt").to(model.device)
            try:
                scores, found = rank_identifiers(model, self.identifiers, dict(inputs), self.num_beams)
            except FloatingPointError as error:
                raise UserError(f"{self.name}: {error}") from error
            for row, own_scores, own_rows in zip(batch, scores.tolist(), found.tolist(), strict=True):
                images = [self.image_ids[place] for place in own_rows if place >= 0]
                rankings[row].images = images
                rankings[row].scores = [short_float(score) for score in own_scores[: len(images)]]
        return rankings

    def search(self, queries: Sequence[str], k: int, targets: Sequence[Sequence[str]] | None = None) -> list[Ranking]:
        return judged(self.candidates(queries), k, targets)


def judged(rankings: list[Ranking], k: int, targets: Sequence[Sequence[str]] | None) -> list[Ranking]:
    """Ranks from the whole lists, which are then cut to the k best."""
    for place, ranking in enumerate(rankings):
        if targets is not None:
            ranking.targets = list(targets[place])
            ranking.rank = rank_from_list(ranking.images, ranking.targets, ranking.scores)
        ranking.images, ranking.scores = ranking.images[:k], ranking.scores[:k]
    return rankings


def without_identifier(
    shown: str, identifiers: Identifiers, image_ids: Sequence[str], may_add: bool, noun: str = "pictures"
) -> list[str]:
    """The gallery's pictures that have no identifier yet, in its order.

    Args: shown, the model as the message names it; may_add, whether they are to get one (else they are refused).

    Raises:
        UserError: there are some and they may not be added, or the gallery has nothing in common with the identifiers.
    """
    missing = [image_id for image_id in image_ids if image_id not in identifiers]
    if len(missing) == len(image_ids):
        raise UserError(
            f"{shown} has identifiers of {len(identifiers)} {noun}, and not one of the {len(image_ids)} in the gallery is "
            f"among them (theirs are named like {identifiers.image_ids[0]!r}, the gallery's like {missing[0]!r}); give the "
            "gallery it was trained on, from the same root"
        )
    if missing and not may_add:
        raise UserError(
            f"{shown} has identifiers of {len(identifiers)} {noun}, but {len(missing)} of the {len(image_ids)} in the gallery "
            f"have none, the first is {missing[0]!r}; give the gallery it was trained on, train with these too, or add them "
            "with --add_new_images"
        )
    return missing
