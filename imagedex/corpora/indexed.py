"""What a generative model indexes: pictures or documents behind one face, and the sentences that ask for them.

An item is what has an identifier: a picture, or a document of a text corpus. A sentence asks for it: a caption, or a question.
"""

from dataclasses import dataclass

from datasets import Dataset, Features, List, Value, concatenate_datasets

from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.documents import is_text_corpus, load_text_corpus
from imagedex.corpora.load import load_splits
from imagedex.corpora.splits import RetrievalSplits
from imagedex.errors import UserError

_SENTENCES = Features({"image_id": Value("string"), "captions": List(Value("string"))})
_ASKED = Features({**_SENTENCES, "also_right": List(List(Value("string")))})


@dataclass
class IndexedSplits(RetrievalSplits):
    """As `RetrievalSplits`, but `gallery` holds everything that has an identifier, and everything in it is searched.

    Rows of documents have `text` instead of `image`; `image_id` is then the document's id and `captions` its questions. Those of
    `evaluation` may have `also_right`: for each question the ids of further documents that answer.
    """

    documents: bool = False

    @property
    def item_ids(self) -> list[str]:
        return self.gallery["image_id"][:]

    @property
    def nouns(self) -> tuple[str, str]:
        """What asks and what is found, for people."""
        return ("questions", "documents") if self.documents else ("captions", "pictures")

    def known_sentences(self) -> list[list[str]]:
        """Of each item its trained sentences."""
        trained = dict(zip(self.train["image_id"], self.train["captions"], strict=True))
        return [trained.get(image_id, []) for image_id in self.item_ids]

    def item_texts(self) -> list[str]:
        """What may be said of each item: a document's text, a picture's trained captions ("" where it has none)."""
        if self.documents:
            return self.gallery["text"][:]
        return [" ".join(own) for own in self.known_sentences()]

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


def load_indexed_splits(data: CorpusArguments, pseudo_queries_file: str | None = None) -> IndexedSplits:
    """The corpus that the arguments name, of pictures or of documents, split as they say. Raises `UserError`."""
    if is_text_corpus(data.dataset_name):
        return load_documents(data, pseudo_queries_file)
    if pseudo_queries_file:
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


def load_documents(data: CorpusArguments, pseudo_queries_file: str | None = None) -> IndexedSplits:
    for name in ("max_images", "captions_per_image"):
        if getattr(data, name) is not None:
            raise UserError(
                f"--{name} draws from the pictures of a corpus; --dataset_name {data.dataset_name} holds documents"
            )
    corpus = load_text_corpus(
        data.dataset_name,
        pseudo_queries_file=pseudo_queries_file,
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
    """Rows of questions as one row a document (that which is named first), of the first `limit` documents."""
    grouped: dict[str, list[int]] = {}
    for row, document in enumerate(questions["document_id"]):
        grouped.setdefault(document, []).append(row)
    ids = list(grouped)[:limit]
    columns = {"captions": questions["question"][:]}
    if "also_right" in questions.column_names:
        columns["also_right"] = questions["also_right"][:]
    table = {name: [[values[row] for row in grouped[i]] for i in ids] for name, values in columns.items()}
    return Dataset.from_dict({"image_id": ids, **table}, features=_ASKED if len(columns) > 1 else _SENTENCES)
