"""A tokenizer from the training captions, for text towers from scratch."""

import logging

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def train_tokenizer(captions, vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """A lower-casing BPE tokenizer in T5's layout: <pad> 0, </s> 1, <unk> 2, </s> ends a text, a digit is one token.

    BPE and not T5's Unigram, because the same captions must give the same pieces in every process: ranks train it each
    for itself, and a run that goes on trains it again. (The Unigram trainer of `tokenizers` differs from run to run.)

    Args: captions, an iterable of strings; vocab_size, at most (few captions give fewer pieces).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=list("0123456789▁"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    logger.info("trained a tokenizer of %d pieces on the captions", tokenizer.get_vocab_size())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
