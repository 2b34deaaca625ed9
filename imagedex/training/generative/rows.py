"""The rows of one run of a generative model: what it is trained on and what it is asked."""

from dataclasses import dataclass
from functools import cached_property

from torch.utils.data import DataLoader

from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.indexed import IndexedSplits
from imagedex.corpora.splits import questions
from imagedex.errors import UserError
from imagedex.identifiers.vectors import mean_vision_states
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.processing_retrieval import SentenceProcessor
from imagedex.training.augmentation import build_augmentation
from imagedex.training.generative.arguments import DSITrainingArguments, IndexingArguments, TeacherArguments
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.generative.data import (
    TEXT_INPUTS,
    Captioning,
    DSICollator,
    GenerativeEvaluation,
    Items,
    ItemsFromIdentifiers,
    Mixture,
    Rows,
    Sentences,
    evenly,
    keep_vision_states,
    text_rows,
)
from imagedex.training.pictures import Pictures

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


@dataclass
class ItemInputs:
    """What a model reads of the items themselves, before and after they have identifiers.

    Attributes:
        processor: of the model; its tokenizer reads documents, too, after `document_prompt`.
    """

    splits: IndexedSplits
    model: object
    processor: SentenceProcessor
    args: DSITrainingArguments
    data: CorpusArguments
    document_prompt: str = ""

    @property
    def num_proc(self) -> int | None:
        return self.data.preprocessing_num_workers

    @property
    def collator(self) -> DSICollator:
        return DSICollator(self.processor.tokenizer)

    @property
    def image_processor(self):
        return getattr(self.processor, "image_processor", None)

    @property
    def sees_pictures(self) -> bool:
        return self.image_processor is not None and not self.splits.documents

    @cached_property
    def gallery(self):
        """Of each item of the gallery, as it is: pixels, kept states, or tokens of documents; None when the model cannot read
        it."""
        if self.splits.documents:
            reader = self.reading(self.document_prompt)
            with self.args.main_process_first(desc="reading documents"):
                return text_rows(self.splits.gallery, "text", reader, self.num_proc)
        return self.pictures(self.splits.gallery) if self.sees_pictures else None

    def known_sentences(self) -> list[list[dict]]:
        """Of each item of the gallery, what is trained to lead to it, as tokens: its sentences, and a document's own text."""
        known = [self.tokens(self.processor, own) for own in self.splits.known_sentences()]
        if self.splits.documents:
            reader = self.reading(self.document_prompt)
            documents = zip(known, self.splits.gallery["text"], strict=True)
            known = [self.tokens(reader, [text]) + own for own, text in documents]
        return known

    @staticmethod
    def tokens(reader: SentenceProcessor, texts: list[str]) -> list[dict]:
        if not texts:
            return []
        columns, _ = reader.tokens(texts)
        return [{name: columns[name][row] for name in TEXT_INPUTS} for row in range(len(texts))]

    def picture_vectors(self):
        """(N, width) the vision tower's mean state of each item's picture; None of a model that reads none."""
        if not self.sees_pictures:
            return None
        batch, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        # not the gallery: its states are kept by all processes together, as words where the codebook is fixed
        batches = DataLoader(self.seen(self.splits.gallery), batch, collate_fn=self.collator, num_workers=workers)
        return mean_vision_states(self.model, batches, self.args.device, not self.args.disable_tqdm)

    def reading(self, prompt: str = "", clean_text: bool = False) -> SentenceProcessor:
        """The same tokenizer and length for texts that are no queries."""
        return SentenceProcessor(self.processor.tokenizer, prompt, clean_text, self.processor.max_text_length)

    def augmentation(self):
        return build_augmentation(self.data, self.image_processor) if self.sees_pictures else None

    def seen(self, rows, augment=None) -> Pictures:
        """The pictures of these rows of a split."""
        return Pictures(rows, self.image_processor, self.data.keep_pixels, self.num_proc, augment)

    def pictures(self, rows, augment=None):
        """As `seen`, or their states where these can be kept. All processes call this together."""
        with self.args.main_process_first(desc="reading pictures"):
            pictures = self.seen(rows, augment)
        return keep_vision_states(self.model, pictures, self.collator, self.args) if self.args.keep_states else pictures


class DSIRows:
    """Makes the datasets of a run: items have identifiers by now (None: of captioning, which needs none).

    All processes make them together: the main one reads and tokenises first, and all share the work of what is kept.
    """

    def __init__(self, items: ItemInputs, identifiers: Identifiers | None):
        self.items, self.splits, self.identifiers = items, items.splits, identifiers
        self.labels = {}  # image_id -> identifier with end-of-sequence
        if identifiers is not None:
            self.labels = {image_id: identifiers.labels(image_id) for image_id in identifiers.image_ids}

    def shown(self, held_out_too: bool) -> list[int]:
        """Rows of the gallery that are shown in training: all, or those that have a trained caption."""
        trained = set(self.splits.train["image_id"])
        return [row for row, image_id in enumerate(self.splits.item_ids) if held_out_too or image_id in trained]

    def indexing(self, strategy: str, held_out_too: bool) -> list[Items]:
        """One dataset for each direction of the strategy, over the same items."""
        augment = self.items.augmentation()
        inputs = self.items.pictures(self.splits.gallery, augment) if augment else self.items.gallery
        shown, item_ids = self.shown(held_out_too or self.splits.documents), self.splits.item_ids
        parts = Rows(inputs, shown), [item_ids[row] for row in shown], self.labels
        directions = []
        if strategy != "targets2inputs":
            directions.append(Items(*parts))
        if strategy != "inputs2targets":
            directions.append(ItemsFromIdentifiers(*parts, self.items.processor.tokenizer))
        return directions

    def sentences(
        self,
        split,
        augmentation: CaptionAugmentationArguments | None = None,
        taught: bool = False,
        invented: float = 0.0,
    ) -> Sentences:
        with self.items.args.main_process_first(desc="tokenising"):
            return Sentences(
                split, self.labels, self.items.processor, augmentation, self.items.num_proc, taught, invented
            )

    def training(
        self,
        indexing: IndexingArguments,
        ratio: float | None,
        augmentation: CaptionAugmentationArguments,
        teacher: TeacherArguments,
    ) -> Mixture:
        """Sentences, for a teacher to read too where there is one, with the items beside them."""
        no_items = self.items.gallery is None or ratio == 0
        directions = [] if no_items else self.indexing(indexing.indexing_strategy, indexing.index_held_out_images)
        taught = teacher.teacher_model_name_or_path is not None
        sentences = self.sentences(self.splits.train, augmentation, taught, teacher.teacher_invented_share)
        return Mixture(sentences, directions, ratio, self.items.args.seed)

    def training_mix(self, indexing: IndexingArguments, ratio: float | None) -> str | None:
        """For people: how many items are shown beside the sentences, and which way; None: none."""
        if self.items.gallery is None or ratio == 0:
            return None
        asking, found = self.splits.nouns
        share = (
            f"each of the {found} once an epoch"
            if ratio is None
            else f"{ratio:g} {found[:-1]} rows for each {asking[:-1]} row"
        )
        return share + ("" if indexing.indexing_strategy == "inputs2targets" else f", {indexing.indexing_strategy}")

    def evaluation(self, sentences: bool, items: bool, held_out_too: bool = True) -> GenerativeEvaluation:
        """The held-out sentences, and at most `max_memorised_samples` (-1: all) of the items that training shows."""
        evaluation, row_of = GenerativeEvaluation(), self.identifiers.row
        if sentences:
            evaluation.sentences = self.sentences(self.splits.evaluation)
            evaluation.targets = [tuple(map(row_of, right)) for _, right in questions(self.splits.evaluation)]
        if items and self.items.gallery is not None and self.items.args.max_memorised_samples:
            shown, item_ids = self.shown(held_out_too or self.splits.documents), self.splits.item_ids
            rows = [shown[place] for place in evenly(len(shown), self.items.args.max_memorised_samples)]
            ids = [item_ids[row] for row in rows]
            evaluation.items = Items(Rows(self.items.gallery, rows), ids, self.labels)
            evaluation.item_targets = [(row_of(image_id),) for image_id in ids]
        return evaluation

    def captioning(self, split, clean_text: bool = False) -> Captioning:
        """Picture -> caption, of all captions of these rows; in training pictures are augmented as the arguments say."""
        augment = self.items.augmentation() if split is self.splits.train else None
        pictures = self.items.pictures(split, augment)
        with self.items.args.main_process_first(desc="tokenising"):
            return Captioning(split, pictures, self.items.reading(clean_text=clean_text), self.items.num_proc)

    def captioning_evaluation(self, clean_text: bool = False) -> GenerativeEvaluation:
        return GenerativeEvaluation(sentences=self.captioning(self.splits.evaluation, clean_text))
