"""From a corpus to rows of a generative model: sentence -> identifier, item -> identifier, identifier -> item.

Rows are small dictionaries; `DSICollator` makes batches of them, rows of text first, then rows of pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset

from imagedex.corpora import flatten_captions
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments, chance, mixed
from imagedex.training.kept import Keeper
from imagedex.training.pictures import stacked
from imagedex.training.texts import token_table
from imagedex.words import joined, units

IDENTIFIER_PROMPT = "identifier: "  # before an identifier that is read instead of written (DSI's second direction)
TEXT_INPUTS = ("input_ids", "attention_mask")


def text_rows(texts: Dataset, column: str, processor, num_proc: int | None = None) -> Dataset:
    """Every text of a column as T5 reads it, written once and kept on disk."""
    return token_table(texts, column, processor, num_proc).select_columns(list(TEXT_INPUTS))


class Sentences(torch.utils.data.Dataset):
    """Row i: sentence i as tokens, and the identifier of its item as `labels`.

    Args:
        split: `image_id` and `captions`, one row an item.
        labels: image_id -> identifier with end-of-sequence.
        processor: writes sentences, a `SentenceProcessor`.
        augmentation: draws every sentence anew each time it is asked for; then nothing is tokenised beforehand.
        taught: rows hold the `sentence`, too, as it was drawn, for a teacher to read.
        invented: the share of rows that bring an `invented` row with them, whose sentence only the teacher judges.
    """

    def __init__(
        self,
        split: Dataset,
        labels: dict[str, list[int]],
        processor,
        augmentation: CaptionAugmentationArguments | None = None,
        num_proc: int | None = None,
        taught: bool = False,
        invented: float = 0.0,
    ):
        flat = flatten_captions(split)
        self.taught, self.invented = taught, invented
        self.processor, self.augmentation = processor, augmentation if augmentation and augmentation.active else None
        self.image_ids, self.labels, self.sentences = flat["image_id"][:], labels, flat["caption"][:]
        if self.augmentation or invented:
            self.owners, self.of_item = flat["image_row"][:], split["captions"][:]
        if not self.augmentation:
            self.tokens = text_rows(flat, "caption", processor, num_proc)

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, row: int) -> dict:
        sentence = self.sentences[row]
        if self.augmentation:
            sentence = self.augmentation.draw(sentence, self.of_item[self.owners[row]])
        tokens = self.as_read(sentence) if self.augmentation else self.tokens[row]
        found = tokens | {"labels": self.labels[self.image_ids[row]]}
        if self.taught:
            found["sentence"] = sentence
        if self.invented and chance(self.invented):
            invented = self.invent(row)
            found["invented"] = self.as_read(invented) | {"labels": [-100], "sentence": invented}
        return found

    def as_read(self, sentence: str) -> dict:
        columns, _ = self.processor.tokens([sentence])
        return {name: columns[name][0] for name in TEXT_INPUTS}

    def invent(self, row: int) -> str:
        """As many words as sentence `row` has, drawn from the sentences of its item and of another, in their order."""
        own, count = self.owners[row], len(self.of_item)
        other = (own + 1 + torch.randint(max(count - 1, 1), (1,)).item()) % count
        both = [*self.of_item[own], *self.of_item[other]]
        return joined(mixed(both, len(units(self.sentences[row]))))


class Items(torch.utils.data.Dataset):
    """Row i: item i, pixels or states of a picture or tokens of a document, and its identifier as `labels`."""

    def __init__(self, inputs, image_ids: Sequence[str], labels: dict[str, list[int]]):
        self.inputs, self.image_ids, self.labels = inputs, list(image_ids), labels

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, row: int) -> dict:
        return self.inputs[row] | {"labels": self.labels[self.image_ids[row]]}


class ItemsFromIdentifiers(Items):
    """The other direction: the identifier is read, and what is written is the document or the picture's visual tokens."""

    def __init__(self, inputs, image_ids, labels, tokenizer):
        super().__init__(inputs, image_ids, labels)
        self.prompt = tokenizer(IDENTIFIER_PROMPT, add_special_tokens=False)["input_ids"]

    def __getitem__(self, row: int) -> dict:
        tokens = self.prompt + list(self.labels[self.image_ids[row]])
        inputs = self.inputs[row]
        read = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
        if "input_ids" in inputs:
            return read | {"labels": inputs["input_ids"]}
        return read | {f"target_{name}": value for name, value in inputs.items()}


class Captioning(torch.utils.data.Dataset):
    """Row i: the picture of caption i, and the caption's tokens as `labels`."""

    def __init__(self, split: Dataset, pictures, processor, num_proc: int | None = None):
        flat = flatten_captions(split)
        self.rows, self.pictures = flat["image_row"][:], pictures
        self.tokens = text_rows(flat, "caption", processor, num_proc)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.pictures[self.rows[row]] | {"labels": self.tokens[row]["input_ids"]}


class Mixture(torch.utils.data.Dataset):
    """All sentences once an epoch, and `ratio` times as many rows of each kind of indexing.

    Items are taken in turn, in one random order; an epoch goes on where the one before ended. So over any epochs each item is
    shown as often as every other, give or take one.

    Args: indexing, datasets of the same items (`Items`, `ItemsFromIdentifiers`); ratio None: each item once; seed, of the order.
    """

    def __init__(self, sentences: Sentences, indexing: list[Items], ratio: float | None, seed: int = 0):
        self.sentences, self.indexing = sentences, indexing
        items = len(indexing[0]) if indexing else 0
        self.count = items if ratio is None else round(ratio * len(sentences)) if items else 0
        self.order = torch.randperm(items, generator=torch.Generator().manual_seed(seed)).tolist()
        self.epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # workers that outlive an epoch have to see the next

    def set_epoch(self, epoch: int) -> None:
        """Before rows are asked for; the first epoch is 0."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.sentences) + self.count * len(self.indexing)

    def __getitem__(self, row: int) -> dict:
        if row < len(self.sentences):
            return self.sentences[row]
        kind, row = divmod(row - len(self.sentences), self.count)
        turn = self.epoch.item() * self.count + row
        return self.indexing[kind][self.order[turn % len(self.order)]]


class Rows(torch.utils.data.Dataset):
    """Some rows of another dataset, in this order."""

    def __init__(self, dataset, rows: Sequence[int]):
        self.dataset, self.rows = dataset, list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.dataset[self.rows[row]]


@dataclass
class GenerativeEvaluation:
    """What is asked. `targets` and `item_targets`, one a row: the identifiers' rows that are right, of which the best counts (the
    loss is the first one's).

    sentences: rows of text with labels; items: rows of pictures or documents with labels; None: not asked.
    """

    sentences: torch.utils.data.Dataset | None = None
    targets: list[tuple[int, ...]] | None = None
    items: torch.utils.data.Dataset | None = None
    item_targets: list[tuple[int, ...]] | None = None


def evenly(total: int, at_most: int) -> list[int]:
    """`at_most` of `total` rows, spaced evenly; -1: all."""
    return list(range(total)) if at_most < 0 or total <= at_most else [row * total // at_most for row in range(at_most)]


def keep_vision_states(model, pictures, collator, args):
    """The pictures' states, or their words where the codebook is fixed, kept once, where the vision tower is frozen and pictures
    do not change; else the pictures. All processes call this together: they share the work."""
    if pictures.augment is not None or not model.vision_is_frozen:
        return pictures
    model.to(args.device).eval()

    def pool(batch):
        return model.kept_states(batch["pixel_values"].to(args.device))

    options = args.keep_dir, args.per_device_eval_batch_size, args.dataloader_num_workers
    settings = [*model.kept_settings(), *pictures.settings]
    keeper = Keeper("image_states", model.vision_model, pool, collator, settings, *options)
    return keeper.keep(pictures, pictures.keys(), together=True)


@dataclass
class DSICollator:
    """Rows -> a batch as the models take it, rows of text first, then rows of pictures.

    input_ids, attention_mask (texts, T); pixel_values (pictures, 3, height, width) or image_states (pictures, patches + 1,
    width), of a fixed codebook words (pictures, patches); labels (texts + pictures, L), -100 where padded; rows of text
    whose target is a picture stand last among the texts, without labels, with target_pixel_values or target_image_states.
    sentences (strings), of the rows that a teacher reads, which stand first; invented ones among them have no labels.
    """

    tokenizer: object

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rows = [*rows, *(row["invented"] for row in rows if "invented" in row)]
        rows = sorted(rows, key=lambda row: "sentence" not in row)
        texts = [row for row in rows if "input_ids" in row and "labels" in row]
        to_pictures = [row for row in rows if "input_ids" in row and "labels" not in row]
        pictures = [row for row in rows if "input_ids" not in row]
        batch = {}
        if texts or to_pictures:
            tokens = [{name: row[name] for name in TEXT_INPUTS} for row in texts + to_pictures]
            batch |= self.tokenizer.pad(tokens, return_tensors="pt")
        batch |= stacked(pictures) | stacked(to_pictures, "target_")
        labels = [torch.as_tensor(row["labels"]) for row in texts + pictures if "labels" in row]
        sentences = [row["sentence"] for row in rows if "sentence" in row]
        if sentences:
            batch["sentences"] = sentences
        if labels:
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch
