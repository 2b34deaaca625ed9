"""Which corpus, and what of it is held out: the arguments every script shares."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from imagedex.bounds import COUNT, PIXELS, SHARE, SOME_OR_NONE, TOKENS, WORKERS, Bounds
from imagedex.command_line import argument
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

NO_CORPUS = "no corpus given: use --dataset_name (a folder, a Hub id, or shape_scenes) or --train_file"
KNOWN_FORMS = (
    "Flickr8k's and Flickr30k's captions, COCO's annotations, Karpathy's, BLIP's and LXMERT's JSON, imagefolder, x.txt beside "
    "x.jpg (img2dataset), a table beside its pictures, parquet"
)


@dataclass
class CorpusArguments:
    """Which corpus, and what of it is held out."""

    _argument_group_name = "data"
    typed: ClassVar[frozenset[str] | None] = None  # names that the command line sets; None: nobody knows, all may be
    _bounds = {
        "max_images": COUNT,
        "captions_per_image": COUNT,
        "held_out_captions_per_image": SOME_OR_NONE,
        "held_out_images": SHARE,
        "max_train_samples": COUNT,
        "max_eval_samples": COUNT,
        "preprocessing_num_workers": Bounds(1, WORKERS),
        "max_text_length": Bounds(1, TOKENS),
        "image_size": Bounds(1, PIXELS),
        "random_crop_scale": Bounds(0, 1, above=True),
        "random_flip": SHARE,
        "shuffle_buffer_size": SOME_OR_NONE,
    }

    dataset_name: str | None = argument(
        "Hub id, built-in name (shape_scenes; nq10k for run_dsi.py), or a folder; its form is recognised and said: "
        f"{KNOWN_FORMS}; for run_dsi.py also documents and questions (BEIR's corpus.jsonl)."
    )
    dataset_config_name: str | None = argument("Configuration of the dataset (for shape_scenes: how many scenes).")
    train_file: str | None = argument("CSV, TSV, JSON, JSONL or Parquet of pictures and captions to train on.")
    validation_file: str | None = argument("CSV, TSV, JSON, JSONL or Parquet to evaluate on.")
    image_dir: str | None = argument("Root of the pictures that train_file and validation_file name.")
    visual_genome_dir: str | None = argument("Visual Genome's pictures, for LXMERT's files with sources beside COCO.")
    image_column: str | None = argument("Column with the picture; found by itself when there is one candidate.")
    caption_column: str | None = argument("Column with the caption or the list of captions; found likewise.")
    max_images: int | None = argument("Only this many pictures of the corpus's train split, drawn at random.")
    captions_per_image: int | None = argument("Only this many captions of each of its pictures, drawn likewise.")
    draw_seed: int = argument("Seed of what --max_images and --captions_per_image draw.", 0)
    held_out_captions_per_image: int = argument("Keep this many captions of each picture for evaluation.", 0)
    held_out_images: float = argument("Keep all captions of this fraction of the pictures for evaluation.", 0.0)
    split_seed: int = argument("Seed of the hash that decides what is held out; the same in every script.", 0)
    max_train_samples: int | None = argument("Train on the captions of only this many pictures.")
    max_eval_samples: int | None = argument(
        "Evaluate on the captions of only this many pictures (the gallery stays whole)."
    )
    unreadable_images: Literal["error", "skip"] = argument(
        "A picture that cannot be read: stop, or leave it out and say so.", "error"
    )
    preprocessing_num_workers: int | None = argument("Processes that check, decode and tokenise before training.")
    max_text_length: int | None = argument(
        "Longest sentence in tokens; longer ones are cut, and counted in the log. For a new model 75, else as it was trained."
    )
    image_size: int | None = argument(
        "Side in pixels pictures are resized to when the vision tower starts from scratch."
    )
    keep_pixels: bool = argument(
        "Decode and resize every picture once and keep the numbers on disk, instead of each time it is seen.", False
    )
    image_augmentation: Literal["none", "random_resized_crop"] = argument(
        "Training pictures as they are, or a random part of each, another one each time.", "none"
    )
    random_crop_scale: list[float] | None = argument(
        "random_resized_crop: smallest and largest share of the area; by default 0.08 1."
    )
    random_flip: float | None = argument("random_resized_crop: share of the parts that is mirrored; by default 0.5.")

    def __post_init__(self):
        if self.keep_pixels and self.image_augmentation != "none":
            raise ValueError(
                f"--keep_pixels keeps each picture once, so --image_augmentation {self.image_augmentation} cannot cut it "
                "anew each time; give one of the two"
            )
        for name in ("random_crop_scale", "random_flip"):
            if getattr(self, name) is not None and self.image_augmentation == "none":
                raise ValueError(
                    f"--{name} says how pictures are cut; give --image_augmentation random_resized_crop too"
                )
        if (scale := self.random_crop_scale) and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            given = " ".join(map(str, scale))
            raise ValueError(f"--random_crop_scale {given}: give two shares above 0, up to 1, the smaller one first")

    def crop_options(self) -> dict:
        """Keywords of `RandomResizedCrop` that were given."""
        scale = tuple(self.random_crop_scale) if self.random_crop_scale else None
        return {name: value for name, value in (("scale", scale), ("flip", self.random_flip)) if value is not None}

    def require_corpus(self) -> None:
        """Raises `UserError` when none is named; it is known before anything is loaded."""
        if not (self.dataset_name or self.train_file or self.validation_file or self.image_dir):
            raise UserError(NO_CORPUS)

    def typed_hold_out(self) -> str:
        """The flag that the command line holds out with; "" where none does, or only the recipe."""
        flags = ("held_out_captions_per_image", "held_out_images")
        typed = [name for name in flags if getattr(self, name) and (self.typed is None or name in self.typed)]
        return f"--{typed[0]}" if typed else ""

    def leave_split_to(self, own: Sequence[str]) -> None:
        """What a recipe holds out gives way to the splits that a corpus brings. Args: own, these without train."""
        if not own or self.typed_hold_out():
            return
        for name in ("held_out_captions_per_image", "held_out_images"):
            if getattr(self, name):
                logger.info("of the recipe, %s gives way to the corpus's own split (%s)", name, ", ".join(own))
                setattr(self, name, type(getattr(self, name))())


@dataclass
class DataArguments(CorpusArguments):
    """What only the dual encoder can do with a corpus: stream it, and search a part of the gallery."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        f"Hub id, built-in name (shape_scenes), or a folder; its form is recognised and said: {KNOWN_FORMS}. With "
        "--streaming: a folder of tar shards or a Hub id to train on."
    )
    train_file: str | None = argument(
        "CSV, TSV, JSON, JSONL or Parquet of pictures and captions to train on. With --streaming: tar shards, as a glob, a URL "
        "or 'shards/{00000..00009}.tar'; --dataset_name may then name a corpus to evaluate on."
    )
    eval_gallery: Literal["all", "held_out"] = argument(
        "With held_out_images: whether eval_hits@1 and the others are of all pictures or of the held-out ones alone. The last "
        "evaluation gives both.",
        "all",
    )
    streaming: bool = argument(
        "Train on tar shards in webdataset layout (000000.jpg with 000000.txt, a caption a line, or 000000.json, a caption "
        "or a list of them) as they are read, again and again for --max_steps; nothing is stored.",
        False,
    )
    shuffle_buffer_size: int = argument(
        "With --streaming: captions, with their undecoded pictures, that each process or DataLoader worker holds and draws "
        "from. 0: in the order of the shards.",
        1000,
    )
