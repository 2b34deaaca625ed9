"""The rows of one run of a generative model: what it is trained on and what it is asked."""

from functools import cached_property

import numpy as np

from imagedex.errors import UserError
from imagedex.training.arguments import CorpusArguments
from imagedex.training.augmentation import build_augmentation
from imagedex.training.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.data import Pictures
from imagedex.training.dsi_arguments import QUERY_STYLE, DSITrainingArguments, IndexingArguments, TextArguments
from imagedex.training.dsi_data import (
    Captioning,
    DSICollator,
    GenerativeEvaluation,
    IndexedSplits,
    Items,
    ItemsFromIdentifiers,
    Mixture,
    Rows,
    Sentences,
    Writer,
    evenly,
    keep_vision_states,
)
from modeling.identifiers import Identifiers

DEFAULT_RATIOS = {"codebook_t5": 1.0, "vision_grounded_t5": 0.0, "t5": 0.0}  # of pictures; documents: each once


def indexing_ratio(kind: str, indexing: IndexingArguments, documents: bool) -> float | None:
    """Rows item -> identifier for each sentence; None: each item once. Raises `UserError` for what a model cannot do."""
    ratio, backward = indexing.indexing_ratio, indexing.indexing_strategy != "inputs2targets"
    if documents:
        return ratio
    if kind == "t5" and (ratio or backward):
        raise UserError(
            "a t5 reads no pictures, so it cannot index them; leave --indexing_ratio and --indexing_strategy out, or take "
            "--model_type codebook_t5"
        )
    if kind == "vision_grounded_t5" and backward:
        raise UserError(
            f"--indexing_strategy {indexing.indexing_strategy}: vision_grounded_t5 has no visual tokens to write; "
            "take inputs2targets, or --model_type codebook_t5"
        )
    return DEFAULT_RATIOS[kind] if ratio is None else ratio


class DSIRows:
    """Makes the datasets of a run once everything they need is known.

    Args: model, a built model; collator, of its batches; brought, the identifiers that come with it.
    """

    def __init__(
        self, splits: IndexedSplits, model, collator: DSICollator, args: DSITrainingArguments, data: CorpusArguments,
        texts: TextArguments, brought: Identifiers | None = None,
    ):  # fmt: skip
        self.splits, self.model, self.collator, self.args, self.data = splits, model, collator, args, data
        writer = {"tokenizer": collator.tokenizer, "max_length": data.max_text_length}
        self.sentence_writer = Writer(**writer, **texts.query_style(brought))
        self.caption_writer = Writer(**writer, cleans=bool(texts.clean_captions))  # written, not read: no prompt
        self.document_writer = Writer(**writer, prompt=texts.document_prompt)
        self.identifiers, self.labels = brought, {}

    @property
    def num_proc(self) -> int | None:
        return self.data.preprocessing_num_workers

    @property
    def sees_pictures(self) -> bool:
        return self.collator.image_processor is not None and not self.splits.documents

    def label(self, identifiers: Identifiers) -> None:
        """What every item is to be called. New identifiers come late: their vectors may be of these very pictures."""
        self.identifiers = identifiers
        identifiers.source[QUERY_STYLE] = self.sentence_writer.style
        self.labels = {image_id: identifiers.labels(image_id) for image_id in identifiers.image_ids}

    @cached_property
    def inputs(self):
        """What the model reads of each item of the gallery, as it is: pixels, kept states, or tokens of documents; None when
        the model cannot read it."""
        if self.splits.documents:
            return self.document_writer.rows(self.splits.gallery, "text", self.num_proc)
        return self.pictures(self.splits.gallery) if self.sees_pictures else None

    def pictures(self, rows, augment=None):
        """The pictures of these rows of a split, or their states where these can be kept."""
        pictures = Pictures(rows, self.collator.image_processor, self.data.keep_pixels, self.num_proc, augment)
        return keep_vision_states(self.model, pictures, self.collator, self.args) if self.args.keep_states else pictures

    def shown(self, held_out_too: bool) -> list[int]:
        """Rows of the gallery that are shown in training: all, or those that have a trained caption."""
        trained = set(self.splits.train["image_id"])
        return [row for row, image_id in enumerate(self.splits.item_ids) if held_out_too or image_id in trained]

    def indexing(self, strategy: str, held_out_too: bool) -> list[Items]:
        """One dataset for each direction of the strategy, over the same items."""
        augment = None
        if not self.splits.documents:
            augment = build_augmentation(self.data.image_augmentation, self.collator.image_processor)
        inputs = self.pictures(self.splits.gallery, augment) if augment else self.inputs
        shown, item_ids = self.shown(held_out_too or self.splits.documents), self.splits.item_ids
        parts = Rows(inputs, shown), [item_ids[row] for row in shown], self.labels
        directions = []
        if strategy != "targets2inputs":
            directions.append(Items(*parts))
        if strategy != "inputs2targets":
            directions.append(ItemsFromIdentifiers(*parts, self.collator.tokenizer))
        return directions

    def training(
        self, indexing: IndexingArguments, ratio: float | None, augmentation: CaptionAugmentationArguments
    ) -> Mixture:
        """Sentences, with the items beside them."""
        sentences = Sentences(self.splits.train, self.labels, self.sentence_writer, augmentation, self.num_proc)
        no_items = self.inputs is None or ratio == 0
        directions = [] if no_items else self.indexing(indexing.indexing_strategy, indexing.index_held_out_images)
        return Mixture(sentences, directions, ratio)

    def training_mix(self, indexing: IndexingArguments, ratio: float | None) -> str | None:
        """For people: how many items are shown beside the sentences, and which way; None: none."""
        if self.inputs is None or ratio == 0:
            return None
        asking, found = self.splits.nouns
        share = (
            f"each of the {found} once an epoch"
            if ratio is None
            else f"{ratio:g} {found[:-1]} rows for each {asking[:-1]} row"
        )
        return share + ("" if indexing.indexing_strategy == "inputs2targets" else f", {indexing.indexing_strategy}")

    def evaluation(self, sentences: bool, items: bool, held_out_too: bool = True) -> GenerativeEvaluation:
        """The held-out sentences, and at most `max_memorised_samples` of the items that training shows."""
        evaluation, row_of = GenerativeEvaluation(), self.identifiers.row
        if sentences:
            asked = Sentences(self.splits.evaluation, self.labels, self.sentence_writer, num_proc=self.num_proc)
            evaluation.sentences = asked
            evaluation.targets = np.array([row_of(image_id) for image_id in asked.image_ids])
        if items and self.inputs is not None and self.args.max_memorised_samples:
            shown, item_ids = self.shown(held_out_too or self.splits.documents), self.splits.item_ids
            rows = [shown[place] for place in evenly(len(shown), self.args.max_memorised_samples)]
            ids = [item_ids[row] for row in rows]
            evaluation.items = Items(Rows(self.inputs, rows), ids, self.labels)
            evaluation.item_targets = np.array([row_of(image_id) for image_id in ids])
        return evaluation

    def captioning(self, split) -> Captioning:
        """Picture -> caption, of all captions of these rows; in training pictures are augmented as the arguments say."""
        training = split is self.splits.train
        augment = build_augmentation(self.data.image_augmentation, self.collator.image_processor) if training else None
        return Captioning(split, self.pictures(split, augment), self.caption_writer, self.num_proc)

    def captioning_evaluation(self) -> GenerativeEvaluation:
        return GenerativeEvaluation(sentences=self.captioning(self.splits.evaluation))
