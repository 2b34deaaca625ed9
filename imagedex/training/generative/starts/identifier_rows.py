"""Where the rows of new identifier tokens start, in a T5 that knows its words already.

A T5 scores a token by the product of what its decoder says (the state at that place) and the token's row of the output layer.
Transformers draws new rows around the mean of the old ones, so near each other (a spread of 3e-5 where words have 1) that
no state tells them apart, and training stays at chance. Here a row starts as what the pretrained T5 itself says when it reads the
sentences that this token stands for,

    row  ~  S^-1 (mean state over the token's sentences  -  mean state over all sentences that lead to this place)

with S how much the states of one item's sentences differ from each other: linear discriminant analysis (Fisher, 1936), so that
what says nothing of the item weighs little. What all states have in common is taken out of every row, for it would favour some
items whatever is asked. Sentences which T5 reads alike then find the same items before the first step. Every row is as long as
words' rows are. Nothing enters but the run's own training texts; and, for items that have none, their pictures.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from imagedex.identifiers.picture_rows import LEAST_KNOWN, predicted_rows
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.towers import evaluating

logger = logging.getLogger(__name__)

SENTENCES_AN_ITEM = 8  # more do not make an item's mean better
ROWS_AT_ONCE = 128
SHRINKAGE = 1.0  # of S towards the same spread in all directions


@torch.no_grad()
def start_rows(
    model,
    tokenizer,
    identifiers: Identifiers,
    sentences: Sequence[Sequence[dict]],
    pictures: Callable[[], np.ndarray | None] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Writes the rows of the identifiers' new tokens: of the output layer, and of the input where that is another.

    Args:
        model: any T5 of ours with pretrained words, on its device, its embeddings grown to the tokenizer.
        sentences: of each item (rows of `identifiers`) its trained sentences as tokens (`input_ids`, `attention_mask`), as
            training writes them.
        pictures: -> one vector an item (N, D), asked for when some item has no sentence. seed: of what is drawn where
            nothing is known.
    """
    new = set(identifiers.new_tokens.values())
    if not new:
        return
    words = torch.tensor([row for row in range(len(tokenizer)) if row not in new])
    draw_rows(model, sorted(new), words, torch.Generator().manual_seed(seed))
    spoken = [row for row, own in enumerate(sentences) if own]
    if not spoken:
        return logger.info("no item has a sentence: the rows of %d new tokens start at random", len(new))
    labels = torch.from_numpy(identifiers.padded())
    flat = [(own[place], row) for row, own in enumerate(sentences) for place in evenly(len(own))]
    output = model.get_output_embeddings().weight
    length = typical_length(output, words)
    vectors = pictures() if pictures and len(spoken) < len(sentences) else None
    for place in range(labels.shape[1] - 1):
        if not new & set(labels[:, place].tolist()):
            continue
        means, moment = item_states(model, tokenizer, flat, labels, place, progress)
        metric = discriminant(means, moment, flat)
        common = F.normalize(means[spoken].mean(0), dim=0)
        rows = {token: row @ metric for token, row in token_rows(means, labels, place, new, spoken).items()}
        rows = {token: row - (row @ common) * common for token, row in rows.items()}
        if vectors is not None:
            rows |= rows_from_pictures(rows, labels[:, place], new, torch.from_numpy(vectors))
        for token, row in rows.items():
            output[token] = (length * F.normalize(row, dim=0)).to(output)
    write_inputs(model, identifiers, flat, words)
    logger.info(
        "the rows of %d new tokens start from %d sentences, as long as words' rows are (%.3g)",
        len(new), len(flat), length,
    )  # fmt: skip


def evenly(count: int) -> list[int]:
    """At most `SENTENCES_AN_ITEM` of `count` places."""
    taken = min(count, SENTENCES_AN_ITEM)
    return [place * count // taken for place in range(taken)]


def typical_length(weight: torch.Tensor, words: torch.Tensor) -> float:
    """Root mean square length of the words' rows."""
    return weight[words.to(weight.device)].float().square().sum(1).mean().sqrt().item()


def draw_rows(model, tokens: list[int], words: torch.Tensor, generator: torch.Generator) -> None:
    """Random rows at the words' scale, for tokens of which nothing is known (spare suffixes); input and output alike."""
    for weight in {id(part.weight): part.weight for part in (model.shared, model.get_output_embeddings())}.values():
        drawn = F.normalize(torch.randn(len(tokens), weight.shape[1], generator=generator), dim=1)
        weight[tokens] = (typical_length(weight, words) * drawn).to(weight)


def item_states(model, tokenizer, flat: Iterable[tuple[dict, int]], labels, place: int, progress: bool):
    """The states from which token `place` of each sentence's identifier is written: their mean over an item's sentences
    (N, d_model), NaN for an item without any; and the mean of their outer products (d_model, d_model), float64."""
    device, width = model.shared.weight.device, model.config.d_model
    sums, counts = torch.zeros(len(labels), width), torch.zeros(len(labels))
    moment = torch.zeros(width, width, dtype=torch.float64)
    start = torch.full((len(labels), 1), model.config.decoder_start_token_id)
    prefixes = torch.cat([start, labels[:, :place].clamp(min=0)], dim=1)
    batches = range(0, len(flat), ROWS_AT_ONCE)
    with evaluating(model):
        for first in tqdm(batches, desc="Rows of identifiers", disable=not progress, leave=False):
            part = flat[first : first + ROWS_AT_ONCE]
            inputs = tokenizer.pad([tokens for tokens, _ in part], return_tensors="pt").to(device)
            owners = torch.tensor([row for _, row in part])
            encoded = model.get_encoder()(**inputs).last_hidden_state
            states = model.get_decoder()(
                input_ids=prefixes[owners].to(device),
                encoder_hidden_states=encoded,
                encoder_attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state[:, -1]
            states = states.float().cpu()
            sums.index_add_(0, owners, states)
            counts.index_add_(0, owners, torch.ones(len(part)))
            moment += states.T.double() @ states.double()
    return sums / counts.where(counts > 0, torch.nan)[:, None], moment / len(flat)


def discriminant(means: torch.Tensor, moment: torch.Tensor, flat: Sequence[tuple[dict, int]]) -> torch.Tensor:
    """(d_model, d_model): the inverse of the covariance of states about their item's mean; where no item has two sentences,
    about the mean of all.

    Args: means and moment, of `item_states`.
    """
    own = means[[row for _, row in flat]].double()
    within = moment - own.T @ own / len(flat)
    if within.diagonal().mean() <= 1e-6 * moment.diagonal().mean():
        middle = own.mean(0)
        within = moment - torch.outer(middle, middle)
    spread = within.diagonal().mean().clamp_min(1e-12)
    shrunken = within + SHRINKAGE * spread * torch.eye(len(within), dtype=within.dtype)
    return torch.linalg.inv(shrunken).float()


def token_rows(means: torch.Tensor, labels: torch.Tensor, place: int, new: set[int], spoken: Sequence[int]):
    """Token -> the mean of its items' states, without the mean of all items that share the tokens before it.

    Args: means (N, d_model), see `item_states`; spoken, the items that have sentences.
    """
    groups: dict[tuple, list[int]] = {}
    for row in spoken:
        groups.setdefault(tuple(labels[row, :place].tolist()), []).append(row)
    centred = means.clone()
    for rows in groups.values():
        # a group of one says nothing of what sets it apart: it is compared with all
        centred[rows] -= (means[rows] if len(rows) > 1 else means[list(spoken)]).mean(0)
    holders: dict[int, list[int]] = {}
    for row in spoken:
        token = int(labels[row, place])
        if token in new:
            holders.setdefault(token, []).append(row)
    return {token: centred[rows].mean(0) for token, rows in holders.items()}


def rows_from_pictures(rows: dict[int, torch.Tensor], tokens: torch.Tensor, new: set[int], vectors: torch.Tensor):
    """Rows of the tokens that no sentence stands behind, from the pictures; nothing where too few have one.

    Args: rows, of the tokens known; tokens (N,), of each item; vectors (N, D), of each item's picture.
    """
    known = [row for row, token in enumerate(tokens.tolist()) if token in rows]
    silent = {token: row for row, token in enumerate(tokens.tolist()) if token in new and token not in rows}
    if len(known) < LEAST_KNOWN or not silent:
        return {}
    targets = F.normalize(torch.stack([rows[int(tokens[row])] for row in known]), dim=1)
    predicted, agreement = predicted_rows(vectors[known], targets, vectors[list(silent.values())])
    logger.info(
        "%d items have no sentence: their rows start from their pictures (agreement on the others: %.2f)",
        len(silent), agreement,
    )  # fmt: skip
    return dict(zip(silent, predicted, strict=True))


def write_inputs(model, identifiers: Identifiers, flat: Sequence[tuple[dict, int]], words: torch.Tensor) -> None:
    """Where the input's rows are not the output's (T5 1.1): each new token starts as the mean of its sentences' words."""
    inputs = model.shared.weight
    if inputs is model.get_output_embeddings().weight:
        return
    new, spoken = set(identifiers.new_tokens.values()), {}
    for tokens, row in flat:
        own = inputs[torch.as_tensor(tokens["input_ids"], device=inputs.device)].float().mean(0)
        for token in identifiers.sequence(identifiers.image_ids[row]):
            if token in new:
                spoken.setdefault(token, []).append(own)
    if not spoken:
        return
    means = {token: torch.stack(own).mean(0) for token, own in spoken.items()}
    middle, length = torch.stack(list(means.values())).mean(0), typical_length(inputs, words)
    for token, mean in means.items():
        inputs[token] = (length * F.normalize(mean - middle, dim=0)).to(inputs)
