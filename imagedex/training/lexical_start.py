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
SHARPNESS = 2.0  # of the identifiers' vectors: with less, the words of a sentence are likelier than any identifier
ENDING = 10.0  # how many times louder the end is than what is written


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
    words, items, (blank, end, mark) = placed(*lexical_factors(read, config.d_model - 3, seed), draw)
    embeddings = model.get_input_embeddings().weight  # (V, d_model)
    scale = config.d_model**0.5  # of T5's own start: every dimension has variance 1
    known = set(identifiers.new_tokens.values())
    for token in sorted(identifiers.known_tokens.values()):  # digits: what no text has must still differ
        words.setdefault(token, F.normalize(torch.randn(config.d_model, generator=draw), dim=0))
    for token in range(len(tokenizer)):
        if token not in known:
            embeddings[token] = scale * words.get(token, blank)
    embeddings[tokenizer.pad_token_id] = blank  # the decoder's first token: next to what it attends to, nothing
    embeddings[tokenizer.eos_token_id] = scale * end
    for token, vector in token_vectors(identifiers, items).items():
        embeddings[token] = SHARPNESS * vector
    for token in last_tokens(identifiers) & known:
        embeddings[token] += scale * mark
    pass_through(model, end)
    end_after_mark(model, mark, end)
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


def placed(words: dict[int, torch.Tensor], items: torch.Tensor, draw: torch.Generator):
    """The same factors in a space of three dimensions more, turned at random so that dropout of one coordinate takes a little
    of everything; and (3, dimensions + 3) unit vectors of the directions of which no word and no item has any."""
    width = items.shape[1] + 3
    turn = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    return {token: vector @ turn[:-3] for token, vector in words.items()}, items @ turn[:-3], turn[-3:]


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


def last_tokens(identifiers: Identifiers) -> set[int]:
    """The tokens that stand at the end of identifiers and nowhere else."""
    ends = identifiers.offsets[1:] - 1
    inside = np.delete(identifiers.tokens, ends)
    return set(identifiers.tokens[ends].tolist()) - set(inside.tolist())


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


def end_after_mark(model, mark: torch.Tensor, end: torch.Tensor) -> None:
    """After a token with a share of `mark` the decoder says `end`: an eighth of its last feed-forward neurons see to that.

    Otherwise the first thing a picture would teach is to end: with a fast vision tower it does so at the first place, too,
    and then looks alike for all pictures.
    """
    feed_forward = model.decoder.block[-1].layer[-1].DenseReluDense
    neurons = max(1, model.config.d_ff // 8)  # enough that dropout never takes them all
    for name in ("wi", "wi_0", "wi_1"):  # plain, or gated as in T5 1.1
        if hasattr(feed_forward, name):
            getattr(feed_forward, name).weight[:neurons] = mark
    feed_forward.wo.weight[:, :neurons] = ENDING / neurons * end[:, None]
