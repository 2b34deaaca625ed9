"""Who is trained on, who can be found, who is asked: the same answer in every script, on every machine.

Membership is a hash of ``split_seed`` and ``image_id``; it depends neither on the order of the rows nor on the other
rows, so a picture that is held out for the dual encoder is held out for the generative models too, and stays held out
when the corpus grows.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from imagedex.corpora.schema import COLUMNS, Corpus, counted
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

GALLERY_CHOICES = ("all", "held_out")
_FLAT = Features({"image_row": Value("int64"), "image_id": Value("string"), "caption": Value("string")})


@dataclass
class RetrievalSplits:
    """The three roles of a retrieval experiment; all with the columns of the schema, one row a picture.

    Attributes:
        train: the pictures that have a trained caption, with only their trained captions.
        gallery: every picture that can be found in evaluation. Its captions are the trained ones only (none for a
            picture that was held out), so that an index over gallery captions never holds a query.
        evaluation: the queries: captions asked for, of pictures that are all in ``gallery``. None: nothing held out.
        other_galleries: what else they are searched in. Where whole pictures are held out, the one that is not ``gallery``:
            ``"new"``, the held-out pictures alone, or ``"whole"``, these and the trained ones.
    """

    train: Dataset
    gallery: Dataset
    evaluation: Dataset | None
    other_galleries: dict[str, Dataset] = field(default_factory=dict)

    def galleries(self) -> tuple[Dataset, dict[str, np.ndarray]]:
        """(every picture that can be found, how figures begin -> the rows of it that are searched); ``gallery`` first, as
        "", then the others, as ``new_`` or ``whole_``."""
        named = {"": self.gallery} | {f"{name}_": rows for name, rows in self.other_galleries.items()}
        pictures = max(named.values(), key=len)
        return pictures, {prefix: gallery_rows(pictures, rows["image_id"][:]) for prefix, rows in named.items()}


def hash_fraction(*parts: object) -> float:
    """A number in [0, 1) that looks random and is the same everywhere: blake2b of the parts joined by ``/``."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)  # 53 bits: exact as a float, never rounded up to 1.0


def held_out_positions(image_id: str, n_captions: int, n_held_out: int, split_seed: int) -> list[int]:
    """Which of a picture's captions are evaluated: ``n_held_out`` of them, but at least one stays for training."""
    order = sorted(range(n_captions), key=lambda position: hash_fraction(split_seed, image_id, position))
    return sorted(order[: max(0, min(n_held_out, n_captions - 1))])


def split_corpus(
    corpus: Corpus,
    *,
    held_out_captions_per_image: int = 0,
    held_out_images: float = 0.0,
    split_seed: int = 0,
    eval_gallery: str = "all",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    eval_split: str | None = None,
) -> RetrievalSplits:
    """Splits a corpus into what is trained, what can be found and what is asked.

    Args:
        held_out_captions_per_image: captions of each picture kept for evaluation; all pictures stay trained.
        held_out_images: fraction, in (0, 1), of pictures none of whose captions is trained.
        split_seed: another seed, another membership.
        eval_gallery: which is ``gallery``: ``"all"`` pictures, or the ``"held_out"`` ones alone (which is easier).
        max_train_samples: the first so many pictures are trained; the gallery keeps all.
        max_eval_samples: the first so many pictures are asked for; the gallery keeps all.
        eval_split: for a corpus with splits of its own, ``"validation"`` (default where there is one) or ``"test"``.

    Raises:
        UserError: flags that contradict each other or the corpus, or that hold out nothing.
    """
    own, others = [name for name in corpus.splits if name != "train"], {}
    _check_flags(own, held_out_captions_per_image, held_out_images, eval_gallery, eval_split)
    train = corpus.splits["train"]
    if own:
        chosen = eval_split or ("validation" if "validation" in own else own[0])
        logger.info("Evaluating on the corpus's own %s split", chosen)
        asked = corpus.splits[chosen]
        gallery = with_captions(asked, [[]] * len(asked))
        evaluation = asked
    elif held_out_captions_per_image:
        train, gallery, evaluation = _hold_out_captions(train, held_out_captions_per_image, split_seed)
    elif held_out_images:
        train, whole, evaluation = _hold_out_images(train, held_out_images, split_seed)
        new = with_captions(evaluation, [[]] * len(evaluation))
        gallery, others = (new, {"whole": whole}) if eval_gallery == "held_out" else (whole, {"new": new})
    else:
        gallery, evaluation = train, None
    train = _first(_captioned(train), max_train_samples, "max_train_samples")
    if evaluation is not None:
        evaluation = _first(_captioned(evaluation), max_eval_samples, "max_eval_samples")
    logger.info(
        "Training pictures: %d; gallery: %d; pictures asked for: %d",
        len(train),
        len(gallery),
        len(evaluation) if evaluation is not None else 0,
    )
    return RetrievalSplits(train, gallery, evaluation, others)


def questions(asked: Dataset) -> list[tuple[str, tuple[str, ...]]]:
    """(sentence, the image_ids that are right) of each sentence of an evaluation split, row by row. Several are right only of
    documents."""
    also = (
        asked["also_right"][:] if "also_right" in asked.column_names else [[()] * len(own) for own in asked["captions"]]
    )
    return [
        (sentence, (image_id, *others))
        for image_id, captions, own in zip(asked["image_id"], asked["captions"], also, strict=True)
        for sentence, others in zip(captions, own, strict=True)
    ]


def training_captions(splits: RetrievalSplits) -> list[str]:
    """Every trained caption, in the order of the rows."""
    return [caption for captions in splits.train["captions"] for caption in captions]


def gallery_rows(gallery: Dataset, image_ids: list[str]) -> np.ndarray:
    """(len(image_ids),) int64: the row of each image_id in the gallery."""
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    return np.array([row_of[image_id] for image_id in image_ids], dtype=np.int64)


def flatten_captions(dataset: Dataset) -> Dataset:
    """One row a caption: ``image_row`` (int64, row in ``dataset``), ``image_id``, ``caption``. No picture is copied."""
    return dataset.select_columns(["image_id", "captions"]).map(
        _flatten_batch,
        batched=True,
        with_indices=True,
        remove_columns=["image_id", "captions"],
        features=_FLAT,
        desc="One row a caption",
    )


def _flatten_batch(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
    flat = [
        (row, image_id, caption)
        for row, image_id, captions in zip(rows, batch["image_id"], batch["captions"], strict=True)
        for caption in captions
    ]
    return {name: [values[place] for values in flat] for place, name in enumerate(_FLAT)}


def with_captions(dataset: Dataset, captions: list[list[str]]) -> Dataset:
    """The same rows with other captions; embedded pictures are referred to, not copied."""
    column = Dataset.from_dict({"captions": captions}, features=Features({"captions": List(Value("string"))}))
    rest = dataset.remove_columns("captions")
    return concatenate_datasets([rest, column], axis=1).select_columns(list(COLUMNS))


def _check_flags(own: list[str], n_captions: int, fraction: float, eval_gallery: str, eval_split: str | None) -> None:
    if eval_gallery not in GALLERY_CHOICES:
        raise UserError(f"--eval_gallery {eval_gallery}: choose one of {', '.join(GALLERY_CHOICES)}")
    check_held_out(own, n_captions, fraction, eval_split, "split")


def check_held_out(own: Sequence[str], n_captions: int, fraction: float, eval_split: str | None, noun: str) -> None:
    """Raises `UserError` when the flags of the split contradict each other or the corpus's own splits.

    Args: own, names of the splits that the corpus brings to evaluate on; noun, what it brings, for the message.
    """
    if n_captions < 0:
        raise UserError(f"--held_out_captions_per_image {n_captions}: give 0 or more")
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"--held_out_images {fraction}: give a fraction from 0 up to, not including, 1")
    if n_captions and fraction:
        raise UserError("--held_out_captions_per_image and --held_out_images: give one of the two, not both")
    if own and (n_captions or fraction):
        flag = "--held_out_captions_per_image" if n_captions else "--held_out_images"
        raise UserError(f"{flag}: this corpus brings its own {noun} to evaluate on ({', '.join(own)}); set it to 0")
    if eval_split is not None and eval_split not in own:
        raise UserError(f"evaluation split {eval_split}: this corpus has {', '.join(own) or 'none besides train'}")


def _hold_out_captions(pictures: Dataset, n_held_out: int, split_seed: int) -> tuple[Dataset, Dataset, Dataset]:
    trained, asked, fewer, repeated = [], [], 0, 0
    for image_id, captions in zip(pictures["image_id"], pictures["captions"], strict=True):
        held = set(held_out_positions(image_id, len(captions), n_held_out, split_seed))
        trained.append([caption for position, caption in enumerate(captions) if position not in held])
        asked.append([caption for position, caption in enumerate(captions) if position in held])
        fewer += len(held) < n_held_out
        repeated += sum(caption in trained[-1] for caption in asked[-1])
    if not any(asked):
        raise UserError(
            f"--held_out_captions_per_image {n_held_out}: no picture has two captions or more, so nothing could be "
            "held out; use --held_out_images"
        )
    if fewer:
        logger.warning(
            "%s with too few captions to hold out %d: one stays trained", counted(fewer, "picture"), n_held_out
        )
    if repeated:
        logger.warning(
            "%s also trained, word for word, with the same picture (the corpus repeats itself)",
            counted(repeated, "held-out caption"),
        )
    train = with_captions(pictures, trained)
    return train, train, with_captions(pictures, asked)


def _hold_out_images(pictures: Dataset, fraction: float, split_seed: int) -> tuple[Dataset, Dataset, Dataset]:
    held = [hash_fraction(split_seed, image_id) < fraction for image_id in pictures["image_id"]]
    if not any(held) or all(held):
        raise UserError(
            f"--held_out_images {fraction} holds out {sum(held)} of {counted(len(held), 'picture')}; choose another "
            "fraction or --split_seed"
        )
    inside = [row for row, out in enumerate(held) if not out]
    outside = [row for row, out in enumerate(held) if out]
    captions = pictures["captions"][:]
    gallery = with_captions(pictures, [[] if out else kept for out, kept in zip(held, captions, strict=True)])
    return pictures.select(inside), gallery, pictures.select(outside)


def _captioned(pictures: Dataset) -> Dataset:
    rows = [row for row, captions in enumerate(pictures["captions"]) if captions]
    return pictures if len(rows) == len(pictures) else pictures.select(rows)


def _first(pictures: Dataset, limit: int | None, flag: str) -> Dataset:
    if limit is None:
        return pictures
    if limit < 1:
        raise UserError(f"--{flag} {limit}: give 1 or more, or leave it away")
    return pictures.select(range(min(limit, len(pictures))))
