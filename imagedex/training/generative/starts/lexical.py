"""A T5 from scratch that starts as a word search over the trained captions, instead of knowing nothing.

Three captions a picture are too few to learn from nothing which words matter: a T5 with random weights learns its captions
by heart and finds less than BM25 does. But a T5 whose layers pass their input on, whose decoder attends to every word
alike, and whose embeddings are factors of the words' weights (`lexical_weights.py`: BM25's, and what the trained captions
say of BM25),

    mean over the sentence of E[word]  .  I[identifier]   ~   weights of its words for the item / length,

answers as that search does before the first step, as far as `d_model` dimensions hold it, and training goes on from there.
After an identifier the start says end-of-sequence, so that nothing is left to learn but what stands for what. Nothing
enters but the run's own training texts. (The idea of starting residual branches at zero: Fixup, 1901.09321; of factors of
word counts as embeddings: latent semantic analysis.)
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from imagedex.errors import UserError
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.training.generative.starts.lexical_weights import lexical_factors

logger = logging.getLogger(__name__)

# Embeddings are so much shorter than T5's, and the decoder's last layer norm makes up for it: what dropout leaves of a token
# that the decoder takes away again is then little beside what the sentence says.
GAIN = 10.0
SHARPNESS = 9.0  # of identifiers, per mean weight of a word: where left-out captions of photographs are likeliest
NEXT = 1.0  # length of what says which place comes next, next to that of a sentence
ENDING = 4.0  # and of what says that it ends, next to that of a word: nothing must drown it
ATTENTION = 10.0  # in nats, of the decoder to the token that was written last


@torch.no_grad()
def start_from_texts(
    model,
    tokenizer,
    identifiers: Identifiers,
    texts: Sequence[str],
    pairs: Sequence[tuple[str, str]] = (),
    seed: int = 0,
) -> None:
    """Overwrites the T5's start.

    Args:
        model: any T5 of ours, its embeddings already grown to the identifiers' tokens.
        texts: of each item (rows of `identifiers`), its trained captions in one string; "" where there are none.
        pairs: trained sentences, each with what else is said of its item.

    Raises: `UserError` where the model's attention is not as wide as the model, or there is no text.
    """
    config = model.config
    if config.num_heads * config.d_kv != config.d_model:
        raise UserError(
            f"--t5_start lexical needs attention as wide as the model: num_heads * d_kv is "
            f"{config.num_heads * config.d_kv} and d_model is {config.d_model}"
        )

    def read(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    documents, pairs = [read(text) for text in texts], [(read(sentence), read(rest)) for sentence, rest in pairs]
    if not any(documents):
        raise UserError("--t5_start lexical needs trained captions or documents to start from, and there are none")
    draw = torch.Generator().manual_seed(seed)
    places = places_of(identifiers)
    reserved = len(places) + 3
    tokens = {token for text in (*documents, *(sentence for sentence, _ in pairs)) for token in text}
    spelling = {token: tokenizer.decode([token]).strip().lower() for token in sorted(tokens)}
    factors = lexical_factors(documents, pairs, spelling, config.d_model - reserved, seed)
    words, items, directions = placed(*factors, reserved, draw)
    blank, start, *marks, end = directions
    sentences = [torch.stack([words[token] for token in own]).mean(0) for own in documents if own]
    usual = torch.stack(sentences).norm(dim=1).mean().item()
    embeddings = model.get_input_embeddings().weight  # (V, d_model)
    scale = config.d_model**0.5 / GAIN
    known = set(identifiers.new_tokens.values())
    for token in sorted(identifiers.known_tokens.values()):  # digits: what no text has must still differ
        words.setdefault(token, F.normalize(torch.randn(config.d_model, generator=draw), dim=0))
    write_words(embeddings, tokenizer, words, known, scale, (blank, start, end))
    vectors = token_vectors(identifiers, items)
    for token in sorted(known):
        embeddings[token] = SHARPNESS * usual / GAIN * vectors.get(token, torch.zeros(config.d_model))
    for tokens, mark in zip(places, marks, strict=True):
        embeddings[sorted(tokens)] += scale * mark.to(embeddings.device)
    pass_through(model, torch.stack([blank, end]))
    model.decoder.final_layer_norm.weight.fill_(GAIN)
    if places:
        length = embeddings[sorted(set().union(*places))].norm(dim=1).mean().item()
        announce(model, [start, *marks, end], length, NEXT * usual)
    if isinstance(model, CodebookT5):
        model.take_codebook()  # pictures become words of this start, not of the random one before it
    logger.info("starts as a search over the words of the training texts, in %d dimensions", config.d_model)


def write_words(embeddings, tokenizer, words: dict[int, torch.Tensor], identifiers: set[int], scale: float, directions):
    """Fills the rows of all tokens but the identifiers'. Args: directions, of blank, of the decoder's first token, of the end."""
    blank, start, end = directions
    for token in range(len(tokenizer)):
        if token not in identifiers:
            word = words.get(token, torch.zeros_like(blank))
            # T5 brings all words to one length, so a quiet one says blank beside what it says
            embeddings[token] = scale * (word + (1 - word.square().sum()).clamp_min(0).sqrt() * blank)
    embeddings[tokenizer.pad_token_id] = scale * start  # the decoder's first token
    embeddings[tokenizer.eos_token_id] = scale * end


def placed(words: dict[int, torch.Tensor], items: torch.Tensor, reserved: int, draw: torch.Generator):
    """The same factors in a space of `reserved` dimensions more, turned at random so that dropout of one coordinate takes a
    little of everything; and (reserved, new width) unit vectors of the directions of which no word and no item has any."""
    width = items.shape[1] + reserved
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    used = turn[: items.shape[1]]
    return {token: vector @ used for token, vector in words.items()}, items @ used, turn[items.shape[1] :]


def token_vectors(identifiers: Identifiers, items: torch.Tensor) -> dict[int, torch.Tensor]:
    """Of each token that was made for identifiers: its item's vector; where several items share it, what sets their mean apart
    from the mean of all, as long as an item's is on average."""
    holders: dict[int, list[int]] = {token: [] for token in identifiers.new_tokens.values()}
    for row in range(len(identifiers)):
        for token in identifiers.tokens[identifiers.offsets[row] : identifiers.offsets[row + 1]].tolist():
            if token in holders:
                holders[token].append(row)
    usual, middle = items.norm(dim=1).mean(), items.mean(0)
    vectors = {}
    for token, rows in holders.items():
        if len(rows) == 1:
            vectors[token] = items[rows[0]]
        elif rows:
            vectors[token] = F.normalize(items[rows].mean(0) - middle, dim=0) * usual
    return vectors


def places_of(identifiers: Identifiers) -> list[set[int]]:
    """The tokens of each place, where all identifiers are as long and no token stands at two places; else nothing.

    Spare tokens, which only pictures added later will have, stand where those of the same name but for the number do.
    """
    lengths = np.diff(identifiers.offsets)
    if (lengths != lengths[0]).any():
        return []
    places = [set(column) for column in identifiers.tokens.reshape(-1, lengths[0]).T.tolist()]
    if sum(map(len, places)) > len(set().union(*places)):
        return []
    names = {token: text.rpartition("_")[0] for text, token in identifiers.new_tokens.items()}
    place_of = {names[token]: place for place in places for token in place if token in names}
    for token, name in names.items():
        place_of.get(name, set()).add(token)
    return places


def pass_through(model, unsaid: torch.Tensor) -> None:
    """Every residual branch starts at zero, but for the first cross-attention: it adds the mean of what the encoder says.

    Its values are turned by one random rotation and back, so that each head carries a part of every dimension. It is deaf
    to `unsaid` (K, d_model), orthonormal: the blank part of words, and the end, which every sentence that is read has, too.

    Its queries and keys and the encoder's are zero, so neither gets a gradient and they attend to every word alike, or by
    its place, for good. Where queries may learn, a few hundred steps of any size are enough to look at the words by which
    the trained captions, of which there are few, are best told apart; and captions that were left out are then found less
    than before (benchmarks/README.md).
    """
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            for layer in block.layer:
                for name in ("SelfAttention", "EncDecAttention"):
                    if hasattr(layer, name):
                        getattr(layer, name).o.weight.zero_()
                if hasattr(layer, "DenseReluDense"):
                    layer.DenseReluDense.wo.weight.zero_()
    attention = model.decoder.block[0].layer[1].EncDecAttention
    for even in (attention, *(block.layer[0].SelfAttention for block in model.encoder.block)):
        even.q.weight.zero_()
        even.k.weight.zero_()
    rotation = torch.linalg.qr(torch.randn(attention.v.weight.shape)).Q
    attention.v.weight.copy_(rotation - rotation @ unsaid.T @ unsaid)
    attention.o.weight.copy_(rotation.T)


def announce(model, steps: list[torch.Tensor], length: float, loudness: float) -> None:
    """The decoder's first self-attention looks at the last token alone, takes it away and says what comes next.

    What is left is what the cross-attention adds, at every place of an identifier as at the first. Words are tied, so the
    decoder would otherwise say again what it has just written; and the first thing that a picture teaches would be to end,
    which a fast vision tower then does at the first place, too, alike for all pictures.

    Args:
        steps: unit vectors (d_model,): of the decoder's first token, of the tokens of each place, of the end.
        length: of the identifiers' embeddings, on average.
        loudness: of the next place, next to a word's length; the end has its own.
    """
    attention, width = model.decoder.block[0].layer[0].SelfAttention, model.config.d_model
    change = -length * torch.eye(width)  # of the direction of a token's embedding
    change += (length - width**0.5 / GAIN) * torch.outer(steps[0], steps[0])  # the first token's length is this
    for step, following in zip(steps[:-1], steps[1:], strict=True):
        share = 1 if step is steps[0] else width**0.5 / GAIN / length  # of this direction in its token's embedding
        loud = ENDING if following is steps[-1] else loudness
        change += loud * width**0.5 / share * torch.outer(following, step)
    change /= width**0.5  # the length that the layer norm gives
    rotation = torch.linalg.qr(torch.randn(width, width)).Q  # so that each head carries a part of every dimension
    attention.v.weight.copy_(rotation)
    attention.o.weight.copy_(change @ rotation.T)
    attention.q.weight.zero_()
    attention.relative_attention_bias.weight.zero_()
    attention.relative_attention_bias.weight[0] = ATTENTION  # of the distance 0
