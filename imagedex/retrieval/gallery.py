"""The pictures that can be found: a folder of pictures, or the pictures (or documents) of a corpus."""

import datasets

from imagedex.corpora import is_text_corpus, load_corpus, load_text_corpus
from imagedex.corpora.schema import check_unique
from imagedex.corpora.splits import held_out_positions, with_captions
from imagedex.errors import UserError

ALL_SPLITS = "all"


def read_gallery(
    image_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = ALL_SPLITS,
    unreadable_images: str = "error",
    num_proc: int | None = None,
    held_out: tuple[int, int] | None = None,
) -> datasets.Dataset:
    """Rows of the corpora's schema, one a picture, each checked to be readable; of a text corpus, `image_id` and `text`.

    Args:
        image_dir: alone: every picture in this folder and below, its image_id being its POSIX path relative to it.
        dataset_name: a corpus, see `load_corpus` and `load_text_corpus`; `image_dir` is then the root of its pictures.
        split: of the corpus, or "all" of them.
        held_out: (captions of each picture, split seed): `captions` then holds only what is not kept for evaluation, by the
            hash that splits every corpus here; where nothing is held out, captions of the split "train" alone.

    Raises:
        UserError: what `load_corpus` finds wrong, a split that the corpus does not have, an image_id in two splits.
    """
    if is_text_corpus(dataset_name):
        if split != ALL_SPLITS:
            raise UserError(f"--dataset_split {split}: all documents of a text corpus can be found; leave it out")
        return load_text_corpus(dataset_name).documents.rename_column("document_id", "image_id")
    corpus = load_corpus(
        dataset_name,
        dataset_config_name,
        image_dir=image_dir,
        unreadable_images=unreadable_images,
        num_proc=num_proc,
    )
    splits = corpus.splits
    if held_out is not None:
        splits = {name: usable_captions(rows, *held_out, name == "train") for name, rows in splits.items()}
    if split != ALL_SPLITS:
        if split not in splits:
            raise UserError(f"--dataset_split {split}: the corpus has {', '.join(splits)}; or take {ALL_SPLITS}")
        return splits[split]
    gallery = datasets.concatenate_datasets(list(splits.values()))
    check_unique(gallery["image_id"][:], "whole")
    return gallery


def usable_captions(rows: datasets.Dataset, per_image: int, split_seed: int, trained: bool) -> datasets.Dataset:
    """The rows with those captions only that are not kept for evaluation.

    Args: per_image, captions of each picture that are kept; trained, whether this is the split that is trained on, all of
    whose captions may be used where none is kept.
    """
    captions = rows["captions"][:]
    if per_image:
        kept = []
        for image_id, own in zip(rows["image_id"], captions, strict=True):
            held = set(held_out_positions(image_id, len(own), per_image, split_seed))
            kept.append([caption for position, caption in enumerate(own) if position not in held])
    else:
        kept = captions if trained else [[] for _ in captions]
    return with_captions(rows, kept)
