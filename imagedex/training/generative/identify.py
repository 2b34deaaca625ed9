"""Which identifiers a run works with: those that its model brings, or new ones."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from imagedex.errors import UserError
from imagedex.identifiers.schemes import VECTOR_SCHEMES, add_tokens, assign_identifiers
from imagedex.identifiers.vectors import choose_source, latent_semantic_vectors, xmatching_vectors
from imagedex.modeling.identifiers import FACTS_FILE, TENSORS_FILE, Identifiers
from imagedex.training.generative.arguments import IdentifierArguments
from imagedex.training.generative.rows import ItemInputs

logger = logging.getLogger(__name__)

SOURCES = {"text": "latent semantic analysis of the texts", "vision": "the vision tower's mean states"}


def brought_identifiers(name_or_path: str | None) -> Identifiers | None:
    """The identifiers that a model brings; None where it has none. Raises `UserError` when they are broken, or half of them is
    missing."""
    if name_or_path is None:
        return None
    there = [name for name in (FACTS_FILE, TENSORS_FILE) if (Path(name_or_path).expanduser() / name).is_file()]
    if len(there) == 1:
        missing = TENSORS_FILE if there == [FACTS_FILE] else FACTS_FILE
        raise UserError(
            f"--model_name_or_path {name_or_path} has {there[0]} but no {missing}: its identifiers are not whole; copy both files"
        )
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
    for name in ("identifier_vectors_from", "identifier_rows"):
        if getattr(wanted, name):
            raise UserError(f"--model_name_or_path brings its identifiers; leave --{name} out")


def check_rows(wanted: IdentifierArguments, knows_words: bool) -> None:
    """Raises `UserError` when it is said where tokens start beside pretrained words, and T5 starts from scratch."""
    if wanted.identifier_rows and not knows_words:
        raise UserError(
            f"--identifier_rows {wanted.identifier_rows} is for a pretrained T5; one from scratch has --t5_start, so leave it out"
        )


def check_brought(identifiers: Identifiers, item_ids: Sequence[str], tokenizer) -> None:
    """Raises `UserError` when the identifiers that a model brings are not those of this gallery and tokenizer."""
    try:
        identifiers.check_gallery(item_ids)
        identifiers.check_tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"--model_name_or_path: {error}; give the corpus it was indexed with") from error


@dataclass
class Assigner:
    """Gives everything in the gallery new identifiers, and the tokenizer their tokens.

    Attributes:
        wanted: the scheme and its options.
        items: of the run, with its corpus, model and arguments.
        trained_tower: whether the vision tower has learned to see before this run.
    """

    wanted: IdentifierArguments
    items: ItemInputs
    trained_tower: bool

    def __call__(self) -> Identifiers:
        """The main process makes them and sends them to the others, so that another machine's rounding cannot make others."""
        splits, args, tokenizer = self.items.splits, self.items.args, self.items.processor.tokenizer
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
        wanted, items, splits = self.wanted, self.items, self.items.splits
        if self.scheme not in VECTOR_SCHEMES:
            if wanted.identifier_vectors_from:
                raise UserError(
                    f"--identifier_vectors_from: {self.scheme} identifiers use no vectors; take semantic or rq"
                )
            return None, {}
        args = items.args
        size, workers, progress = args.per_device_eval_batch_size, args.dataloader_num_workers, not args.disable_tqdm
        if wanted.identifier_vectors_from:
            options = dataclasses.asdict(items.data), size, args.device, workers, progress
            return xmatching_vectors(wanted.identifier_vectors_from, splits, *options), {"vectors": "xmatching"}
        source = choose_source(wanted.identifier_vectors, splits, self.trained_tower and items.sees_pictures)
        logger.info("vectors for %s identifiers: %s", self.scheme, SOURCES[source])
        if source == "text":
            return latent_semantic_vectors(splits.item_texts(), seed=wanted.identifier_seed), {"vectors": "text"}
        return items.picture_vectors(), {"vectors": "vision"}
