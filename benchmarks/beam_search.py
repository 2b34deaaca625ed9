"""The search for identifiers against the floor, transformers' `generate` and our LogitsProcessor in `generate`.

    python benchmarks/beam_search.py              # minutes on two cores; a GPU when there is one
    python benchmarks/beam_search.py --small      # a minute: 4 queries, 5,000 identifiers

A T5 of t5-small's size with random weights answers the same queries in each way, from what its encoder gave, in turns. The floor
is T5's own decoder and full output layer on just the rows that must be scored, with one copy of the encoder's keys and values: no
trie, no choice of beams, no softmax. The last row of each scheme says what share of our search is neither decoder nor output
layer with its softmax, at ten times the identifiers.
"""

import argparse
import csv
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WORDS, DIGITS, EOS = 32128, range(100, 110), 1
COLUMNS = ("scheme", "identifiers", "way", "ms", "ms_least", "ms_most", "over_floor", "over_floor_least", "over_floor_most",
           "generate_over_it", "constraint_percent", "constraint_percent_most",
           "batch", "beams", "input_tokens", "repeats", "hardware", "threads", "torch",
           "transformers", "python")  # fmt: skip


def tokens_of(scheme: str, count: int) -> list[list[int]]:
    """As `assign_identifiers` writes them: rq of 4 levels x 64 codes, with a suffix where codes are the same; naive digits."""
    rng = np.random.default_rng(0)
    if scheme == "naive":
        return [[DIGITS[int(digit)] for digit in str(number)] for number in rng.permutation(count)]
    found: dict[tuple, int] = {}
    sequences = []
    for codes in rng.integers(0, 64, (count, 4)):
        tokens = [WORDS + 64 * level + int(code) for level, code in enumerate(codes)]
        suffix = found[tuple(tokens)] = found.get(tuple(tokens), -1) + 1
        sequences.append([*tokens, WORDS + 256 + suffix])
    return sequences


def identifiers_of(scheme: str, count: int):
    from imagedex.modeling.identifiers import Identifiers

    return Identifiers.from_sequences(scheme, [str(n) for n in range(count)], tokens_of(scheme, count), EOS)


def t5_small(device):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=WORDS + 300, decoder_start_token_id=0)).to(device).eval()
    with torch.no_grad():
        model.shared.weight.mul_(0.3)  # or one word, by chance, would have all of the probability
    return model


class Ways:
    """Each way to answer the same queries, of which `states` is what the encoder gave."""

    def __init__(self, model, identifiers, states, beams):
        self.model, self.identifiers, self.states, self.beams = model, identifiers, states, beams
        self.rows = [min(beams, level.inner) for level in identifiers.trie.levels]  # beams of a query at each step

    @property
    def inputs(self) -> dict:
        """Made anew each time: `generate` repeats them in place."""
        from transformers.modeling_outputs import BaseModelOutput

        mask = self.states.new_ones(self.states.shape[:2]).long()
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=self.states), "attention_mask": mask}

    def floor(self):
        from transformers import DynamicCache, EncoderDecoderCache

        config = self.model.decoder.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        for beams in self.rows:
            written = self.states.new_zeros(len(self.states), beams).long()
            self.model(**self.inputs, decoder_input_ids=written, cache=cache, use_cache=True)

    def generate(self):
        """With transformers' own `prefix_allowed_tokens_fn`: a dictionary of prefixes."""
        self._generate(prefix_allowed_tokens_fn=self.allowed)

    def processor(self):
        from transformers import LogitsProcessorList

        from imagedex.modeling.constrained_decoding import IdentifierConstraint

        self._generate(logits_processor=LogitsProcessorList([IdentifierConstraint(self.identifiers.trie)]))

    def _generate(self, **constraint):
        search = {"num_beams": self.beams, "num_return_sequences": self.beams, "length_penalty": 0.0}
        search |= {"early_stopping": False, "max_new_tokens": self.identifiers.max_length, "do_sample": False}
        self.model.generate(**self.inputs, **search, **constraint, eos_token_id=EOS, pad_token_id=0)

    def allowed(self, _, prefix):
        if not hasattr(self, "following"):
            self.following = {}
            for sequence in tokens_of(self.identifiers.scheme, len(self.identifiers)):
                for length, token in enumerate([*sequence, EOS]):
                    self.following.setdefault(tuple(sequence[:length]), set()).add(token)
            self.following = {prefix: sorted(tokens) for prefix, tokens in self.following.items()}
        return self.following.get(tuple(prefix.tolist()[1:]), [0])

    def ours(self):
        from imagedex.modeling.constrained_decoding import rank_identifiers

        rank_identifiers(self.model, self.identifiers, self.inputs, self.beams)

    def children(self):
        from imagedex.modeling.constrained_decoding import rank_identifiers

        rank_identifiers(self.model, self.identifiers, self.inputs, self.beams, over="children")


NAMES = {
    "floor": "the floor",
    "generate": "generate, prefix_allowed_tokens_fn",
    "processor": "generate, our LogitsProcessor",
    "ours": "our search",
    "children": "our search, scores over children",
}


def timed(call) -> float:
    import torch

    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def figures(own: list[float], floor: list[float], generate: list[float]) -> dict:
    """Medians and extremes; ratios are of the same turn."""
    over, gain = np.divide(own, floor), np.divide(generate, own)
    times = {"ms": 1000 * np.median(own), "ms_least": 1000 * min(own), "ms_most": 1000 * max(own)}
    ratios = {"over_floor": np.median(over), "over_floor_least": over.min(), "over_floor_most": over.max()}
    found = times | ratios | {"generate_over_it": np.median(gain)}
    return {name: round(float(value), 2) for name, value in found.items()}


def compared(ways: Ways, repeats: int) -> list[dict]:
    import torch

    seconds = {name: [] for name in NAMES}
    with torch.no_grad():
        for turn in range(repeats + 1):  # the first one warms up
            for name in NAMES:
                took = timed(getattr(ways, name))
                if turn:
                    seconds[name].append(took)
    return [
        {"way": shown} | figures(seconds[name], seconds["floor"], seconds["generate"]) for name, shown in NAMES.items()
    ]


def constraint_share(ways: Ways, repeats: int) -> list[float]:
    """Per cent of our search that are neither decoder nor output layer: the trie, the choice of beams. One a repeat."""
    from imagedex.modeling.beam_search import BeamDecoder, Scores

    spent = []

    def counting(method):
        def call(*args):
            found = []
            spent.append(timed(lambda: found.append(method(*args))))
            return found[0]

        return call

    shares = []
    with ExitStack() as patches:
        for owner, name in (
            (BeamDecoder, "__init__"),
            (BeamDecoder, "__call__"),
            (Scores, "logits"),
            (Scores, "of_tokens"),
        ):
            patches.enter_context(mock.patch.object(owner, name, counting(getattr(owner, name))))
        for _ in range(repeats + 1):
            spent.clear()
            took = timed(ways.ours)
            shares.append(100 * (1 - sum(spent) / took))
    return shares[1:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="4 queries, 5,000 identifiers, 2 turns, nothing written")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the figures are their medians")
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--input_tokens", type=int, default=16, help="of each query")
    parser.add_argument("--output_dir", default=str(ROOT / "benchmarks" / "results"), help="where the table goes")
    arguments = parser.parse_args()
    batch, count, repeats = (4, 5_000, 2) if arguments.small else (32, 100_000, arguments.repeats)

    import torch
    import transformers
    from gradient_cache_memory import hardware

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = t5_small(device)
    versions = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
    same = {"batch": batch, "beams": arguments.beams, "input_tokens": arguments.input_tokens, "repeats": repeats}
    same |= {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }
    with torch.no_grad():
        ids = torch.randint(2, WORDS, (batch, arguments.input_tokens), device=device)
        states = model.encoder(input_ids=ids).last_hidden_state
    rows = []
    for scheme in ("rq", "naive"):
        found = compared(Ways(model, identifiers_of(scheme, count), states, arguments.beams), repeats)
        shares = constraint_share(Ways(model, identifiers_of(scheme, 10 * count), states, arguments.beams), repeats)
        rows += [{"scheme": scheme, "identifiers": count} | row | same for row in found]
        share = {
            "constraint_percent": round(float(np.median(shares)), 2),
            "constraint_percent_most": round(max(shares), 2),
        }
        rows.append({"scheme": scheme, "identifiers": 10 * count, "way": NAMES["ours"]} | share | same)
        for row in rows[-len(found) - 1 :]:
            print(*(f"{name} {row[name]}" for name in COLUMNS[:12] if name in row), sep=", ", flush=True)
    if arguments.small:
        return
    path = Path(arguments.output_dir) / f"beam_search-{same['hardware']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
