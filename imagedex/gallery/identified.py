"""A gallery asked with a model that writes identifiers: the pictures and what is known of them, and no vectors.

Such a model names the pictures that it learned, by their image_id. So it can be put to any gallery of them, a dual encoder's too,
and finds those that it knows and that are there; a filter cuts the trie down before the search.
"""

import functools
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from imagedex.bounds import MOST_BEAMS
from imagedex.checkpoints import choose_device, read_model_type
from imagedex.errors import UserError
from imagedex.gallery import catalog, filters, looked
from imagedex.gallery.gallery import Found, Gallery
from imagedex.gallery.model import GalleryModel
from imagedex.gallery.pictures import readable_picture
from imagedex.gallery.query import Part, read_parts
from imagedex.identifiers.generative_model import GenerativeModel, load_generative, without_identifier
from imagedex.modeling import GENERATIVE
from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifier_paths import Step, identifier_paths
from imagedex.modeling.identifiers import Identifiers

logger = logging.getLogger(__name__)

FLAG = "model"
LEAST_BEAMS = 10


def writes_identifiers(model: GalleryModel) -> bool:
    """Whether that is such a model: known from the gallery, if it is the gallery's own. Raises `UserError`: it is none at all."""
    if model.header and model.header.model == model.name:
        return not model.header.maker
    return read_model_type(model.name, FLAG) in GENERATIVE


class IdentifierModel(GalleryModel):
    maker: dict[str, str] = {}  # it makes nothing that a gallery keeps
    files: list = []

    @functools.cached_property
    def parts(self) -> GenerativeModel:
        """On its device. Raises `UserError`."""
        return load_generative(self.name, choose_device(self.device), FLAG)

    def read(self, part: Part) -> dict[str, torch.Tensor]:
        """A sentence or a picture as the model's inputs. Raises `UserError` for a picture that it, or anybody, cannot read."""
        parts, weight = self.parts, self.parts.model.shared.weight
        if part.path or part.picture is not None:
            if not hasattr(parts.processor, "image_processor"):
                raise UserError(f"{self.name} reads sentences alone; ask with one, or take a model that reads pictures")
            inputs = parts.processor(images=[readable_picture(part.picture or part.path)], return_tensors="pt")
        else:
            inputs = parts.processor(text=[part.text], return_tensors="pt")
        return {n: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for n, v in inputs.items()}

    def paths(self, sentence: str, image_ids: Sequence[str]) -> list[list[Step]]:
        """How the identifiers of these pictures are written, see `identifier_paths`."""
        parts, inputs = self.parts, self.read(Part(text=sentence))
        return identifier_paths(parts.model, parts.identifiers, inputs, image_ids, parts.processor.tokenizer)


class IdentifierGallery(Gallery):
    model: IdentifierModel
    _said: Sequence[str] = ()  # the pictures without an identifier that the log knows of

    def add(self, *sources, **options):
        """As a gallery's, but for the vectors. Raises `UserError` where none of the pictures is one that the model learned."""
        self._require_own()
        return super().add(*sources, **options)

    def remove(self, image_ids: Sequence[str] = (), where: str | None = None) -> list[str]:
        self._require_own()
        return super().remove(image_ids, where)

    def _check_parts(self) -> None:
        """The catalog is all there is to change."""

    def _require_own(self) -> None:
        known = catalog.read(self.folder)
        if known and known[0].maker:
            raise UserError(
                f"{self.folder} holds vectors of {known[0].model}; change its pictures with that model (leave --model out)"
            )

    def _encode(self, table: pa.Table, *_) -> pa.Table:
        self._known(table.filter(pa.compute.equal(table["unreadable"], "")))
        return table

    def _commit(self, table: pa.Table, header: catalog.Header, *_) -> None:
        catalog.write(self.folder, header, table)
        self.header, self.table, self._searched = header, table, None
        looked.clear(self.folder)

    def _known(self, table: pa.Table) -> pa.Table:
        """The pictures that the model knows; the others are counted in the log. Raises `UserError` where there are none."""
        image_ids, known = table["image_id"].to_pylist(), self.model.parts.identifiers
        missing = without_identifier(self.model.name, known, image_ids, may_add=True) if image_ids else []
        if missing and missing != self._said:
            logger.warning(
                "%d of %d pictures have no identifier in %s and are not found, the first is %s; run_retrieval.py "
                "--add_new_images gives them one without training",
                len(missing), len(image_ids), self.model.name, missing[0],
            )  # fmt: skip
        self._said = missing
        return table.filter(pa.array([image_id in known for image_id in image_ids], pa.bool_()))

    def __len__(self) -> int:
        return len(self._searchable()[0])

    def _searchable(self) -> tuple[pa.Table, Identifiers | None]:
        """What can be found: rows of the catalog, and their identifiers."""
        if self._searched is None:
            table = self._known(self.table.take(pa.array(self.readable))).combine_chunks()
            known = self.model.parts.identifiers
            self._searched = table, known.restricted(table["image_id"].to_pylist()) if len(table) else None
        return self._searched

    def search(
        self, *parts: str | Part, top_k: int = 10, where: str | None = None, keep: float | None = None
    ) -> list[Found]:
        """As a gallery's, of one sentence or one picture; a score is the identifier's log-probability in nats."""
        if top_k < 1:
            raise UserError(f"top_k {top_k}: must be 1 or more")
        if keep is not None:
            raise UserError(f"--keep: {self.model.name} writes identifiers and keeps no cut-off; leave it out")
        read = read_parts(parts)
        if len(read) > 1:
            raise UserError(
                f"{self.model.name} writes identifiers: ask with one sentence or one picture, not with several"
            )
        table, identifiers = self._searchable()
        if where is not None:
            kept = filters.allowed(table.drop_columns(list(self.hidden)), where)
            table = table.filter(pa.array(kept))
            identifiers = identifiers.restricted(table["image_id"].to_pylist()) if len(table) else None
        if identifiers is None:
            return []
        row_of = {image_id: row for row, image_id in enumerate(table["image_id"].to_pylist())}
        found = self._written(identifiers, self.model.read(read[0]), min(top_k, len(identifiers)))
        return self._found(table, [(row_of[image_id], score) for image_id, score in found])

    def _written(self, identifiers: Identifiers, inputs: dict, top_k: int) -> list[tuple[str, float]]:
        if top_k > MOST_BEAMS:
            raise UserError(f"top_k {top_k}: a model that writes identifiers finds at most {MOST_BEAMS} pictures")
        try:
            scores, rows = rank_identifiers(self.model.parts.model, identifiers, inputs, max(LEAST_BEAMS, top_k), top_k)
        except FloatingPointError as error:
            raise UserError(f"{self.model.name}: {error}") from error
        pairs = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
        return [(identifiers.image_ids[row], score) for row, score in pairs if row >= 0]

    # what only vectors have

    def query_vector(self, parts: Sequence[str | Part]) -> np.ndarray:
        raise self._has_no_vectors()

    def search_vectors(self, *_, **__):
        raise self._has_no_vectors()

    def export(self, *_, **__):
        raise self._has_no_vectors()

    def _has_no_vectors(self) -> UserError:
        return UserError(
            f"{self.model.name} writes identifiers and has no vectors; take a dual encoder, or read {self.folder / catalog.FILE}"
        )
