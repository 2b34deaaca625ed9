"""A tokenizer from the training captions, for text towers from scratch."""

import logging

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from imagedex.words import IDEOGRAPHS, KANA, NORMALIZER, SOUTHEAST_ASIAN, SPLITTER, UNSPACED

logger = logging.getLogger(__name__)

LONGEST_WORD = 100  # characters; a longer one is read in parts, so that no text takes long
LONGEST_PIECE = 5  # of a script without blanks, where a piece could else become a whole sentence that nobody says again


def train_tokenizer(captions, vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing BPE tokenizer in T5's layout: <pad> 0, </s> 1, <unk> 2, </s> ends a text, a digit is one token.

    Words are those of `imagedex.words`: a sign is a token of its own, blank beside it or not; so is an ideograph.
    Other scripts without blanks are cut into pieces of their own learning, and no "▁" stands before them.

    BPE and not T5's Unigram, because the same captions must give the same pieces in every process: ranks train it each
    for itself, and a run that goes on trains it again. (The Unigram trainer of `tokenizers` differs from run to run.)

    Args: captions, an iterable of strings; vocab_size, at most, but for the characters, which all stay (few captions give
    fewer pieces).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = NORMALIZER
    tokenizer.pre_tokenizer = word_pieces(LONGEST_PIECE)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=list("0123456789▁"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.pre_tokenizer = word_pieces()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    logger.info("trained a tokenizer of %d pieces on the captions", tokenizer.get_vocab_size())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def word_pieces(longest: int = LONGEST_WORD) -> pre_tokenizers.PreTokenizer:
    """What is cut into learned pieces, each by itself. Args: longest, run of letters of a script without blanks."""
    letters = f"{KANA}{SOUTHEAST_ASIAN}"
    return pre_tokenizers.Sequence(
        [
            SPLITTER,
            split(f"[{IDEOGRAPHS}]"),
            split(f"[{letters}]{{1,{longest}}}|[^{letters}]{{1,{LONGEST_WORD}}}"),
            pre_tokenizers.Metaspace(),
            split(f"▁(?=[{UNSPACED}])", "removed"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )


def split(pattern: str, what: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), what)
