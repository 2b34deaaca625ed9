"""A column of texts as tokens, written once and kept on disk; what is cut is counted aloud."""

import logging

import numpy as np
from datasets import Dataset

from imagedex.encoding.vectors import UNKNOWN, count_unknown
from imagedex.modeling.processing_retrieval import SentenceProcessor

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("tokenizer", "prompt", "clean_text", "max_text_length")


def token_table(texts: Dataset, column: str, processor, num_proc: int | None = None) -> Dataset:
    """One row a text: the columns that the tokenizer gives. Args: processor, which writes and cuts each text."""
    reader = SentenceProcessor(
        *(getattr(processor, name) for name in TEXT_FIELDS)
    )  # without pictures, for a small fingerprint

    def write(batch):
        tokens, cut = reader.tokens(batch[column])
        unknown = [count_unknown(reader.tokenizer, [ids]) for ids in tokens["input_ids"]]
        bare = [not reader.cleaned(text).strip() for text in batch[column]]
        return tokens | {"was_cut": cut, "unknown": unknown, "bare": bare}

    rows = texts.select_columns([column]).map(
        write, batched=True, num_proc=num_proc, remove_columns=[column], desc="Tokenising"
    )
    warn_of_cut(int(np.sum(rows["was_cut"])), len(rows), processor.max_text_length)
    if unknown := int(np.sum(rows["unknown"])):
        logger.warning(UNKNOWN, unknown, len(rows))
    if bare := int(np.sum(rows["bare"])):
        logger.warning("%d of %d texts are empty once they are cleaned (clean_text)", bare, len(rows))
    return rows.remove_columns(["was_cut", "unknown", "bare"])


def warn_of_cut(cut: int, total: int, limit: int | None) -> None:
    if cut:
        logger.warning("%d of %d texts are longer than %d tokens and were cut", cut, total, limit)
