"""A model and a gallery to a `Retriever`, in two steps: what can be wrong is found first, then what takes long is done."""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from imagedex.checkpoints import MODEL_FLAG, read_model_type
from imagedex.encoding.dual_encoder import DualEncoder, load_dual_encoder
from imagedex.encoding.index import encode_gallery, open_index
from imagedex.errors import UserError
from imagedex.files import writing
from imagedex.gallery.gallery import VECTORS
from imagedex.identifiers.generative_model import (
    GenerativeModel,
    load_generative,
    without_identifier,
)
from imagedex.identifiers.new_pictures import VECTORS_FLAG, NewPictures
from imagedex.modeling import GENERATIVE
from imagedex.modeling.identifiers import Identifiers
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments
from imagedex.retrieval.comparison import model_labels
from imagedex.retrieval.generative import GenerativeRetriever
from imagedex.retrieval.kept_gallery import KeptGallery
from imagedex.retrieval.rerank import RerankedRetriever
from imagedex.retrieval.retriever import Retriever, VectorRetriever

logger = logging.getLogger(__name__)

RERANK_FLAG = "rerank_with"


@dataclass
class Opened:
    """A model that is known to be good.

    Attributes:
        start: encodes and writes what it has to, and gives the retriever.
        facts: of a generative model its identifier scheme ("identifiers") and beams ("num_beams"), to be kept with figures.
        new_image_ids: pictures of the gallery that have an identifier without training.
        kept: (model, folder of its index or None), for what is needed on disk.
    """

    start: Callable[[], Retriever]
    facts: dict = field(default_factory=dict)
    new_image_ids: set[str] = field(default_factory=set)
    kept: list[tuple[str, Path | None]] = field(default_factory=list)


def check_kinds(names: Sequence[str], generative: GenerativeArguments) -> None:
    """Raises `UserError` for a name that is no model, and for arguments that no model here can heed."""
    kinds = {name: read_model_type(name) for name in names}
    if generative.active and not any(kind in GENERATIVE for kind in kinds.values()):
        name, kind = next(iter(kinds.items()))
        raise UserError(
            f"--{generative.active[0]} is for models that write identifiers ({', '.join(GENERATIVE)}); {name} is a {kind} "
            "model, so leave it out"
        )
    for flag in (RERANK_FLAG, VECTORS_FLAG):
        name = getattr(generative, flag)
        if name and (kind := read_model_type(name, flag)) in GENERATIVE:
            raise UserError(f"--{flag} {name} is a {kind} model; give an XMatchingModel or another dual encoder")


def save_extended(parts: GenerativeModel, identifiers: Identifiers, folder: Path) -> None:
    """The identifiers with those of new pictures, to be laid beside the model; where they have tokens of their own (atomic), the
    whole model, which has grown by these."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if identifiers.scheme == "atomic":
            parts.model.save_pretrained(folder)
            parts.processor.save_pretrained(folder)
        identifiers.save_pretrained(folder)


class Opener:
    """Opens models over one gallery.

    Args:
        gallery: rows of the schema; of documents without `image`.
        queries: the sentences that will be asked, which can be gone through as often as wanted.
        kept: the gallery on disk that the rows are of, if they are of one.
    """

    def __init__(
        self, args: RetrievalArguments, generative: GenerativeArguments, gallery, queries: Iterable[str],
        device: str | torch.device, output_dir: Path, kept: KeptGallery | None = None,
    ):  # fmt: skip
        self.args, self.generative, self.gallery, self.queries = args, generative, gallery, queries
        self.device, self.output_dir, self.kept = device, output_dir, kept
        self.reranker: Callable[[], VectorRetriever] | None = None

    def open(self, label: str, name: str, folder: Path) -> Opened:
        """Loads and checks a model. Writes nothing.

        Args: label, its name for people; folder, where what belongs to it is kept. Raises `UserError`.
        """
        if read_model_type(name) in GENERATIVE:
            return self.identifiers(label, name, folder)
        start, index_dir = self.vectors(label, name, folder / "index")
        return Opened(start, kept=[(name, index_dir)])

    def vectors(
        self, label: str, name: str, index_dir: Path, flag: str = MODEL_FLAG
    ) -> tuple[Callable[[], VectorRetriever], Path]:
        """A dual encoder over the gallery, and where the vectors lie: in `index_dir`, or with the gallery that has them."""
        if "image" not in self.gallery.column_names:
            raise UserError(
                f"--{flag} {name} finds pictures, but --dataset_name {self.args.dataset_name} holds documents; give a t5"
            )
        encoder = load_dual_encoder(name, self.args.trust_remote_code, self.device, flag)
        bank = encoder.bank if self.args.hub_bias else None
        vectors_of, index_dir = self.encoded(encoder, index_dir)

        def start() -> VectorRetriever:
            vectors, bias = vectors_of()
            return VectorRetriever(
                label,
                self.gallery["image_id"],
                vectors,
                encoder.model,
                encoder.tokenizer,
                bias if bank else None,
                device=self.device,
                text_kwargs=encoder.text_kwargs,
            )

        return start, index_dir

    def encoded(self, encoder: DualEncoder, index_dir: Path) -> tuple[Callable[[], tuple], Path]:
        """What gives the vectors and biases of the gallery, and where they lie."""
        if self.kept is not None and self.kept.is_of(encoder):
            return self.kept.vectors, self.kept.folder / VECTORS
        if self.kept is not None:
            logger.warning("%s has no vectors of %s: its pictures are encoded", self.kept.folder, encoder.name)
        model, image_processor, bank = encoder.model, encoder.image_processor, encoder.bank
        store = open_index(index_dir, model, image_processor, bank)
        args, options = self.args, {"device": self.device, "progress": True}
        options |= {"batch_size": args.batch_size, "num_workers": args.num_workers}
        return lambda: encode_gallery(store, model, image_processor, self.gallery, bank, **options), index_dir

    def identifiers(self, label: str, name: str, folder: Path) -> Opened:
        """A generative model over those pictures of the gallery that have an identifier."""
        generative, image_ids = self.generative, self.gallery["image_id"][:]
        parts = load_generative(name, self.device)
        noun = "pictures" if "image" in self.gallery.column_names else "documents"
        known, shown = parts.identifiers, f"--{MODEL_FLAG} {name}"
        missing = without_identifier(shown, known, image_ids, generative.add_new_images, noun)
        if missing:
            known = self.adder().identifiers(parts, missing)
        elif generative.add_new_images:
            logger.warning("--add_new_images: every one of the %d %s has an identifier already", len(image_ids), noun)
        searched = known.restricted(image_ids)
        if len(searched) < len(known):
            there = len(searched), len(known), noun
            logger.info(
                "%s: the gallery holds %d of the %d %s that have identifiers; only these are found", label, *there
            )
        beams = generative.beams(self.args.top_k)
        if beams < self.args.top_k:
            logger.warning("%d beams find at most %d %s, fewer than --top_k %d", beams, beams, noun, self.args.top_k)
        rerank = self.open_reranker() if generative.rerank_with else None

        def start() -> Retriever:
            if missing:
                save_extended(parts, known, folder)
            needed = min(beams, len(searched))  # so many find everything there is
            found = GenerativeRetriever(label, parts, searched, needed, self.args.batch_size)
            return found if rerank is None else RerankedRetriever(found, rerank())

        kept = [(name, None)]
        if rerank is not None:
            kept.append((generative.rerank_with, self.rerank_index))
        facts = {"identifiers": known.scheme, "num_beams": beams}
        return Opened(start, facts, set(known.added_image_ids) & set(image_ids), kept)

    def adder(self) -> NewPictures:
        args = self.args
        if "image" not in self.gallery.column_names:
            raise UserError("--add_new_images is for pictures; a new document needs training")
        where = self.device, args.batch_size, args.num_workers
        wanted = self.generative.identifier_vectors_from, self.generative.new_image_vectors
        return NewPictures(*wanted, self.gallery, self.queries, *where, progress=True)

    @property
    def rerank_index(self) -> Path:
        return self.output_dir / "rerank_index"

    def open_reranker(self) -> Callable[[], VectorRetriever]:
        """The dual encoder of --rerank_with, loaded and encoded once for all models."""
        if self.reranker is None:
            name = self.generative.rerank_with
            start, _ = self.vectors(next(iter(model_labels([name]))), name, self.rerank_index, RERANK_FLAG)
            self.reranker = functools.cache(start)
        return self.reranker
