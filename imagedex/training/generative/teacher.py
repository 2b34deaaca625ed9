"""Soft targets: a frozen encoder says how well each training sentence fits every item, and that is learned beside the labels.

A label names one item and calls all others wrong alike, the picture of the same scene and that of another world. A teacher
tells them apart, and whatever is drawn of a caption (words left out, words of several captions) it judges what is really
there. So a T5 that has read little learns from few captions what a sentence encoder has read of many (Hinton et al.,
1503.02531).

For the identifier's token at place t the target is, of the items whose identifiers begin as the label's does, the share of
each next token in the teacher's softmax. So all schemes are taught alike; a place with one possible token teaches nothing.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig

from imagedex.checkpoints import from_hub, read_model_type
from imagedex.corpora.indexed import IndexedSplits
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images, encode_texts
from imagedex.errors import UserError
from imagedex.evaluation.baselines import TextEncoder, mean_caption_vectors
from imagedex.identifiers.vectors import check_same_split
from imagedex.modeling.identifiers import Identifiers
from imagedex.training.generative.arguments import TeacherArguments

logger = logging.getLogger(__name__)

FLAG = "teacher_model_name_or_path"
TEMPERATURES = [0.01 * 1.25**step for step in range(14)]  # 0.01 to 0.18
SENTENCES_FOR_TEMPERATURE = 2000


class Teacher:
    """Scores every item for sentences.

    Args:
        encode: sentences (B) -> (B, D) unit vectors, on any device.
        items: (N, D) unit vectors, in the identifiers' order; NaN of an item of which nothing is known: it gets no share.
        temperature: by which cosines are divided.
        identifiers: of the N items.
        weight: of its loss. name: for people.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], torch.Tensor], items: torch.Tensor, temperature: float,
        identifiers: Identifiers, weight: float = 1.0, name: str = "",
    ):  # fmt: skip
        self.encode, self.temperature, self.weight, self.name = encode, temperature, weight, name
        self.known = ~items.isnan().any(1)
        self.items, self.sequences = items.nan_to_num(), torch.from_numpy(identifiers.padded()).long()

    def to(self, device) -> "Teacher":
        for name in ("known", "items", "sequences"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @torch.no_grad()
    def scores(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, N) cosines over the temperature; -inf of items of which nothing is known."""
        cosines = self.encode(sentences).to(self.items) @ self.items.T
        return (cosines / self.temperature).masked_fill(~self.known, -torch.inf)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, sentences: Sequence[str]) -> torch.Tensor:
        """`weight` times the sum of the divergence KL(teacher || model) in nats over the sentences' labels, over the number of
        labels in the whole batch: as the cross-entropy counts.

        Args: logits (rows, L or more, V) and labels (rows, L), -100 where padded; the sentences' rows are the first.
        """
        self.to(logits.device)
        own, scores = labels[: len(sentences)], self.scores(sentences)
        same = torch.ones_like(scores, dtype=torch.bool)  # whose identifiers begin as the label's
        total = logits.new_zeros((), dtype=torch.float32)
        for place in range(own.shape[1]):
            targets, taught = self.next_tokens(scores, same, own[:, place], place, logits.shape[-1])
            log_probs = F.log_softmax(logits[: len(sentences), place].float(), dim=-1)
            divergence = (torch.xlogy(targets, targets) - targets * log_probs).sum(-1)
            total = total + divergence[taught].sum()
            same &= self.sequences[:, place] == own[:, place, None]
        return self.weight * total / (labels != -100).sum()

    def next_tokens(self, scores, same, label: torch.Tensor, place: int, vocabulary: int):
        """(B, V) the teacher's shares of the tokens at `place`, and (B,) which rows are taught: those that have a label there
        and among whose items the teacher knows some.

        Args: scores and same (B, N); label (B,).
        """
        tokens = self.sequences[:, place].expand_as(same)
        possible = same & (tokens >= 0)
        taught = (label >= 0) & (possible & self.known).any(1)
        shares = torch.softmax(scores.masked_fill(~possible, -torch.inf), dim=1).nan_to_num()
        targets = torch.zeros(len(scores), vocabulary, device=scores.device)
        return targets.scatter_add_(1, tokens.clamp(min=0), shares), taught


def open_teacher(
    wanted: TeacherArguments, splits: IndexedSplits, identifiers: Identifiers, args, corpus: dict
) -> Teacher | None:
    """None where none is asked for. Raises `UserError`.

    Args: args, of the training; corpus, its arguments, which must be those of an XMatchingModel.
    """
    name = wanted.teacher_model_name_or_path
    if name is None:
        return None
    options = {"device": args.device, "progress": not args.disable_tqdm}
    sees = read_model_type(name, FLAG) == "xmatching" or hasattr(
        from_hub(AutoConfig.from_pretrained, name, FLAG), "vision_config"
    )
    opening = dual_teacher if sees else sentence_teacher
    encode, items, temperature = opening(name, splits, args, corpus, options)
    logger.info("%s teaches, its cosines over a temperature of %.3g", name, temperature)
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return Teacher(encode, items, temperature, identifiers, wanted.teacher_weight, shown)


def sentence_teacher(name: str, splits: IndexedSplits, args, corpus: dict, options: dict):
    """Of the texts of each item alone. The temperature is that by which each trained sentence, left out, is told best."""
    encoder = TextEncoder(name)
    encoder.model.requires_grad_(False)
    texts = item_texts(splits)
    if not any(texts):
        raise UserError(f"--{FLAG} {name} reads what is said of items, and no item has a trained sentence")
    items = mean_caption_vectors(encoder, texts, **options)
    sentences, owners = some_of([own if len(own) > 1 else [] for own in texts])
    vectors = encoder.encode(sentences, **options) if sentences else items[:0]
    # without the sentence itself: the others' sum is the mean's direction, as long as that sum is, less this one
    sums = {owner: encoder.encode(texts[owner], device=args.device).sum(0) for owner in set(owners)}
    rest = F.normalize(torch.stack([sums[owner] - own for owner, own in zip(owners, vectors, strict=True)]), dim=1)
    cosines = vectors @ items.nan_to_num().T
    rows = torch.arange(len(owners))
    cosines[rows, owners] = (vectors * rest).sum(1)
    return functools.partial(encoder.encode, device=args.device), items, best_temperature(cosines, torch.tensor(owners))


def dual_teacher(name: str, splits: IndexedSplits, args, corpus: dict, options: dict):
    """Of the pictures alone."""
    if splits.documents:
        raise UserError(f"--{FLAG} {name} sees pictures, and the items are documents; give a sentence encoder")
    encoder = load_dual_encoder(name, device=args.device, flag=FLAG)
    if encoder.model.config.model_type == "xmatching":
        check_same_split(Path(name).expanduser(), corpus, FLAG)
    size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    encoder.model.requires_grad_(False)
    items = encode_images(encoder.model, encoder.image_processor, splits.gallery, size, num_workers=workers, **options)

    def encode(sentences):
        return encode_texts(
            encoder.model, encoder.tokenizer, sentences, device=args.device, text_kwargs=encoder.text_kwargs
        )

    sentences, owners = some_of(known_sentences(splits))
    return encode, items, best_temperature(encode(sentences) @ items.T, torch.tensor(owners))


def known_sentences(splits: IndexedSplits) -> list[list[str]]:
    """Of each item its trained sentences, in the gallery's order."""
    trained = dict(zip(splits.train["image_id"], splits.train["captions"], strict=True))
    return [trained.get(item, []) for item in splits.item_ids]


def item_texts(splits: IndexedSplits) -> list[list[str]]:
    """As `known_sentences`; of a document its own text, too."""
    known = known_sentences(splits)
    if not splits.documents:
        return known
    return [[text, *own] for text, own in zip(splits.gallery["text"], known, strict=True)]


def some_of(texts: list[list[str]]) -> tuple[list[str], list[int]]:
    """At most `SENTENCES_FOR_TEMPERATURE` sentences, spaced evenly, and the item of each."""
    flat = [(text, row) for row, own in enumerate(texts) for text in own]
    flat = flat[:: -(-len(flat) // SENTENCES_FOR_TEMPERATURE) or 1]
    return [text for text, _ in flat], [row for _, row in flat]


def best_temperature(cosines: torch.Tensor, owners: torch.Tensor) -> float:
    """That by which the right items (B,) are the most likely, given cosines (B, N); 0.05 where there are no sentences."""
    if not len(owners):
        return 0.05
    return min(TEMPERATURES, key=lambda temperature: F.cross_entropy(cosines / temperature, owners).item())
