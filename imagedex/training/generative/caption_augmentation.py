"""Training captions that differ each time they are seen: words left out, words of several captions mixed.

Held-out captions say the same picture in other words; a model that has read only three sentences of each learns them by
heart. Every draw comes from torch's generator: a seed repeats a run, and workers of a DataLoader differ from each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from imagedex.bounds import SHARE
from imagedex.command_line import argument
from imagedex.words import joined, units


@dataclass
class CaptionAugmentationArguments:
    """Training captions drawn anew every epoch; all off by default."""

    _argument_group_name = "caption augmentation"
    _bounds = {"caption_word_dropout": SHARE, "caption_mixing": SHARE}

    caption_word_dropout: float = argument("Leave each word of a training caption out with this probability.", 0.0)
    caption_mixing: float = argument(
        "Make this share of the training rows of words drawn from all trained captions of the picture, in their order.",
        0.0,
    )

    def __post_init__(self):
        if self.caption_word_dropout == 1:
            raise ValueError("--caption_word_dropout 1.0: give less than 1, with which no word would be left")

    @property
    def active(self) -> bool:
        return self.caption_word_dropout > 0 or self.caption_mixing > 0

    def draw(self, caption: str, siblings: Sequence[str]) -> str:
        """The caption as it is read this time.

        Args: siblings, all trained captions of the same picture, the caption among them.
        """
        words = units(caption)
        if self.caption_mixing and chance(self.caption_mixing):
            words = mixed(siblings, len(words))
        return joined(kept(words, self.caption_word_dropout))


def chance(probability: float) -> bool:
    return torch.rand(1).item() < probability


def mixed(captions: Sequence[str], count: int) -> list[str]:
    """`count` different places among the words of all captions, in their order."""
    words = [word for caption in captions for word in units(caption)]
    places = torch.randperm(len(words))[:count].sort().values
    return [words[place] for place in places.tolist()]


def kept(words: list[str], dropout: float) -> list[str]:
    """Each word with probability 1 - dropout; one of them, drawn at random, where none would stay."""
    if not dropout or not words:
        return words
    stays = (torch.rand(len(words)) >= dropout).tolist()
    left = [word for word, stay in zip(words, stays, strict=True) if stay]
    return left or [words[torch.randint(len(words), (1,)).item()]]
