"""From a corpus to rows of a generative model: sentence -> identifier, item -> identifier, identifier -> item.

An item is what has an identifier: a picture, or a document of a text corpus. A sentence asks for it: a caption, or a
question. Rows are small dictionaries; `DSICollator` makes batches of them, rows of text first, then rows of pictures.
"""

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from imagedex.corpora import RetrievalSplits, flatten_captions
from imagedex.corpora.documents import is_text_corpus, load_text_corpus
from imagedex.errors import UserError
from imagedex.training.arguments import CorpusArguments
from imagedex.training.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.data import Collator, KeptStates, load_splits
from imagedex.training.dsi_arguments import TextArguments

logger = logging.getLogger(__name__)

IDENTIFIER_PROMPT = "identifier: "  # before an identifier that is read instead of written (DSI's second direction)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCES = Features({"image_id": Value("string"), "captions": List(Value("string"))})


@dataclass
class IndexedSplits(RetrievalSplits):
    """As `RetrievalSplits`, but `gallery` holds everything that has an identifier, and everything in it is searched.

    Rows of documents have `text` instead of `image`; `image_id` is then the document's id and `captions` its questions.
    """

    documents: bool = False

    @property
    def item_ids(self) -> list[str]:
        return self.gallery["image_id"][:]

    @property
    def nouns(self) -> tuple[str, str]:
        """What asks and what is found, for people."""
        return ("questions", "documents") if self.documents else ("captions", "pictures")

    def item_texts(self) -> list[str]:
        """What may be said of each item: a document's text, a picture's trained captions ("" where it has none)."""
        if self.documents:
            return self.gallery["text"][:]
        trained = dict(zip(self.train["image_id"], self.train["captions"], strict=True))
        return [" ".join(trained.get(image_id, [])) for image_id in self.item_ids]

    def known_pairs(self) -> list[tuple[str, str]]:
        """Each trained sentence, with what else may be said of its item: a question with the document's text, a caption with
        the other trained captions of its picture (left out where it is the only one)."""
        if self.documents:
            text = dict(zip(self.item_ids, self.gallery["text"], strict=True))
            rows = zip(self.train["image_id"], self.train["captions"], strict=True)
            return [(question, text[item]) for item, questions in rows for question in questions]
        return [
            (caption, " ".join(own[:place] + own[place + 1 :]))
            for own in self.train["captions"]
            if len(own) > 1
            for place, caption in enumerate(own)
        ]

    def training_texts(self) -> list[str]:
        """Everything that is trained on, to train a tokenizer with."""
        sentences = [sentence for own in self.train["captions"] for sentence in own]
        return [*self.gallery["text"], *sentences] if self.documents else sentences


def load_indexed_splits(data: CorpusArguments, texts: TextArguments) -> IndexedSplits:
    """The corpus that the arguments name, of pictures or of documents, split as they say. Raises `UserError`."""
    if is_text_corpus(data.dataset_name):
        return load_documents(data, texts)
    if texts.pseudo_queries_file:
        raise UserError("--pseudo_queries_file is for documents; the captions of pictures are in their corpus")
    return load_picture_splits(data)


def load_picture_splits(data: CorpusArguments) -> IndexedSplits:
    """As `load_indexed_splits`, of pictures alone."""
    if is_text_corpus(data.dataset_name):
        raise UserError(
            f"--dataset_name {data.dataset_name} holds documents; this script teaches pictures, see run_dsi.py"
        )
    splits = load_splits(data)
    gallery, known = splits.gallery, set(splits.gallery["image_id"])
    rest = [row for row, image_id in enumerate(splits.train["image_id"]) if image_id not in known]
    if rest:  # a corpus that evaluates on pictures of their own: these and the trained ones all have identifiers
        gallery = concatenate_datasets([gallery, splits.train.select(rest)])
    return IndexedSplits(splits.train, gallery, splits.evaluation)


def load_documents(data: CorpusArguments, texts: TextArguments) -> IndexedSplits:
    corpus = load_text_corpus(
        data.dataset_name,
        pseudo_queries_file=texts.pseudo_queries_file,
        held_out_captions_per_image=data.held_out_captions_per_image,
        held_out_images=data.held_out_images,
        split_seed=data.split_seed,
    )
    train, evaluation = (
        rows if rows is None else by_document(rows, limit)
        for rows, limit in ((corpus.train, data.max_train_samples), (corpus.evaluation, data.max_eval_samples))
    )
    return IndexedSplits(train, corpus.documents.rename_column("document_id", "image_id"), evaluation, documents=True)


def by_document(questions: Dataset, limit: int | None) -> Dataset:
    """(document_id, question) rows as one row a document, of the first `limit` documents."""
    grouped: dict[str, list[str]] = {}
    for document, question in zip(questions["document_id"], questions["question"], strict=True):
        grouped.setdefault(document, []).append(question)
    ids = list(grouped)[:limit]
    return Dataset.from_dict({"image_id": ids, "captions": [grouped[i] for i in ids]}, features=_SENTENCES)


def clean(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@dataclass
class Writer:
    """Text -> {"input_ids", "attention_mask"}, as T5 is to read it.

    Args: prompt, written before each text; cleans, whether texts are cleaned first; max_length in tokens.
    """

    tokenizer: object
    prompt: str = ""
    cleans: bool = False
    max_length: int = 75

    @property
    def style(self) -> dict:
        """What whoever asks the model later has to know."""
        return {"prompt": self.prompt, "cleans": self.cleans, "max_length": self.max_length}

    def cleaned(self, text: str) -> str:
        return clean(text) if self.cleans else text

    def prepare(self, text: str) -> str:
        return self.prompt + self.cleaned(text)

    def __call__(self, text: str) -> dict:
        return self._tokens(self.tokenizer(self.prepare(text), truncation=True, max_length=self.max_length))

    def rows(self, texts: Dataset, column: str, num_proc: int | None = None) -> Dataset:
        """Every text of a column written once, kept on disk. Texts that are cut are counted aloud."""

        def write(batch):
            prepared = [self.prepare(text) for text in batch[column]]
            written = self._tokens(self.tokenizer(prepared, truncation=True, max_length=self.max_length))
            whole = self.tokenizer(prepared, truncation=False, verbose=False)["input_ids"]
            return written | {"was_cut": [len(ids) > self.max_length for ids in whole]}

        rows = texts.select_columns([column]).map(
            write, batched=True, num_proc=num_proc, remove_columns=[column], desc="Tokenising"
        )
        cut = int(np.sum(rows["was_cut"]))
        if cut:
            logger.warning("%d of %d texts are longer than %d tokens and were cut", cut, len(rows), self.max_length)
        return rows.remove_columns("was_cut")

    @staticmethod
    def _tokens(encoded) -> dict:
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Sentences(torch.utils.data.Dataset):
    """Row i: sentence i as tokens, and the identifier of its item as `labels`.

    Args:
        split: `image_id` and `captions`, one row an item.
        labels: image_id -> identifier with end-of-sequence.
        augmentation: draws every sentence anew each time it is asked for; then nothing is tokenised beforehand.
    """

    def __init__(
        self,
        split: Dataset,
        labels: dict[str, list[int]],
        writer: Writer,
        augmentation: CaptionAugmentationArguments | None = None,
        num_proc: int | None = None,
    ):
        flat = flatten_captions(split)
        self.writer, self.augmentation = writer, augmentation if augmentation and augmentation.active else None
        self.image_ids, self.labels = flat["image_id"][:], labels
        if self.augmentation:
            self.sentences, self.owners, self.of_item = flat["caption"][:], flat["image_row"][:], split["captions"][:]
        else:
            self.tokens = writer.rows(flat, "caption", num_proc)

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, row: int) -> dict:
        if self.augmentation:
            tokens = self.writer(self.augmentation.draw(self.sentences[row], self.of_item[self.owners[row]]))
        else:
            tokens = self.tokens[row]
        return tokens | {"labels": self.labels[self.image_ids[row]]}


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

    def __init__(self, split: Dataset, pictures, writer: Writer, num_proc: int | None = None):
        flat = flatten_captions(split)
        self.rows, self.pictures = flat["image_row"][:], pictures
        self.tokens = writer.rows(flat, "caption", num_proc)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.pictures[self.rows[row]] | {"labels": self.tokens[row]["input_ids"]}


class Mixture(torch.utils.data.Dataset):
    """All sentences once, and `ratio` times as many rows of each kind of indexing.

    Items are taken in turn as often as they fit in whole; the rest is drawn at random, anew each time it is asked for.

    Args: indexing, datasets of the same items (`Items`, `ItemsFromIdentifiers`); ratio None: each item once.
    """

    def __init__(self, sentences: Sentences, indexing: list[Items], ratio: float | None):
        self.sentences, self.indexing = sentences, indexing
        items = len(indexing[0]) if indexing else 0
        self.count = items if ratio is None else round(ratio * len(sentences)) if items else 0
        self.in_turn = self.count // max(1, items) * items

    def __len__(self):
        return len(self.sentences) + self.count * len(self.indexing)

    def __getitem__(self, row: int) -> dict:
        if row < len(self.sentences):
            return self.sentences[row]
        kind, row = divmod(row - len(self.sentences), self.count)
        items = self.indexing[kind]
        return items[row % len(items) if row < self.in_turn else torch.randint(len(items), (1,)).item()]


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
    """What is asked. `targets` and `item_targets` (rows,): the right rows of the identifiers.

    sentences: rows of text with labels; items: rows of pictures or documents with labels; None: not asked.
    """

    sentences: torch.utils.data.Dataset | None = None
    targets: np.ndarray | None = None
    items: torch.utils.data.Dataset | None = None
    item_targets: np.ndarray | None = None


def evenly(total: int, at_most: int) -> list[int]:
    """`at_most` of `total` rows, spaced evenly."""
    return list(range(total)) if total <= at_most else [row * total // at_most for row in range(at_most)]


def keep_vision_states(model, pictures, collator, args):
    """The pictures' states, kept once, where the vision tower is frozen and pictures do not change; else the pictures."""
    if pictures.augment is not None or not model.vision_is_frozen:
        return pictures
    model.to(args.device).eval()
    options = (collator, args.per_device_eval_batch_size, args.dataloader_num_workers)
    return KeptStates(
        pictures, "image_states", lambda batch: model.vision_states(batch["pixel_values"].to(args.device)), *options
    )


@dataclass
class DSICollator(Collator):
    """Rows -> a batch as the models take it, rows of text first, then rows of pictures.

    input_ids, attention_mask (texts, T); pixel_values (pictures, 3, height, width) or image_states (pictures, patches + 1,
    width); labels (texts + pictures, L), -100 where padded; rows of text whose target is a picture stand last among the
    texts, without labels, with target_pixel_values or target_image_states.
    """

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        texts = [row for row in rows if "input_ids" in row and "labels" in row]
        to_pictures = [row for row in rows if "input_ids" in row and "labels" not in row]
        pictures = [row for row in rows if "input_ids" not in row]
        batch = {}
        if texts or to_pictures:
            tokens = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in texts + to_pictures]
            batch |= self.tokenizer.pad(tokens, return_tensors="pt")
        batch |= self.visual(pictures, "") | self.visual(to_pictures, "target_")
        labels = [torch.as_tensor(row["labels"]) for row in texts + pictures if "labels" in row]
        if labels:
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch

    def visual(self, rows: list[dict], prefix: str) -> dict[str, torch.Tensor]:
        found = {}
        for name in ("pixel_values", "image_states"):
            if rows and prefix + name in rows[0]:
                values = torch.stack([row[prefix + name] for row in rows])
                found[prefix + name] = self.normalize(values) if name == "pixel_values" else values
        return found
