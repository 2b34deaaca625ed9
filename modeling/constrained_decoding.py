"""Decoding that can only write identifiers: a LogitsProcessor, a ranking by beams, and the exact scores of all of them.

The score of an identifier is the sum of its tokens' log-probabilities over the full vocabulary, end-of-sequence included:
what the trie forbids is not renormalised away, and there is no length penalty.
"""

import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .beam_search import search_identifiers
from .identifier_trie import IdentifierTrie
from .identifiers import Identifiers
from .towers import evaluating

logger = logging.get_logger(__name__)

# `generate` marks beams that are copies, or do not end, by adding -1e9 to their score
LEAST_SCORE = -1e8


class IdentifierConstraint(LogitsProcessor):
    """Leaves to every beam the tokens that its prefix may go on with in the trie; the others get -inf.

    Works in plain `generate` (greedy, sampling, beams; any batch, any device) and keeps no state between steps.
    A beam that has written a whole identifier may go on with padding only; one that is no prefix of an identifier keeps
    nothing. With beams, `generate` takes the logarithm of the softmax before it asks, so that scores stay as they are.
    Asked for more beams than there are identifiers, `generate` fills up with copies whose scores are about -1e9;
    `rank_identifiers` does not.

    Args:
        trie: of all identifiers; moved to the device of the scores when it is first needed.
        prompt_length: tokens that stand before the identifier (1: the decoder's start token).
        pad_token_id: what follows the end of a finished beam.
    """

    def __init__(self, trie: IdentifierTrie, prompt_length: int = 1, pad_token_id: int = 0):
        self.trie, self.prompt_length, self.pad_token_id = trie, prompt_length, pad_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Decoder tokens (M, t) and scores (M, V) -> scores (M, V)."""
        _check_vocabulary(self.trie, scores.shape[1])
        trie = self.trie.to(scores.device)
        nodes = trie.walk(input_ids[:, self.prompt_length :], hold=True)
        if input_ids.shape[1] == self.prompt_length:
            # All beams stand at the root, which has the most children (atomic: all identifiers): one mask serves them all.
            forbidden = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
            forbidden[trie.children(nodes[:1])[1]] = False
            return scores.masked_fill(forbidden, -torch.inf)
        beams, tokens = trie.children(nodes)
        allowed = torch.full_like(scores, -torch.inf)
        allowed[beams, tokens] = scores[beams, tokens]
        finished = trie.is_end(nodes)
        allowed[finished, self.pad_token_id] = scores[finished, self.pad_token_id]
        return allowed


@torch.no_grad()
def rank_identifiers(
    model,
    identifiers: Identifiers,
    inputs: dict,
    num_beams: int,
    k: int | None = None,
    over: str = "vocabulary",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best identifiers for each query by constrained beam search.

    With at least as many beams as there are identifiers the ranking is the exhaustive one (`score_identifiers`). A T5
    (CodebookT5, VisionGroundedT5) is searched by `search_identifiers`; any other encoder-decoder, and one whose parameters are
    sharded (FSDP2) or offloaded, by its own `generate`, which finds the same and takes longer.

    Args:
        inputs: what the model's `generate` takes, for B queries: `input_ids` and `attention_mask`, or `pixel_values`, or
            `encoder_outputs` and `attention_mask`; `synced_gpus` where processes have to call the model equally often.
        num_beams: beams a query, at most the number of identifiers is used.
        k: how many to return (num_beams without); no more than `num_beams` of them can be found.
        over: what the score is a log-probability over: "vocabulary", or faster, and another score, "children" (`Scores`).

    Returns:
        scores: (B, k) float32, descending; -inf where no further identifier was found.
        rows: (B, k) int64, rows in `identifiers.image_ids`; -1 there. No row twice in one query.

    Raises: `FloatingPointError` where nothing has a score, because the model gives NaN or infinity.
    """
    k = num_beams if k is None else k
    if num_beams < 1 or k < 1:
        raise ValueError(f"num_beams and k must be 1 or more, got {num_beams} and {k}")
    if over not in ("vocabulary", "children"):
        raise ValueError(f'over={over!r} is neither "vocabulary" nor "children"')
    beams = min(num_beams, len(identifiers))
    search = _by_our_beams if searchable(model, inputs) else _by_generate
    with evaluating(model):
        found, found_rows = search(model, identifiers, inputs, beams, over)
    found, found_rows = found[:, :k], found_rows[:, :k]
    valid = (found > LEAST_SCORE) & (found_rows >= 0)
    if not valid.any(1).all():
        raise FloatingPointError(
            "the model gives no identifier a score but NaN or infinity; its weights or its precision are broken"
        )
    behind = (0, k - found.shape[1])
    scores = F.pad(torch.where(valid, found, -torch.inf), behind, value=-torch.inf)
    return scores, F.pad(torch.where(valid, found_rows, -1), behind, value=-1)


def searchable(model, inputs: dict) -> bool:
    """Whether `search_identifiers` can decode in this model: a T5 whose layers can be called one by one."""
    if not isinstance(model, T5ForConditionalGeneration):
        logger.warning_once(
            f"{type(model).__name__} is no T5ForConditionalGeneration: its identifiers are searched by its own generate, "
            "which takes longer"
        )
        return False
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    elsewhere = any(
        hasattr(p, "full_tensor") or p.is_meta for p in model.parameters()
    )  # sharded, or fetched when needed
    return not (spread or inputs.get("synced_gpus") or elsewhere)


def _by_our_beams(model, identifiers: Identifiers, inputs: dict, beams: int, over: str):
    _check_vocabulary(identifiers.trie, model.config.vocab_size)
    states, mask = _encode(model, {name: value for name, value in inputs.items() if name != "synced_gpus"})
    trie = identifiers.trie.to(states.device)
    start = _token_id(model, "decoder_start_token_id")
    return search_identifiers(model, trie, states, mask, beams, start, over)


def _by_generate(model, identifiers: Identifiers, inputs: dict, beams: int, over: str):
    """As `search_identifiers`, by the model's own `generate`."""
    if over != "vocabulary":
        raise ValueError(f"over={over!r} needs a T5 in one place; {type(model).__name__} is searched by generate here")
    pad = _token_id(model, "pad_token_id")
    search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0, "early_stopping": False}
    output = model.generate(
        **inputs,
        **(search | {"output_scores": True} if beams > 1 else {"num_beams": 1, "output_logits": True}),
        do_sample=False,
        min_length=0,
        max_new_tokens=identifiers.max_length,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        decoder_start_token_id=_token_id(model, "decoder_start_token_id"),
        eos_token_id=identifiers.eos_token_id,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([IdentifierConstraint(identifiers.trie, 1, pad)]),
        return_dict_in_generate=True,
    )
    written = output.sequences[:, 1:]
    found = output.sequences_scores if beams > 1 else _greedy_scores(output.logits, written, identifiers.eos_token_id)
    trie = identifiers.trie.to(written.device)
    return found.float().view(-1, beams), trie.rows_of(trie.walk(written, hold=True)).view(-1, beams)


@torch.no_grad()
def score_identifiers(model, identifiers: Identifiers, inputs: dict, rows=None, batch_size: int = 256) -> torch.Tensor:
    """The exact score of every identifier for every query, by teacher forcing; the encoder runs once a query.

    Args:
        model, inputs: as in `rank_identifiers`; queries are encoded by the model's `encode`, or by its encoder.
        rows: (R,) which identifiers, all of them without.
        batch_size: sequences in one pass of the decoder.

    Returns:
        (B, R) float32 log-probabilities, R = N without `rows`.
    """
    scores = None
    for pairs, logits, labels, shape in _teacher_forced(model, identifiers, inputs, rows, batch_size):
        scores = torch.empty(shape, device=logits.device) if scores is None else scores
        scores.view(-1)[pairs] = sequence_log_probs(logits, labels)
    return scores


@torch.no_grad()
def identifier_steps(
    model, identifiers: Identifiers, inputs: dict, rows=None, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How identifiers are written: what each of their tokens costs, and among how many it was chosen.

    Args: as of `score_identifiers`.

    Returns:
        log_probs: (B, R, T) float32, of each token over the full vocabulary, end-of-sequence included; 0 behind it. Their sum is
            the identifier's score.
        labels: (R, T) the tokens, -100 behind the end.
        choices: (R, T) how many tokens the trie allows at that step, itself included; 0 behind the end.
    """
    steps = None
    for pairs, logits, labels, shape in _teacher_forced(model, identifiers, inputs, rows, batch_size):
        steps = torch.empty(*shape, labels.shape[1], device=logits.device) if steps is None else steps
        steps.view(-1, labels.shape[1])[pairs] = token_log_probs(logits, labels)
    labels = torch.from_numpy(identifiers.padded(rows))
    return steps, labels, identifiers.trie.choices(labels)


def _teacher_forced(model, identifiers: Identifiers, inputs: dict, rows, batch_size: int):
    """Yields (pairs (M,), logits (M, T, V), labels (M, T), (B, R)): the pair b * R + r is query b with identifier r."""
    _check_vocabulary(identifiers.trie, model.config.vocab_size)
    with evaluating(model):
        states, mask = _encode(model, inputs)
        labels = torch.from_numpy(identifiers.padded(rows)).to(states.device)
        start = _token_id(model, "decoder_start_token_id")
        shape = len(states), len(labels)
        for pairs in torch.arange(shape[0] * shape[1], device=states.device).split(batch_size):
            query, target = pairs // shape[1], labels[pairs % shape[1]]
            decoder_input = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1].clamp(min=0)], dim=1)
            logits = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[query]),
                attention_mask=None if mask is None else mask[query],
                decoder_input_ids=decoder_input,
                use_cache=False,
            ).logits
            yield pairs, logits, target, shape


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (M, T, V) and labels (M, T), -100 where there is no token -> log-probability of each sequence (M,) float32."""
    return token_log_probs(logits, labels).sum(1)


def token_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `sequence_log_probs`, of each token: (M, T) float32, 0 where there is none."""
    logits = logits.float()
    chosen = logits.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return torch.where(labels >= 0, chosen - logits.logsumexp(2), 0)


def _greedy_scores(logits: tuple[torch.Tensor, ...], written: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Raw logits, T of (B, V), and what was written (B, T) -> log-probability up to the end of sequence (B,)."""
    ends = (written == eos_token_id).cumsum(1)
    behind = (ends > 0) & ~((written == eos_token_id) & (ends == 1))
    return sequence_log_probs(torch.stack(logits, dim=1), written.masked_fill(behind, -100))


def _encode(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encoder states (B, S, d) and their mask (B, S). As in `generate`, targets that a Trainer passes along are left out."""
    inputs = {name: value for name, value in inputs.items() if name != "labels" and not name.startswith("target_")}
    mask = inputs.get("attention_mask")
    if inputs.get("encoder_outputs") is not None:
        return inputs["encoder_outputs"][0], mask
    if hasattr(model, "encode"):
        output, mask = model.encode(**inputs)
        return output.last_hidden_state, mask
    output = model.get_encoder()(**inputs, return_dict=True)
    return output.last_hidden_state, mask


def _check_vocabulary(trie: IdentifierTrie, vocab_size: int) -> None:
    if trie.vocab_size > vocab_size:
        raise ValueError(
            f"the identifiers use token {trie.vocab_size - 1}, but the model has only {vocab_size} tokens; resize its "
            "embeddings to the tokenizer's length"
        )


def _token_id(model, name: str) -> int:
    """A special token's id from the generation config, else from the config; padding is 0 and starts a T5 decoder."""
    for config in (model.generation_config, model.config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return 0 if name == "pad_token_id" else _token_id(model, "pad_token_id")
