"""Captions drawn anew: what may be drawn, how often, and that it is another one each time."""

from collections import Counter

import pytest
import torch

from imagedex import command_line
from imagedex.errors import UserError
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments, kept, mixed

CAPTIONS = ["a red dog runs", "the dog is fast", "snow"]


def is_subsequence(words, whole):
    rest = iter(whole)
    return all(word in rest for word in words)


def test_off_by_default_and_then_nothing_changes():
    augmentation = CaptionAugmentationArguments()
    assert not augmentation.active
    assert augmentation.draw("a red dog", ["a red dog", "x"]) == "a red dog"


def test_mixed_words_come_from_all_captions_in_their_order():
    torch.manual_seed(0)
    whole = ["a", "red", "dog", "runs", "the", "dog", "is", "fast", "snow"]
    draws = [mixed(CAPTIONS, 4) for _ in range(300)]
    assert all(len(words) == 4 and is_subsequence(words, whole) for words in draws)
    assert {word for words in draws for word in words} == set(whole)
    # each of the nine places is as likely: "snow" is one of them
    share = sum("snow" in words for words in draws) / len(draws)
    assert share == pytest.approx(4 / 9, abs=0.1)
    assert mixed(["one two"], 5) == ["one", "two"]


def test_each_word_stays_as_often_as_said_and_one_always_does():
    torch.manual_seed(0)
    words = ["one", "two", "three"]
    draws = [kept(words, 0.4) for _ in range(2000)]
    assert all(draw and is_subsequence(draw, words) for draw in draws)
    counts = Counter(word for draw in draws for word in draw)
    expected = 0.6 + 0.4**3 / 3  # it stays, or all are left out and it is the one drawn
    for word in words:
        assert counts[word] / len(draws) == pytest.approx(expected, abs=0.04)
    assert kept([], 0.5) == []


@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_the_share_of_mixed_rows(mixing):
    torch.manual_seed(0)
    augmentation = CaptionAugmentationArguments(caption_mixing=mixing)
    draws = [augmentation.draw("snow", ["snow", "w x y z"]) for _ in range(1000)]
    other = sum(draw != "snow" for draw in draws) / len(draws)
    assert other == pytest.approx(mixing * 4 / 5, abs=0.05)


def test_torchs_seed_repeats_the_draws():
    augmentation = CaptionAugmentationArguments(caption_word_dropout=0.3, caption_mixing=0.5)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append([augmentation.draw(CAPTIONS[0], CAPTIONS) for _ in range(20)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 5


@pytest.mark.parametrize("flags", [["--caption_word_dropout", "1"], ["--caption_mixing", "1.5"]])
def test_what_cannot_be_is_refused(flags):
    with pytest.raises(UserError, match=flags[0].lstrip("-")):
        command_line.parse_arguments((CaptionAugmentationArguments,), "", flags)
