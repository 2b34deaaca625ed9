"""From a corpus to batches of the dual encoder: captions as tokens beside their pictures."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from imagedex.corpora.arguments import DataArguments
from imagedex.corpora.splits import RetrievalSplits, flatten_captions, gallery_rows, hash_fraction
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.augmentation import build_augmentation
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.head_start import HeadStart, start_heads
from imagedex.training.dual_encoder.streaming import CaptionStream
from imagedex.training.kept import Keeper, KeptStates, token_keys
from imagedex.training.pictures import Pictures, stacked
from imagedex.training.run import check_folds
from imagedex.training.texts import token_table

logger = logging.getLogger(__name__)


def tokenize_captions(split: Dataset, processor, num_proc: int | None = None) -> Dataset:
    """One row a caption: image_row, image_id and the tokens that the processor makes. Captions that are cut are counted aloud."""
    rows = flatten_captions(split)
    tokens = token_table(rows, "caption", processor, num_proc)
    return concatenate_datasets([rows.remove_columns("caption"), tokens], axis=1)


def token_rows(captions: Dataset) -> Dataset:
    """Of tokenised captions only what the model takes."""
    return captions.remove_columns(["image_row", "image_id"])


def keep_frozen_states(model, texts, pictures, collator, args, together: bool = False):
    """(texts, pictures), each replaced by its kept states where the model's tower is frozen.

    An epoch then costs the heads (and the other tower) alone. Pictures that are augmented change from epoch to epoch; they are
    kept where `kept_views` says how many views of each.

    Args: together, see `Keeper.keep`.
    """
    device, config = args.device, model.config
    model.to(device).eval()

    def keeper(name, tower, pool_method, settings):
        def pool(batch):
            return pool_method(**{key: value.to(device) for key, value in batch.items()})[1]

        options = args.keep_dir, args.per_device_eval_batch_size, args.dataloader_num_workers
        return Keeper(name, tower, pool, collator, settings, *options)

    if model.is_frozen("text"):
        settings = [config.text_pooling, config.text_pooling_layers]
        processor = getattr(collator.pad, "__self__", None)
        if processor is not None and processor.padding == "max_length":  # the tower sees the padding
            tokenizer = processor.tokenizer
            settings += [processor.max_text_length, tokenizer.pad_token_id, tokenizer.padding_side]
        keep = keeper("text_states", model.text_model, model.pool_text, settings).keep
        texts = keep(texts, token_keys(texts), together=together)
    views = None if pictures.augment is None else args.kept_views
    if model.is_frozen("vision") and views != 0:
        keep = keeper(
            "image_states", model.vision_model, model.pool_image, [config.vision_pooling, *pictures.settings]
        ).keep
        pictures = keep(pictures, pictures.keys(), views, together)
    return texts, pictures


@dataclass
class RetrievalEvaluation:
    """What is asked and what can be found.

    texts: rows of tokens (or kept states), one a caption; pictures: all that can be found; targets (captions,): the right
    picture's row in them; galleries: how figures begin -> the rows of `pictures` that are searched, ascending. The first is
    the one that --eval_gallery names; without any it is all pictures.
    """

    texts: Dataset | KeptStates
    pictures: Pictures | KeptStates
    targets: np.ndarray
    galleries: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.galleries = self.galleries or {"": np.arange(len(self.pictures))}

    def __len__(self):
        return len(self.texts)

    def named(self) -> "RetrievalEvaluation":
        """The same with the first gallery alone, and none but its pictures."""
        rows = next(iter(self.galleries.values()))
        pictures = torch.utils.data.Subset(self.pictures, rows.tolist())
        return RetrievalEvaluation(self.texts, pictures, np.searchsorted(rows, self.targets))


class CaptionPairs(torch.utils.data.Dataset):
    """Item i: caption i, its picture, and `image_ids`, the picture's row.

    Args: texts and pictures, rows of model inputs; image_rows (captions,), the picture of each caption; banked, the captions
    for the bank that is kept with the model.
    """

    def __init__(self, texts: Dataset | KeptStates, pictures: Pictures | KeptStates, image_rows, banked=()):
        self.texts, self.pictures, self.image_rows = texts, pictures, np.asarray(image_rows)
        self.banked = list(banked)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = int(self.image_rows[index])
        return self.texts[index] | self.pictures[row] | {"image_ids": row}


def bank_rows(tokens: Dataset, size: int) -> list[int]:
    """At most `size` captions, chosen by a hash of what they say and of which picture: the same ones whatever else is trained."""
    rows = range(len(tokens))
    if len(rows) > size:
        named = zip(tokens["image_id"], tokens["input_ids"], strict=True)
        places = [hash_fraction("bank", image_id, *ids) for image_id, ids in named]
        rows = sorted(sorted(rows, key=places.__getitem__)[:size])
    return list(rows)


@dataclass
class Collator:
    """Rows -> a batch: captions padded as the processor pads them, pictures one below the other.

    Takes rows of captions, of pictures, or of both. Gives input_ids, attention_mask (B, T), pixel_values
    (B, 3, height, width) float32, kept states (B, width) and image_ids (B,) int64, each where the rows have it.

    Args: pad, a processor's `padded`; without one the tokenizer pads to the longest.
    """

    tokenizer: object
    pad: Callable[[list[dict]], dict] | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        tokens = [{name: row[name] for name in self.tokenizer.model_input_names if name in row} for row in rows]
        if tokens[0]:
            batch |= self.pad(tokens) if self.pad else self.tokenizer.pad(tokens, return_tensors="pt")
        batch |= stacked(rows)
        if "text_states" in rows[0]:
            batch["text_states"] = torch.stack([row["text_states"] for row in rows])
        if "image_ids" in rows[0]:
            batch["image_ids"] = torch.tensor([row["image_ids"] for row in rows])
        return batch


@dataclass
class DualEncoderRows:
    """What a run of the dual encoder is trained on and what it is asked."""

    splits: RetrievalSplits
    model: torch.nn.Module
    processor: RetrievalProcessor
    data: DataArguments
    args: XMatchingTrainingArguments

    @property
    def collator(self) -> Collator:
        return Collator(self.processor.tokenizer, self.processor.padded)

    def training(self) -> CaptionPairs | CaptionStream:
        """Captions beside their pictures, as rows or as a stream."""
        data, args, train = self.data, self.args, self.splits.train
        augment = build_augmentation(data, self.processor.image_processor)
        if data.streaming:
            return CaptionStream.of(train, self.processor, data, args, augment)
        tokens = self.tokens(train)
        if not args.shuffle_every_epoch:
            tokens = tokens.shuffle(seed=args.seed)
        banked = bank_rows(tokens, args.caption_bank_size)
        return CaptionPairs(*self.inputs(tokens, train, augment), tokens["image_row"], banked)

    def evaluation(self) -> RetrievalEvaluation:
        """The captions that are asked, and the galleries. Raises `UserError` where the gallery cannot be cut into folds."""
        tokens, (gallery, galleries) = self.tokens(self.splits.evaluation), self.splits.galleries()
        targets = gallery_rows(gallery, tokens["image_id"])
        evaluation = RetrievalEvaluation(*self.inputs(tokens, gallery), targets, galleries)
        if self.args.five_fold:  # of the named gallery: another one's fifths need not have captions
            evaluation = evaluation.named()
            check_folds(self.args, evaluation.targets, len(evaluation.pictures))
        return evaluation

    def tokens(self, split: Dataset) -> Dataset:
        return tokenize_captions(split, self.processor, self.data.preprocessing_num_workers)

    def inputs(self, tokens: Dataset, pictures: Dataset, augment=None):
        """What the model takes of each caption, and of each picture."""
        keep = self.data.keep_pixels, self.data.preprocessing_num_workers
        return token_rows(tokens), Pictures(pictures, self.processor.image_processor, *keep, augment)

    def keep_states(self, *parts: CaptionPairs | RetrievalEvaluation | None) -> None:
        """Of frozen towers, where that is asked for. All processes call this together: they share the work."""
        for part in parts:
            if self.args.keep_states and part is not None:
                part.texts, part.pictures = keep_frozen_states(
                    self.model, part.texts, part.pictures, self.collator, self.args, together=True
                )

    def start_heads(self, train: CaptionPairs | None, checkpoint: str | None, trained: bool) -> HeadStart | None:
        """Puts heads in closed form into the model, where that is asked for. A run that goes on does it, too, since training must
        not end below them; what it chose at its start lies in its checkpoint. None is needed once the training is over.

        Args: checkpoint and trained, see `Run`.
        """
        if self.args.head_start == "none" or train is None:
            return None
        chosen = checkpoint and HeadStart.load(checkpoint)
        if trained:
            return chosen
        image_ids, strength = self.splits.train["image_id"][:], self.args.head_start_regularization
        return start_heads(self.model, train, image_ids, self.args.head_start, strength, chosen)
