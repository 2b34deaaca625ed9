"""The way through the trie: how a model that writes identifiers came to a picture, step by step."""

from collections.abc import Sequence
from typing import NamedTuple

from .constrained_decoding import identifier_steps
from .identifiers import Identifiers


class Step(NamedTuple):
    """One token of an identifier. log_prob: in nats, over the full vocabulary; choices: how many tokens the trie allowed here."""

    token: str
    log_prob: float
    choices: int


def identifier_paths(
    model, identifiers: Identifiers, inputs: dict, image_ids: Sequence[str], tokenizer
) -> list[list[Step]]:
    """For each picture the steps in which its identifier is written, end-of-sequence last, by one teacher-forced pass. The sum of
    a picture's log-probabilities is its score.

    Args: model, inputs: of one query, as in `rank_identifiers`. Raises: `KeyError` for a picture without an identifier.
    """
    rows = [identifiers.row(image_id) for image_id in image_ids]
    if not rows:
        return []
    log_probs, labels, choices = identifier_steps(model, identifiers, inputs, rows)
    paths = []
    for tokens, costs, widths in zip(labels.tolist(), log_probs[0].tolist(), choices.tolist(), strict=True):
        length = tokens.index(identifiers.eos_token_id) + 1
        texts = tokenizer.convert_ids_to_tokens(tokens[:length])
        paths.append([Step(*step) for step in zip(texts, costs, widths, strict=False)])
    return paths
