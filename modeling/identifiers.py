"""Identifiers: which token sequence names which picture (or document). They travel with the model that learned them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError
from transformers.utils import cached_file

from .identifier_quantizers import KMeansTree, ResidualQuantizer
from .identifier_trie import IdentifierTrie
from .saved_files import replace_file

SCHEMES = ("atomic", "naive", "semantic", "rq")
QUANTIZERS = {"semantic": KMeansTree, "rq": ResidualQuantizer}
TENSORS_FILE, FACTS_FILE = "identifiers.safetensors", "identifiers.json"
FORMAT_VERSION = 1


class Identifiers:
    """image_id <-> token sequence, for the pictures of one gallery.

    Args:
        scheme: "atomic", "naive", "semantic" or "rq".
        image_ids: (N,) names, in an order that stays: a picture's row is its place here.
        tokens: (sum of lengths,) integers, the sequences one after another, without end-of-sequence.
        offsets: (N + 1,) where each sequence starts, and the end.
        eos_token_id: ends every sequence.
        new_tokens: text -> id of the tokens that were added to the tokenizer for these identifiers.
        known_tokens: text -> id of the tokenizer's own tokens that they use (digits).
        quantizer: `KMeansTree` (semantic) or `ResidualQuantizer` (rq), which gives new pictures their codes.
        source: where they come from, JSON values only (seed, options, vectors, split).

    Attributes:
        trie: `IdentifierTrie` of all sequences, rows as here.

    Raises:
        ValueError: no picture, an image_id or a sequence that is there twice, an empty sequence, arrays that do not fit.
    """

    def __init__(
        self,
        scheme: str,
        image_ids: Sequence[str],
        tokens,
        offsets,
        eos_token_id: int,
        new_tokens: dict[str, int] | None = None,
        quantizer: KMeansTree | ResidualQuantizer | None = None,
        source: dict | None = None,
        known_tokens: dict[str, int] | None = None,
    ):
        self.scheme, self.image_ids, self.eos_token_id = scheme, list(image_ids), int(eos_token_id)
        self.tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        self.new_tokens, self.known_tokens = dict(new_tokens or {}), dict(known_tokens or {})
        self.quantizer, self.source = quantizer, dict(source or {})
        self._check()
        self.trie = IdentifierTrie.from_sequences(self.tokens, self.offsets, self.eos_token_id, self.image_ids)

    @classmethod
    def from_sequences(cls, scheme: str, image_ids, sequences, eos_token_id: int, **fields) -> "Identifiers":
        """The same from a list of token lists, without end-of-sequence."""
        lengths = [len(sequence) for sequence in sequences]
        tokens = np.fromiter((token for sequence in sequences for token in sequence), np.int32, sum(lengths))
        return cls(scheme, image_ids, tokens, np.cumsum([0, *lengths]), eos_token_id, **fields)

    def _check(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"identifier scheme {self.scheme!r} is none of {', '.join(SCHEMES)}")
        if not self.image_ids:
            raise ValueError("there are no pictures to give identifiers to")
        if len(self._row_of) != len(self.image_ids):
            seen = set()
            twice = next(name for name in self.image_ids if name in seen or seen.add(name))
            raise ValueError(f"the image_id {twice!r} is there twice; every picture is indexed once")
        lengths = np.diff(self.offsets)
        if len(lengths) != len(self.image_ids):
            raise ValueError(f"{len(lengths)} sequences for {len(self.image_ids)} pictures")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens) or (lengths < 0).any():
            raise ValueError("the offsets do not fit the tokens of the identifiers")
        if (lengths == 0).any():
            raise ValueError(f"the identifier of {self.image_ids[int(np.argmin(lengths))]!r} is empty")

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.image_ids)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image_id: row for row, image_id in enumerate(self.image_ids)}

    @property
    def max_length(self) -> int:
        """Tokens of the longest identifier, end-of-sequence included."""
        return int(np.diff(self.offsets).max()) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sorted image_ids: two sets of identifiers name the same gallery if and only if it agrees."""
        return names_fingerprint(self.image_ids)

    @property
    def added_image_ids(self) -> list[str]:
        """The pictures that were added after the quantizer was fitted, without training."""
        return self.image_ids[self.source.get("first_pictures", len(self)) :]

    def row(self, image_id: str) -> int:
        """The picture's row. Raises `KeyError` for a picture without an identifier."""
        try:
            return self._row_of[image_id]
        except KeyError:
            raise KeyError(f"{image_id!r} has no identifier here ({len(self)} other pictures have)") from None

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._row_of

    def sequence(self, image_id: str) -> list[int]:
        """The picture's tokens, without end-of-sequence. Raises `KeyError`."""
        row = self.row(image_id)
        return self.tokens[self.offsets[row] : self.offsets[row + 1]].tolist()

    def labels(self, image_id: str) -> list[int]:
        """The picture's tokens with end-of-sequence: what a decoder is trained to write. Raises `KeyError`."""
        return [*self.sequence(image_id), self.eos_token_id]

    def padded(self, rows=None, fill: int = -100) -> np.ndarray:
        """`labels` of these rows (all without) as one array (rows, max_length) int64, `fill` behind the end."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        columns = np.arange(self.max_length)
        places = np.minimum(starts[:, None] + columns, len(self.tokens) - 1)
        inside = np.where(columns < lengths[:, None], self.tokens[places], fill)
        return np.where(columns == lengths[:, None], self.eos_token_id, inside).astype(np.int64)

    def image_id_of(self, tokens: Sequence[int]) -> str | None:
        """Whose identifier this is, None when it is nobody's; what follows an end-of-sequence token is ignored."""
        node, edges = 0, self.trie.child_offsets
        for token in [*tokens, self.eos_token_id]:
            start, end = edges[node : node + 2].tolist()
            children = self.trie.child_tokens[start:end].numpy()
            place = int(np.searchsorted(children, token))
            if place == len(children) or children[place] != token:
                return None
            node = start + place + 1
            if token == self.eos_token_id:
                break
        return self.image_ids[int(self.trie.rows[node])]

    def check_tokenizer(self, tokenizer) -> None:
        """Raises `ValueError` when this tokenizer has another id for a token that the identifiers are made of."""
        if tokenizer.eos_token_id != self.eos_token_id:
            raise ValueError(
                f"the identifiers end with token {self.eos_token_id}, but this tokenizer's end-of-sequence token is "
                f"{tokenizer.eos_token_id}; use the tokenizer that was saved with them"
            )
        expected = self.known_tokens | self.new_tokens
        found = tokenizer.convert_tokens_to_ids(list(expected))
        for (text, token), other in zip(expected.items(), found, strict=True):
            if other != token:
                raise ValueError(
                    f"the identifiers use {text!r} as token {token}, but this tokenizer has {other} for it; use the "
                    "tokenizer that was saved with them"
                )

    def check_gallery(self, image_ids: Sequence[str]) -> None:
        """Raises `ValueError` when these are not exactly the pictures that have identifiers."""
        asked = set(image_ids)
        missing, extra = asked - self._row_of.keys(), self._row_of.keys() - asked
        if missing or extra:
            example = f"{min(missing)!r} has none" if missing else f"{min(extra)!r} is not in the gallery"
            raise ValueError(
                f"these identifiers belong to another gallery: {len(missing)} of its {len(asked)} pictures have no "
                f"identifier and {len(extra)} of the {len(self)} identifiers name no picture of it ({example})"
            )

    def restricted(self, image_ids: Iterable[str]) -> "Identifiers":
        """Those of these pictures alone, in the order they have here: a filter for a search. Scores over the vocabulary stay what
        they are. Raises: `KeyError` for a picture without an identifier, `ValueError` where no picture is given."""
        rows = np.unique(np.fromiter(map(self.row, image_ids), np.int64))
        if not len(rows):
            raise ValueError("there are no pictures to search among: no image_id is given")
        if len(rows) == len(self):
            return self
        lengths = np.diff(self.offsets)
        kept = np.zeros(len(self), dtype=bool)
        kept[rows] = True
        return Identifiers(
            self.scheme,
            [self.image_ids[row] for row in rows],
            self.tokens[np.repeat(kept, lengths)],
            np.concatenate([[0], np.cumsum(lengths[kept])]),
            self.eos_token_id,
            new_tokens=self.new_tokens,
            known_tokens=self.known_tokens,
            source=self.source,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes identifiers.safetensors and identifiers.json; the same identifiers give the same bytes.

        Each file appears whole or not at all, and the second one knows the first by its SHA-256, so that a pair of
        which only one was replaced is refused when it is read.
        """
        arrays = {"tokens": self.tokens, "offsets": self.offsets}
        if self.quantizer is not None:
            arrays |= self.quantizer.to_arrays()
        content = safetensors.numpy.save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
        facts = {
            "format_version": FORMAT_VERSION,
            "scheme": self.scheme,
            "eos_token_id": self.eos_token_id,
            "tensors_sha256": hashlib.sha256(content).hexdigest(),
            "gallery_sha256": self.fingerprint,
            "source": self.source,
            "known_tokens": self.known_tokens,
            "new_tokens": self.new_tokens,
            "image_ids": self.image_ids,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / TENSORS_FILE, content)
        replace_file(folder / FACTS_FILE, (json.dumps(facts, ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_kwargs) -> "Identifiers":
        """Reads what `save_pretrained` wrote, from a folder or a Hub model.

        Args:
            hub_kwargs: of `transformers.utils.cached_file` (revision, token, subfolder, ...).

        Raises:
            OSError: no such folder or Hub model, or no identifiers in it.
            ValueError: the files are broken, or not of one another.
        """
        facts_path = cached_file(str(name_or_path), FACTS_FILE, **hub_kwargs)
        tensors_path = cached_file(str(name_or_path), TENSORS_FILE, **hub_kwargs)
        content = Path(tensors_path).read_bytes()
        try:
            facts = json.loads(Path(facts_path).read_text(encoding="utf-8"))
            check_facts(facts)
            if facts["format_version"] > FORMAT_VERSION:
                raise ValueError(f"the identifiers in {name_or_path} were written by a newer version of this code")
            if facts["tensors_sha256"] != hashlib.sha256(content).hexdigest():
                raise ValueError(
                    f"{TENSORS_FILE} and {FACTS_FILE} in {name_or_path} are not of one another; save the identifiers again"
                )
            arrays = safetensors.numpy.load(content)
            quantizer = None
            if facts["scheme"] in QUANTIZERS and len(arrays) > 2:
                quantizer = QUANTIZERS[facts["scheme"]].from_arrays(arrays)
            fields = {name: facts[name] for name in ("source", "known_tokens", "new_tokens")}
            required = (facts["scheme"], facts["image_ids"], arrays["tokens"], arrays["offsets"], facts["eos_token_id"])
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            RecursionError,
            SafetensorError,
            KeyError,
            TypeError,
        ) as error:
            raise ValueError(
                f"the identifiers in {name_or_path} are broken ({type(error).__name__}: {error})"
            ) from error
        return cls(*required, quantizer=quantizer, **fields)


def check_facts(facts) -> None:
    """Raises a `TypeError` that names the first field of identifiers.json whose value is of another kind than was written."""
    kinds = {"format_version": int, "scheme": str, "eos_token_id": int, "tensors_sha256": str, "source": dict}
    kinds |= {"known_tokens": dict, "new_tokens": dict, "image_ids": list}
    if not isinstance(facts, dict):
        raise TypeError(f"no object but {type(facts).__name__}")
    for name, kind in kinds.items():
        if not isinstance(facts[name], kind):
            raise TypeError(f"{name} is {str(facts[name])[:50]}")
    for name, values in (
        ("known_tokens", facts["known_tokens"].values()),
        ("new_tokens", facts["new_tokens"].values()),
    ):
        if not all(isinstance(value, int) for value in values):
            raise TypeError(f"{name} has a token that is no number")
    if not all(isinstance(name, str) for name in facts["image_ids"]):
        raise TypeError("image_ids has a name that is no text")


def names_fingerprint(image_ids: Sequence[str]) -> str:
    """SHA-256 of the sorted image_ids, each with its length before it, so that no two galleries are written alike."""
    digest = hashlib.sha256()
    for image_id in sorted(image_ids):
        name = image_id.encode("utf-8", "surrogatepass")
        digest.update(f"{len(name)}:".encode() + name)
    return digest.hexdigest()
