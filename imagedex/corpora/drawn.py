"""A part of a corpus, drawn by its captions: the first of them in a random order, as the DSI for pictures took its 10,000."""

import random

from datasets import Dataset

from imagedex.corpora.schema import counted
from imagedex.corpora.splits import with_captions
from imagedex.errors import UserError


def draw_part(pictures: Dataset, max_images: int | None, captions_per_image: int | None, seed: int = 0) -> Dataset:
    """Captions are taken in a random order: one of a picture that is new until there are `max_images`, of each picture at most
    `captions_per_image`. Pictures stand in the order in which they were drawn, those without captions are left out.

    The order is `random.Random(seed).shuffle` of the captions' places in the corpus, one behind the other. With BLIP's
    flickr30k_train.json, 10000 pictures, 1 caption and seed 313 it is the choice of DSI-Text2Image's create_flickr_data.py.

    Args: pictures, a split with the columns of the schema; None: all. Raises `UserError`.
    """
    for name, value in (("max_images", max_images), ("captions_per_image", captions_per_image)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give 1 or more, or leave it away")
    rows = [(row, caption) for row, captions in enumerate(pictures["captions"]) for caption in captions]
    random.Random(seed).shuffle(rows)
    chosen: dict[int, list[str]] = {}
    for row, caption in rows:
        if row not in chosen and len(chosen) == max_images:
            continue
        own = chosen.setdefault(row, [])
        if captions_per_image is None or len(own) < captions_per_image:
            own.append(caption)
    if max_images is not None and len(chosen) < max_images:
        raise UserError(f"--max_images {max_images}: the corpus has {counted(len(chosen), 'picture')} with captions")
    return with_captions(pictures.select(list(chosen)), list(chosen.values()))
