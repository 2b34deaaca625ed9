"""Asking a model that writes identifiers in plain sentences: it finds its processor and its identifiers by itself."""

import os
from collections.abc import Iterable

from transformers import AutoConfig

from .constrained_decoding import rank_identifiers
from .identifier_paths import Step, identifier_paths
from .identifiers import Identifiers
from .processing_retrieval import RetrievalProcessor
from .saved_files import hub_options

ROWS_AT_ONCE = 64  # sentences or pictures whose identifiers are searched together


class RetrieveMixin:
    """For a PreTrainedModel that writes identifiers.

    What belongs to the weights is read from where they came from, the same folder or commit, when it is first needed.
    """

    source: tuple[str, dict] | None = None  # name or absolute path, options of the Hub; None: made in this process
    processor: RetrievalProcessor | None = None
    identifiers: Identifiers | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers'; remembers where the model came from."""
        options = hub_options(kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        name = str(pretrained_model_name_or_path)
        if os.path.isdir(name):
            name = os.path.abspath(name)
        elif getattr(model.config, "_commit_hash", None):
            options["revision"] = model.config._commit_hash
        model.source = name, options
        return loaded

    def _source(self, what: str) -> tuple[str, dict]:
        if self.source is None:
            raise ValueError(
                f"this model was not loaded from anywhere, so it has no {what}: load it with from_pretrained"
            )
        return self.source

    def load_identifiers(self, name_or_path=None, **hub_kwargs) -> Identifiers:
        """The gallery's identifiers, from where the weights came from unless told otherwise."""
        if name_or_path is not None:
            return Identifiers.from_pretrained(name_or_path, **hub_kwargs)
        name, options = self._source("identifiers")
        return Identifiers.from_pretrained(name, **options | hub_kwargs)

    def load_processor(self) -> RetrievalProcessor:
        """How sentences and pictures are read, from where the weights came from."""
        name, options = self._source("processor")
        AutoConfig.register(self.config.model_type, type(self.config), exist_ok=True)  # AutoTokenizer asks for it
        return RetrievalProcessor.from_pretrained(name, trust_remote_code=False, **options)

    def retrieve(
        self,
        sentences: str | list[str] | None = None,
        *,
        images=None,
        identifiers: Identifiers | None = None,
        image_ids: Iterable[str] | None = None,
        num_beams: int = 10,
        k: int | None = None,
        over: str = "vocabulary",
    ) -> list[list[tuple[str, float]]]:
        """The best pictures for each sentence, or for each picture that is shown: (image_id, score) pairs, best first.

        Args:
            sentences: one, or several.
            images: instead of sentences, pictures of Pillow or their paths; one, or several.
            identifiers: those that can be found; by default those that came with the model.
            image_ids: the pictures among them that can be found, all without.
            num_beams: of the search. k: how many pairs, by default as many; fewer where fewer were found.
            over: "children" for a faster search by another score, see `rank_identifiers`.

        Returns: one list a sentence (or picture), also when there is one. The score is the identifier's log-probability in
        nats, see `rank_identifiers`.

        Raises: a `ValueError` for neither or both of sentences and images, and when the model was not loaded from anywhere; a
        `KeyError` for an image_id without an identifier.
        """
        if (sentences is None) == (images is None):
            raise ValueError("give sentences, or images=pictures, and not both")
        identifiers = self._ready(identifiers)
        if image_ids is not None:
            identifiers = identifiers.restricted(image_ids)
        asked = sentences if images is None else images
        asked = list(asked) if isinstance(asked, list | tuple) else [asked]
        found = []
        for start in range(0, len(asked), ROWS_AT_ONCE):
            rows = asked[start : start + ROWS_AT_ONCE]
            inputs = self._inputs(**{"text" if images is None else "images": rows})
            scores, places = rank_identifiers(self, identifiers, inputs, num_beams, k, over)
            for own_scores, own_rows in zip(scores.tolist(), places.tolist(), strict=True):
                pairs = zip(own_rows, own_scores, strict=True)
                found.append([(identifiers.image_ids[row], score) for row, score in pairs if row >= 0])
        return found

    def paths(self, sentence: str, image_ids: list[str], *, identifiers: Identifiers | None = None) -> list[list[Step]]:
        """How the identifiers of these pictures are written for a sentence, see `identifier_paths`."""
        identifiers = self._ready(identifiers)
        inputs = self._inputs(text=[sentence])
        return identifier_paths(self, identifiers, inputs, image_ids, self.processor.tokenizer)

    def _ready(self, identifiers: Identifiers | None) -> Identifiers:
        """The identifiers to search in, read from where the weights came from when they are first needed; the processor, too."""
        self.processor = self.processor or self.load_processor()
        if identifiers is None and self.identifiers is None:
            self.identifiers = self.load_identifiers()
        return identifiers or self.identifiers

    def _inputs(self, **texts_or_images) -> dict:
        weight = self.shared.weight
        inputs = self.processor(**texts_or_images, return_tensors="pt")
        return {
            name: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for name, v in inputs.items()
        }
