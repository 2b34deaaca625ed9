"""The pictures that can be found: a folder of pictures, or the pictures of a corpus."""

import datasets

from imagedex.corpora import load_corpus
from imagedex.corpora.schema import check_unique
from imagedex.errors import UserError

ALL_SPLITS = "all"


def read_gallery(
    image_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = ALL_SPLITS,
    unreadable_images: str = "error",
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Rows of the corpora's schema, one a picture, each checked to be readable.

    Args:
        image_dir: alone: every picture in this folder and below, its image_id being its POSIX path relative to it.
        dataset_name: a corpus, see `load_corpus`; `image_dir` is then the root of its pictures.
        split: of the corpus, or "all" of them.

    Raises:
        UserError: what `load_corpus` finds wrong, a split that the corpus does not have, an image_id in two splits.
    """
    corpus = load_corpus(
        dataset_name,
        dataset_config_name,
        image_dir=image_dir,
        unreadable_images=unreadable_images,
        num_proc=num_proc,
    )
    if split != ALL_SPLITS:
        if split not in corpus.splits:
            raise UserError(f"--dataset_split {split}: the corpus has {', '.join(corpus.splits)}; or take {ALL_SPLITS}")
        return corpus.splits[split]
    gallery = datasets.concatenate_datasets(list(corpus.splits.values()))
    check_unique(gallery["image_id"][:], "whole")
    return gallery
