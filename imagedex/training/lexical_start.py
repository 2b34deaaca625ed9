"""A T5 from scratch that starts as BM25 over the trained captions, instead of knowing nothing.

Three captions a picture are too few to learn from nothing which words matter: a T5 with random weights learns its captions
by heart and finds less than BM25 does. But a T5 whose layers pass their input on, whose decoder attends to every word
alike, and whose embeddings are factors of the words' BM25 weights,

    mean over the sentence of E[word]  .  I[identifier]   ~   BM25(sentence, item) / length,

answers as BM25 over its tokens does before the first step, as far as `d_model` dimensions hold it, and training goes on
from there. BM25 has Lucene's idf here: of a word in most captions rank_bm25's floor makes too much. After an identifier the
start says end-of-sequence, so that nothing is left to learn but what stands for what. Nothing enters but the run's own
training texts. (The idea of starting residual branches at zero: Fixup, 1901.09321; of factors of word counts as embeddings:
latent semantic analysis.)
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from imagedex.errors import UserError
from imagedex.retrieval.baselines import BM25
from imagedex.training.identifier_vectors import truncated_svd
from modeling.identifiers import Identifiers

logger = logging.getLogger(__name__)

RIDGE = 0.1
# Embeddings are so much shorter than T5's, and the decoder's last layer norm makes up for it: what dropout leaves of a token
# that the decoder takes away again is then little beside what the sentence says.
GAIN = 10.0
SHARPNESS = 2.0  # of the identifiers' vectors: with less, the words of a sentence are likelier than any identifier
NEXT = 0.3  # length of what says which place comes next, next to 1 of a word that was read: about that of a sentence
ENDING = 4.0  # and of what says that it ends, which nothing must drown
ATTENTION = 10.0  # in nats, of the decoder to the token that was written last


@torch.no_grad()
def start_from_texts(model, tokenizer, identifiers: Identifiers, texts: Sequence[str], seed: int = 0) -> None:
    """Overwrites the T5's start.

    Args:
        model: any T5 of ours, its embeddings already grown to the identifiers' tokens.
        texts: of each item (rows of `identifiers`), its trained captions in one string; "" where there are none.

    Raises: `UserError` where the model's attention is not as wide as the model.
    """
    config = model.config
    if config.num_heads * config.d_kv != config.d_model:
        raise UserError(
            f"--t5_start lexical needs attention as wide as the model: num_heads * d_kv is "
            f"{config.num_heads * config.d_kv} and d_model is {config.d_model}"
        )
    read = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    draw = torch.Generator().manual_seed(seed)
    places = places_of(identifiers)
    reserved = len(places) + 3
    words, items, directions = placed(*lexical_factors(read, config.d_model - reserved, seed), reserved, draw)
    blank, start, *marks, end = directions
    embeddings = model.get_input_embeddings().weight  # (V, d_model)
    scale = config.d_model**0.5 / GAIN
    known = set(identifiers.new_tokens.values())
    for token in sorted(identifiers.known_tokens.values()):  # digits: what no text has must still differ
        words.setdefault(token, F.normalize(torch.randn(config.d_model, generator=draw), dim=0))
    for token in range(len(tokenizer)):
        if token not in known:
            embeddings[token] = scale * words.get(token, blank)
    embeddings[tokenizer.pad_token_id] = scale * start  # the decoder's first token
    embeddings[tokenizer.eos_token_id] = scale * end
    vectors = token_vectors(identifiers, items)
    for token in sorted(known):
        embeddings[token] = SHARPNESS / GAIN * vectors.get(token, torch.zeros(config.d_model))
    for tokens, mark in zip(places, marks, strict=True):
        embeddings[sorted(tokens)] += scale * mark.to(embeddings.device)
    pass_through(model, end)
    model.decoder.final_layer_norm.weight.fill_(GAIN)
    if places:
        length = embeddings[sorted(set().union(*places))].norm(dim=1).mean().item()
        announce(model, [start, *marks, end], length)
    logger.info("starts as BM25 over the training texts, in %d dimensions", config.d_model)


def lexical_factors(documents: Sequence[Sequence[int]], dimensions: int, seed: int = 0):
    """Factors of the BM25 weights: (token -> (dimensions,) unit vector, (N, dimensions) vectors of the documents).

    The words' are their left singular vectors, brought to length 1, since T5's layer norm would; the documents' are then the
    best in the sense of (ridge) least squares. Exact, but for one common factor, where `dimensions` hold all words and there
    are at least as many (independent) documents as words; otherwise the length that a word loses is partly lost with it.
    """
    postings = BM25(documents, epsilon=None).postings
    tokens = sorted(postings)
    places = [torch.from_numpy(postings[token][0]) for token in tokens]
    lines = torch.cat([torch.full((len(rows),), line) for line, rows in enumerate(places)])
    weights = torch.cat([torch.from_numpy(postings[token][1]) for token in tokens])
    shape = len(tokens), len(documents)
    matrix = torch.sparse_coo_tensor(
        torch.stack([lines, torch.cat(places)]), weights, shape, check_invariants=True
    ).coalesce()
    left = truncated_svd(matrix, dimensions, seed)
    values = left.norm(dim=0)
    left = left[:, values > 1e-6 * values.max()]  # what is left of directions that the matrix does not have is noise
    left = F.normalize(F.normalize(left, dim=0), dim=1)  # U, without the singular values; then rows of length 1
    gram = left.T @ left + RIDGE * torch.eye(left.shape[1], dtype=left.dtype)
    items = torch.linalg.solve(gram, (matrix.T @ left).T).T  # (N, rank)
    empty = dimensions - left.shape[1]
    left, items = F.pad(left, (0, empty)).float(), F.pad(items, (0, empty)).float()
    return dict(zip(tokens, left, strict=True)), items


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
    families = [{names.get(token) for token in place} - {None} for place in places]
    for token, name in names.items():
        for place, family in zip(places, families, strict=True):
            if name in family:
                place.add(token)
    return places


def pass_through(model, end: torch.Tensor) -> None:
    """Every residual branch starts at zero, but for the first cross-attention: it adds the mean of what the encoder says.

    Its values are turned by one random rotation and back, so that each head carries a part of every dimension. It is deaf
    to `end`, for every sentence that is read ends, too.
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
    rotation = torch.linalg.qr(torch.randn(attention.v.weight.shape)).Q
    attention.v.weight.copy_(rotation - torch.outer(rotation @ end, end))
    attention.o.weight.copy_(rotation.T)
    attention.q.weight.zero_()


def announce(model, steps: list[torch.Tensor], length: float) -> None:
    """The decoder's first self-attention looks at the last token alone, takes it away and says what comes next.

    What is left is what the cross-attention adds, at every place of an identifier as at the first. Words are tied, so the
    decoder would otherwise say again what it has just written; and the first thing that a picture teaches would be to end,
    which a fast vision tower then does at the first place, too, alike for all pictures.

    Args:
        steps: unit vectors (d_model,): of the decoder's first token, of the tokens of each place, of the end.
        length: of the identifiers' embeddings, on average.
    """
    attention, width = model.decoder.block[0].layer[0].SelfAttention, model.config.d_model
    change = -length * torch.eye(width)  # of the direction of a token's embedding
    change += (length - width**0.5 / GAIN) * torch.outer(steps[0], steps[0])  # the first token's length is this
    for step, following in zip(steps[:-1], steps[1:], strict=True):
        share = 1 if step is steps[0] else width**0.5 / GAIN / length  # of this direction in its token's embedding
        loudness = (ENDING if following is steps[-1] else NEXT) * width**0.5
        change += loudness / share * torch.outer(following, step)
    change /= width**0.5  # the length that the layer norm gives
    rotation = torch.linalg.qr(torch.randn(width, width)).Q  # so that each head carries a part of every dimension
    attention.v.weight.copy_(rotation)
    attention.o.weight.copy_(change @ rotation.T)
    attention.q.weight.zero_()
    attention.relative_attention_bias.weight.zero_()
    attention.relative_attention_bias.weight[0] = ATTENTION  # of the distance 0
