"""Soft targets: a frozen encoder says how well each training sentence fits every item, and that is learned beside the labels.

A label names one item and calls all others wrong alike, the picture of the same scene and that of another world. A teacher
tells them apart, and whatever is drawn of a caption (words left out, words of several captions) it judges what is really
there. So a T5 that has read little learns from few captions what a sentence encoder has read of many (Hinton et al.,
1503.02531).

For the identifier's token at place t the target is, of the items whose identifiers begin as the label's does, the share of
each next token in the teacher's softmax. So all schemes are taught alike; where one token is possible, as at the end, the
target is the label.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig

from imagedex.checkpoints import from_hub, read_model_type, source_of
from imagedex.corpora.indexed import IndexedSplits
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.evaluation.baselines import TextEncoder, caption_vectors
from imagedex.identifiers.vectors import check_same_split
from imagedex.modeling.identifiers import Identifiers
from imagedex.training.generative.arguments import TeacherArguments
from imagedex.training.publishing import public_name

logger = logging.getLogger(__name__)

FLAG = "teacher_model_name_or_path"
TEMPERATURES = [0.01 * 1.25**step for step in range(14)]  # 0.01 to 0.18
TEMPERATURE = 0.05  # where no sentence can be left out
SENTENCES_FOR_TEMPERATURE = 2000


class Teacher:
    """Scores every item for sentences.

    Args:
        encode: sentences (B) -> (B, D) unit vectors, on any device.
        items: (N, D) unit vectors; NaN of an item of which nothing is known: it gets no share.
        temperature: by which cosines are divided.
        sequences: (N, L) identifiers of the N items as `Identifiers.padded` gives them, in the items' order.
        weight: of its loss. name: for people.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], torch.Tensor], items: torch.Tensor, temperature: float,
        sequences, weight: float = 1.0, name: str = "",
    ):  # fmt: skip
        self.encode, self.temperature, self.weight, self.name = encode, temperature, weight, name
        self.known = ~items.isnan().any(1)
        self.items, self.sequences = items.nan_to_num(), torch.as_tensor(sequences)

    def to(self, device) -> "Teacher":
        for name in ("known", "items", "sequences"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    @torch.no_grad()
    def scores(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, N) cosines over the temperature; -inf of items of which nothing is known."""
        cosines = (self.encode(sentences).to(self.items) @ self.items.T).float()
        return (cosines / self.temperature).masked_fill(~self.known, -torch.inf)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, sentences: Sequence[str]) -> torch.Tensor:
        """`weight` times the sum of the divergence KL(teacher || model) in nats over the sentences' labels, over the number of
        labels in the whole batch: as the cross-entropy counts, but for visual tokens that are written.

        Args: logits (rows, L or more, V) and labels (rows, L), -100 where padded; the sentences' rows are the first.
        """
        self.to(logits.device)
        own, scores = labels[: len(sentences)], self.scores(sentences)
        same = torch.ones_like(scores, dtype=torch.bool)  # whose identifiers begin as the label's
        total = logits.new_zeros((), dtype=torch.float32)
        for place in range(
            min(own.shape[1], self.sequences.shape[1])
        ):  # labels are padded to documents that are written
            # of an invented sentence there is no label: the teacher speaks of the first token alone
            asked = own[:, place] >= 0 if place else torch.ones_like(own[:, 0], dtype=torch.bool)
            targets, taught = self.next_tokens(scores, same, asked, place, logits.shape[-1])
            log_probs = F.log_softmax(logits[: len(sentences), place].float(), dim=-1)
            divergence = (torch.xlogy(targets, targets) - targets * log_probs).sum(-1)
            total = total + divergence[taught].sum()
            same &= self.sequences[:, place] == own[:, place, None]
        return self.weight * total / (labels != -100).sum()

    def next_tokens(self, scores, same, asked: torch.Tensor, place: int, vocabulary: int):
        """(B, V) the teacher's shares of the tokens at `place`, and (B,) which of the rows `asked` (B,) are taught: those among
        whose items the teacher knows some.

        Args: scores and same (B, N).
        """
        tokens = self.sequences[:, place].expand_as(same)
        possible = same & (tokens >= 0)
        taught = asked & (possible & self.known).any(1)
        shares = torch.softmax(scores.masked_fill(~possible, -torch.inf), dim=1).nan_to_num()
        targets = torch.zeros(len(scores), vocabulary, device=scores.device)
        return targets.scatter_add_(1, tokens.clamp(min=0), shares), taught


def check_teacher(wanted: TeacherArguments, splits: IndexedSplits, corpus: dict) -> None:
    """What can be wrong with the teacher, found before anything is trained or read with it. Raises `UserError`.

    Args: corpus, its arguments, which must be those that an XMatchingModel was trained with.
    """
    name = wanted.teacher_model_name_or_path
    if name is None and wanted.teacher_invented_share:
        raise UserError(
            f"--teacher_invented_share {wanted.teacher_invented_share:g}: only a teacher can say what invented sentences mean; "
            f"give --{FLAG}"
        )
    if name is None:
        return
    if sees_pictures(name):
        if splits.documents:
            raise UserError(f"--{FLAG} {name} sees pictures, and the items are documents; give a sentence encoder")
        if read_model_type(name, FLAG) == "xmatching":
            check_same_split(Path(name).expanduser(), corpus, FLAG)
    elif not any(said_of_items(splits)):
        raise UserError(f"--{FLAG} {name} reads what is said of items, and no item has a trained sentence")


def sees_pictures(name: str) -> bool:
    """Whether it is a dual encoder, by its config. Raises `UserError` when there is none."""
    if read_model_type(name, FLAG) == "xmatching":
        return True
    return hasattr(from_hub(AutoConfig.from_pretrained, source_of(name), FLAG), "vision_config")


def open_teacher(wanted: TeacherArguments, splits: IndexedSplits, identifiers: Identifiers, args) -> Teacher | None:
    """None where none is asked for. Raises `UserError`.

    Args: args, of the training.
    """
    name = wanted.teacher_model_name_or_path
    if name is None:
        return None
    options = {"device": args.device, "progress": not args.disable_tqdm}
    opening = dual_teacher if sees_pictures(name) else sentence_teacher
    encode, items, temperature = opening(source_of(name), splits, args, options)
    logger.info("%s teaches, its cosines over a temperature of %.3g", name, temperature)
    sequences = identifiers.padded([identifiers.row(item) for item in splits.item_ids])  # of another order, if brought
    return Teacher(encode, items, temperature, sequences, wanted.teacher_weight, public_name(source_of(name)))


def sentence_teacher(name: str, splits: IndexedSplits, args, options: dict):
    """Of the texts of each item alone."""
    try:
        encoder = TextEncoder(name)
    except UserError as error:
        raise UserError(f"--{FLAG}: {error}") from error
    encoder.model.requires_grad_(False)
    encode = functools.partial(encoder.encode, device=args.device)
    return encode, *items_of(encoder, said_of_items(splits), None, options)


def dual_teacher(name: str, splits: IndexedSplits, args, options: dict):
    """Of each item's picture and of its sentences, whose vectors lie in one space."""
    encoder = load_dual_encoder(name, device=args.device, flag=FLAG)
    size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    encoder.model.requires_grad_(False)
    pictures = encode_images(
        encoder.model, encoder.image_processor, splits.gallery, size, num_workers=workers, **options
    )
    encode = functools.partial(encoder.encode, device=args.device)
    return encode, *items_of(encoder, splits.known_sentences(), pictures, options)


def items_of(encoder, texts: list[list[str]], pictures: torch.Tensor | None, options: dict):
    """(N, D) the items' vectors: the mean of what is said of each, and its picture's vector, added. And the temperature by which
    the texts, each left out of its own item's vector, are told best.

    Args: encoder, of texts; pictures (N, D) of length 1; None: texts alone, and NaN where there is none.
    """
    if pictures is not None and not any(texts):
        return pictures, TEMPERATURE
    vectors, owners, sums = caption_vectors(encoder, texts, **options)
    counts = torch.bincount(owners, minlength=len(sums))[:, None]
    seen = torch.zeros_like(sums) if pictures is None else pictures
    # texts are nearer to texts than to pictures: an item of which nothing is said would stand behind all others
    missing = torch.nan if pictures is None else vectors.mean(0)
    items = F.normalize(torch.where(counts > 0, sums / counts.clamp(min=1), missing) + seen, dim=1)
    rows = some_of((counts[owners, 0] > 1).nonzero()[:, 0].tolist())
    if not rows:
        return items, TEMPERATURE
    own, vectors = owners[rows], vectors[rows]
    cosines = (vectors @ items.nan_to_num().T).masked_fill(items.isnan().any(1), -torch.inf)
    rest = F.normalize((sums[own] - vectors) / (counts[own] - 1) + seen[own], dim=1)
    cosines[torch.arange(len(rows)), own] = (vectors * rest).sum(1)
    return items, best_temperature(cosines, own)


def said_of_items(splits: IndexedSplits) -> list[list[str]]:
    """Of each item its trained sentences; of a document its own text before them."""
    known = splits.known_sentences()
    return (
        [[text, *own] for text, own in zip(splits.gallery["text"], known, strict=True)] if splits.documents else known
    )


def some_of(rows: list) -> list:
    """At most `SENTENCES_FOR_TEMPERATURE` of them, spaced evenly."""
    return rows[:: -(-len(rows) // SENTENCES_FOR_TEMPERATURE) or 1]


def best_temperature(cosines: torch.Tensor, owners: torch.Tensor) -> float:
    """That by which the right items (B,) are the most likely, given cosines (B, N)."""
    return min(TEMPERATURES, key=lambda temperature: F.cross_entropy(cosines / temperature, owners).item())
