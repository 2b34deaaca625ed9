"""Identifiers for pictures that a model was not trained on: nothing is trained.

semantic and rq: the quantizer stays as it was. Vectors must come from where those of the trained pictures came from. That is not
taken on trust: trained pictures are encoded again, and most of them have to get the code that they have.

atomic: a new picture gets a token, whose row is predicted from its vector as the trained pictures' rows can be from theirs
(`picture_rows.py`). Any vectors may be taken; how well they predict the rows of trained pictures that are left out is said.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from imagedex.encoding.dual_encoder import DualEncoder, load_dual_encoder
from imagedex.encoding.vectors import encode_images, picture_batches
from imagedex.errors import UserError
from imagedex.evaluation.baselines import mean_caption_vectors
from imagedex.identifiers.picture_rows import LEAST_KNOWN, predicted_rows
from imagedex.identifiers.schemes import VECTOR_SCHEMES, extend_identifiers
from imagedex.identifiers.vectors import mean_vision_states
from imagedex.modeling.identifiers import Identifiers
from imagedex.words import words

logger = logging.getLogger(__name__)

VECTORS_FLAG = "identifier_vectors_from"
MOST_CHECKED = 256  # trained pictures that are encoded again
LEAST_PREDICTED = 0.05  # mean cosine between trained rows and what is predicted of them; chance is 0
LEAST_AGREEMENT = 0.9  # share of them whose code must come out as it is; other encoders reach about 1 / codes


class Indexed(Protocol):
    """A model that writes identifiers, opened."""

    name: str
    model: torch.nn.Module
    processor: object
    identifiers: Identifiers


@dataclass
class NewPictures:
    """Adds what a gallery has beyond a model's identifiers.

    Attributes:
        vectors_from: folder of the XMatchingModel whose vectors the identifiers were made from; None: not given.
        vectors_of: "images", or "captions": what a new picture's vector is made from.
        gallery: rows of the schema; its `captions` hold only what may be used.
        asked: the queries, gone through whenever they are needed; a caption that is one of them is never used.
    """

    vectors_from: str | None
    vectors_of: str
    gallery: object
    asked: Iterable[str] = ()
    device: str | torch.device = "cpu"
    batch_size: int = 64
    num_workers: int = 0
    progress: bool = False

    def identifiers(self, parts: Indexed, missing: Sequence[str]) -> Identifiers:
        """Those of the model, and behind them those of the missing pictures.

        Raises:
            UserError: a scheme that cannot grow, vectors that cannot be had, or that are of another encoder.
        """
        identifiers = parts.identifiers
        if identifiers.scheme == "atomic":
            return self.with_predicted_rows(parts, missing)
        if identifiers.scheme not in VECTOR_SCHEMES:
            return extend_identifiers(identifiers, missing, None, parts.processor.tokenizer)  # says why it cannot
        encode, encoder = self.picture_encoder(parts)
        self.check(parts, encode)
        by_captions = self.vectors_of == "captions"
        vectors = self.caption_vectors(encoder, missing) if by_captions else encode(self.rows(missing))
        extended = extend_identifiers(identifiers, missing, vectors, parts.processor.tokenizer)
        logger.info(
            "%d pictures have got %s identifiers without training, beside the %d of %s",
            len(missing), identifiers.scheme, len(identifiers), parts.name,
        )  # fmt: skip
        return extended

    @torch.no_grad()
    def with_predicted_rows(self, parts: Indexed, missing: Sequence[str]) -> Identifiers:
        """Atomic identifiers of the missing pictures; the model and its tokenizer grow by their tokens. Raises `UserError`."""
        identifiers, model, tokenizer = parts.identifiers, parts.model, parts.processor.tokenizer
        encode, encoder = self.any_encoder(parts)
        known = self.trained(identifiers)
        if len(known) < LEAST_KNOWN:
            raise UserError(
                f"{parts.name} cannot be given new pictures: the gallery holds {len(known)} that it was trained on, and from "
                f"fewer than {LEAST_KNOWN} no other token can be predicted; give the trained pictures beside the new ones"
            )
        vectors = encode(self.rows(known))
        by_captions = self.vectors_of == "captions"
        new_vectors = self.caption_vectors(encoder, missing) if by_captions else encode(self.rows(missing))
        old = torch.tensor([identifiers.sequence(name)[0] for name in known])
        extended = extend_identifiers(identifiers, missing, None, tokenizer)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        new = torch.tensor([extended.sequence(name)[0] for name in missing])
        for weight in {id(part.weight): part.weight for part in (model.shared, model.get_output_embeddings())}.values():
            rows, agreement = predicted_rows(vectors, weight[old.to(weight.device)].float().cpu(), new_vectors)
            if agreement < LEAST_PREDICTED:
                raise UserError(
                    f"{parts.name} cannot be given new pictures: what these vectors say of the trained pictures' tokens "
                    f"agrees with them by {agreement:.2f} (0: not at all, 1: wholly); give another --{VECTORS_FLAG}, a folder "
                    "of run_xmatching.py"
                )
            weight[new.to(weight.device)] = rows.to(weight)
        logger.info(
            "%d pictures have got tokens without training, beside the %d of %s: rows are predicted from vectors, and those of "
            "trained pictures that are left out agree with the trained ones by %.2f",
            len(missing), len(identifiers), parts.name, agreement,
        )  # fmt: skip
        return extended

    def trained(self, identifiers: Identifiers) -> list[str]:
        """The pictures of the gallery that were trained, not added: those may have been made from captions, or guessed."""
        there, added = set(self.gallery["image_id"]), set(identifiers.added_image_ids)
        return [name for name in identifiers.image_ids if name in there and name not in added]

    def any_encoder(self, parts: Indexed):
        """As `picture_encoder`, for identifiers that were made from no vectors: the XMatchingModel that is named, or the model's
        own vision tower."""
        if self.vectors_from:
            return self.dual_encoder()
        if not hasattr(parts.model, "vision_model"):
            raise UserError(
                f"{parts.name} reads no pictures, so new ones get their identifiers from an XMatchingModel: give its folder "
                f"with --{VECTORS_FLAG}"
            )
        if self.vectors_of == "captions":
            raise UserError(f"--new_image_vectors captions needs --{VECTORS_FLAG}")
        return lambda rows: self.tower_vectors(parts, rows), None

    def picture_encoder(self, parts: Indexed):
        """(rows -> vectors (M, D), the dual encoder they come from or None). Raises `UserError`."""
        source = parts.identifiers.source.get("vectors")
        given = self.vectors_from
        if source == "text":
            raise UserError(
                f"{parts.name}: its identifiers were made from the words of the training captions, and a new picture has none "
                "there; train with --identifier_vectors_from an XMatchingModel or --identifier_vectors vision to be able to "
                "add pictures"
            )
        if source == "vision":
            if given or self.vectors_of == "captions":
                name = VECTORS_FLAG if given else "new_image_vectors captions"
                raise UserError(
                    f"--{name}: the identifiers of {parts.name} were made from its own vision tower, and new ones are too; "
                    "leave it out"
                )
            return lambda rows: self.tower_vectors(parts, rows), None
        if not given:
            raise UserError(
                f"{parts.name}: new pictures get identifiers from the vectors of the XMatchingModel that it was trained with; "
                f"give its folder with --{VECTORS_FLAG}"
            )
        return self.dual_encoder()

    def dual_encoder(self):
        """(rows -> vectors (M, D), the encoder) of the folder that is given."""
        encoder = load_dual_encoder(self.vectors_from, device=self.device, flag=VECTORS_FLAG)
        options = (self.batch_size, self.device, self.num_workers, self.progress)
        return lambda rows: encode_images(encoder.model, encoder.image_processor, rows, *options).numpy(), encoder

    def check(self, parts: Indexed, encode) -> None:
        """Raises `UserError` when trained pictures do not get the codes they have: the vectors are of another encoder."""
        identifiers, known = parts.identifiers, self.trained(parts.identifiers)
        known = known[:: -(-len(known) // MOST_CHECKED)] if known else []
        if not known:
            logger.warning("no trained picture is in the gallery, so the vectors of the new ones cannot be checked")
            return
        share = agreement(identifiers, known, encode(self.rows(known)))
        if share < LEAST_AGREEMENT:
            what = (
                "its vision tower has learned since the identifiers were made from it"
                if identifiers.source.get("vectors") == "vision"
                else f"--{VECTORS_FLAG} {self.vectors_from} is another model than at training"
            )
            raise UserError(
                f"{parts.name} cannot be given new pictures: only {share:.0%} of {len(known)} trained pictures get the code "
                f"that they have in it, so {what}, or the pictures have changed"
            )

    def caption_vectors(self, encoder: DualEncoder, image_ids: Sequence[str]) -> np.ndarray:
        """(M, D): the mean of the vectors of each picture's captions, of length 1. Raises `UserError`."""
        rows = self.rows(image_ids)
        every = {tuple(words(text)) for own in rows["captions"] for text in own}
        asked = {own for query in self.asked if (own := tuple(words(query))) in every}  # of a million queries, the few
        captions = [[text for text in own if tuple(words(text)) not in asked] for own in rows["captions"]]
        dropped = sum(map(len, rows["captions"])) - sum(map(len, captions))
        if dropped:
            logger.warning(
                "%d captions of new pictures are asked as queries, and are not used for their vectors", dropped
            )
        silent = [image_id for image_id, own in zip(image_ids, captions, strict=True) if not own]
        if silent:
            raise UserError(
                f"--new_image_vectors captions: {len(silent)} of {len(image_ids)} new pictures have no caption that may be "
                f"used, the first is {silent[0]!r}; give a --dataset_name with captions of them that are neither held out nor "
                "asked, or --new_image_vectors images"
            )
        options = {"device": self.device, "progress": self.progress}
        return mean_caption_vectors(encoder, captions, **options).numpy()

    def tower_vectors(self, parts: Indexed, rows) -> np.ndarray:
        """(M, width): the mean of the vision tower's states of each picture, as at training."""
        starts = range(0, len(rows), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(rows))) for start in starts]
        pixels = picture_batches(parts.processor.image_processor, rows, batches, self.num_workers)
        return mean_vision_states(parts.model, pixels, self.device, self.progress)

    def rows(self, image_ids: Collection[str]):
        """The gallery's rows of these pictures, in their order."""
        row_of = {image_id: row for row, image_id in enumerate(self.gallery["image_id"])}
        return self.gallery.select([row_of[image_id] for image_id in image_ids])


def agreement(identifiers: Identifiers, image_ids: Sequence[str], vectors) -> float:
    """The share of these pictures to whom the quantizer gives, from these vectors (M, D), the code in their identifier."""
    quantizer, vectors = identifiers.quantizer, torch.as_tensor(vectors).float()
    if quantizer is None or vectors.shape[1] != quantizer.width:
        return 0.0
    codes, same = quantizer.encode(vectors).tolist(), 0
    token_of = identifiers.known_tokens | identifiers.new_tokens
    if identifiers.scheme == "rq":
        for image_id, own in zip(image_ids, codes, strict=True):
            expected = [token_of[f"<code_{level}_{code}>"] for level, code in enumerate(own)]
            same += identifiers.sequence(image_id)[: len(own)] == expected
    else:
        digit_of = {token_of[text]: digit for digit, text in enumerate(identifiers.source["digits"])}
        for image_id, leaf in zip(image_ids, codes, strict=True):
            same += quantizer.leaf_of([digit_of[token] for token in identifiers.sequence(image_id)])[0] == leaf
    return same / len(codes)
