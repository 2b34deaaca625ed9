"""What a word is, in any script: one definition for the tokenizer that is trained on captions and for BM25.

A word is a run of letters, their marks, and digits; a sign ("." or an emoji) stands for itself, blank beside it or not. So
"park." has the word of "park", and accents that are written as marks are those written as letters (NFKC).
"""

import re
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers

IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # 々, 〇, Han
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
HANGUL = "\uac00-\ud7a3"
# Thai, Lao, Myanmar, Khmer and their neighbours: letters that are written without blanks between words
SOUTHEAST_ASIAN = "\u0e01-\u0edf\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
UNSPACED = IDEOGRAPHS + KANA + SOUTHEAST_ASIAN

_INVISIBLE = "[\u00ad\u200c-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufe00-\ufe0f\ufeff]"  # joiners, directions, variants
_SIGN = r"[^\p{L}\p{M}\p{N}_]"

NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(_INVISIBLE), ""),
        normalizers.Replace("\u200b", " "),  # a place to break a line, between words that have no blank
        normalizers.Replace(Regex("[\u2018\u2019\u201b\u2032]"), "'"),
        normalizers.Replace(Regex("[\u201c\u201d\u201f\u2033]"), '"'),
        normalizers.Replace(Regex("[\u2010-\u2015\u2212]"), "-"),
    ]
)
SPLITTER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(_SIGN), "isolated"),
        pre_tokenizers.Split(Regex(f"[{IDEOGRAPHS}{KANA}]+"), "isolated"),
        pre_tokenizers.Split(Regex(f"[{SOUTHEAST_ASIAN}]+"), "isolated"),
    ]
)

# Search without a dictionary: of scripts of syllables and ideographs the characters and their pairs (as Lucene's CJK analysis),
# of an alphabet three letters at a time.
_GRAMS = ((re.compile(f"[{IDEOGRAPHS}{KANA}{HANGUL}]+"), (1, 2)), (re.compile(f"[{SOUTHEAST_ASIAN}]+"), (3,)))
# What is left out of a text by itself: a word, a character that is one; of an alphabet without blanks about a word's length.
_CHARACTER = f"[{IDEOGRAPHS}{KANA}]"
_UNIT = re.compile(f"{_CHARACTER}|[{SOUTHEAST_ASIAN}]{{1,6}}|[^{UNSPACED}]+")
_NO_BLANK = re.compile(f"(?<=[{UNSPACED}]) (?=[{UNSPACED}])")


def words(text: str) -> list[str]:
    """What a search compares: lower-case words and pictographs, without other signs. No stemming, no stop words. Where words
    are not set apart by blanks, and of Hangul, whose words end in particles, short runs of characters stand for them."""
    found = []
    for word, _ in SPLITTER.pre_tokenize_str(NORMALIZER.normalize_str(text)):
        sizes = next((sizes for script, sizes in _GRAMS if script.fullmatch(word)), None)
        if sizes is not None:
            fitting = [size for size in sizes if size <= len(word)] or [len(word)]
            found += [word[at : at + size] for size in fitting for at in range(len(word) - size + 1)]
        elif word[0] == "_" or unicodedata.category(word[0]) == "So" or unicodedata.category(word[0])[0] in "LMN":
            found.append(word)
    return found


def units(text: str) -> list[str]:
    """A text in parts of which each can be left out: what stands between blanks, and less where a script has none."""
    return [unit for chunk in text.split() for unit in _UNIT.findall(chunk)]


def joined(parts: list[str]) -> str:
    """A text of such parts, in the blanks that its script has."""
    return _NO_BLANK.sub("", " ".join(parts))
