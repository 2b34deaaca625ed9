"""From a corpus to batches of the dual encoder: captions as tokens beside their pictures."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from imagedex.corpora.arguments import DataArguments
from imagedex.corpora.splits import RetrievalSplits, flatten_captions, gallery_rows
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.augmentation import build_augmentation
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.streaming import CaptionStream
from imagedex.training.pictures import KeptStates, Pictures, stacked
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


def keep_frozen_states(model, texts, pictures, collator, args):
    """(texts, pictures), each replaced by its kept states where the model's tower is frozen.

    An epoch then costs the heads (and the other tower) alone. Pictures that are augmented change from epoch to epoch and
    are not kept.
    """
    device = args.device
    model.to(device).eval()

    def pool_with(method):
        return lambda batch: method(**{name: value.to(device) for name, value in batch.items()})[1]

    options = (collator, args.per_device_eval_batch_size, args.dataloader_num_workers)
    if model.config.freeze_text_tower:
        texts = KeptStates(texts, "text_states", pool_with(model.pool_text), *options)
    if model.config.freeze_vision_tower and pictures.augment is None:
        pictures = KeptStates(pictures, "image_states", pool_with(model.pool_image), *options)
    return texts, pictures


@dataclass
class RetrievalEvaluation:
    """What is asked and what can be found.

    texts: rows of tokens (or kept states), one a caption; pictures: the gallery; targets (captions,): the right picture's
    row in it.
    """

    texts: Dataset | KeptStates
    pictures: Pictures | KeptStates
    targets: np.ndarray

    def __len__(self):
        return len(self.texts)


class CaptionPairs(torch.utils.data.Dataset):
    """Item i: caption i, its picture, and `image_ids`, the picture's row.

    Args: texts and pictures, rows of model inputs; image_rows (captions,), the picture of each caption.
    """

    def __init__(self, texts: Dataset | KeptStates, pictures: Pictures | KeptStates, image_rows):
        self.texts, self.pictures, self.image_rows = texts, pictures, np.asarray(image_rows)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = int(self.image_rows[index])
        return self.texts[index] | self.pictures[row] | {"image_ids": row}


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
    collator: Collator
    data: DataArguments
    args: XMatchingTrainingArguments

    def training(self) -> CaptionPairs | CaptionStream:
        """Captions beside their pictures, as rows or as a stream."""
        data, args, train = self.data, self.args, self.splits.train
        augment = build_augmentation(data.image_augmentation, self.processor.image_processor)
        if data.streaming:
            return CaptionStream.of(train, self.processor, data, args, augment)
        tokens = self.tokens(train)
        if not args.shuffle_every_epoch:
            tokens = tokens.shuffle(seed=args.seed)
        return CaptionPairs(*self.inputs(tokens, train, augment), tokens["image_row"])

    def evaluation(self) -> RetrievalEvaluation:
        """The captions that are asked, and the gallery. Raises `UserError` where it cannot be cut into folds."""
        tokens, gallery = self.tokens(self.splits.evaluation), self.splits.gallery
        evaluation = RetrievalEvaluation(*self.inputs(tokens, gallery), gallery_rows(gallery, tokens["image_id"]))
        check_folds(self.args, evaluation.targets, len(gallery))
        return evaluation

    def tokens(self, split: Dataset) -> Dataset:
        return tokenize_captions(split, self.processor, self.data.preprocessing_num_workers)

    def inputs(self, tokens: Dataset, pictures: Dataset, augment=None):
        """What the model takes of each caption, and of each picture."""
        keep = self.data.keep_pixels, self.data.preprocessing_num_workers
        rows = token_rows(tokens), Pictures(pictures, self.processor.image_processor, *keep, augment)
        return keep_frozen_states(self.model, *rows, self.collator, self.args) if self.args.keep_states else rows
