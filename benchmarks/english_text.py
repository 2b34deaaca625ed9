"""English text for the stand-in T5: two dictionaries that Debian carries, as clean sentences.

    python benchmarks/english_text.py | shuf -n 20

WordNet's glosses are present-day English, and its examples are sentences; GCIDE (Webster of 1913 with additions) is ten times as
much prose. A dictionary seldom tells who does what where, of which the text that real T5s have read is full; so sentences of that
kind are composed from WordNet's words for things that can be seen. Nothing here comes from a caption of any picture.
"""

import gzip
import itertools
import random
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ("dict-gcide", "wordnet-base")
MANUAL = "give text of your own: --text FILES, a sentence or paragraph a line"
SHORTEST, LONGEST = 3, 30  # words of a sentence

# what a dictionary writes that is no English
MARKUP = re.compile(r"\\[^\\]*\\|\[[^\]]*\]|\([A-Z][\w. &]*\.\)|--\s*[A-Z][\w.' ]*|[{}*`|]")
NUMBERING = re.compile(r"^\s*(\d+\.|\([a-z]\))\s*")
# WordNet's lexicographer files of what can be seen, https://wordnet.princeton.edu/documentation/lexnames5wn
THINGS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 17: "object", 18: "person", 20: "plant"}
ACTS = {29: "body", 34: "consumption", 35: "contact", 36: "creation", 38: "motion", 39: "perception"}
PLACES = (
    "in", "on", "near", "under", "behind", "through", "over", "beside", "at", "with", "in front of", "on top of", "next to",
    "along", "around", "into",
)  # fmt: skip
DETERMINERS = (
    *["a"] * 4,
    *["the"] * 2,
    "two",
    "three",
    "some",
    "several",
    "many",
    "one",
    "another",
    "his",
    "her",
    "their",
)
PLURAL = ("two", "three", "some", "several", "many")
COMPOSED = 400_000

SENTENCE_END = re.compile(r"(?<=[.;?!])\s+|\s+--\s+")


def fetch_dictionaries(folder: Path) -> list[str]:
    """Downloads both packages with apt, unpacks them in `folder` and returns their sentences. Exits with one line where that
    is not possible."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise SystemExit(f"error: the dictionaries come by apt, and there is no {program} here; {MANUAL}")
    try:
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True, text=True)
        for archive in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True, capture_output=True, text=True)
        words = folder / "usr/share/wordnet"
        return [*wordnet(words), *gcide(folder / "usr/share/dictd/gcide.dict.dz"), *Composer(words).sentences(COMPOSED)]
    except (subprocess.CalledProcessError, OSError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())[:200]
        raise SystemExit(f"error: the dictionaries could not be had ({reason}); {MANUAL}") from None


def wordnet(folder: Path) -> list[str]:
    """Glosses and their examples."""
    sentences = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            gloss = line.partition(" | ")[2]
            sentences += [*re.findall(r'"([^"]+)"', gloss), *re.sub(r'"[^"]*"', "", gloss).split(";")]
    return cleaned(sentences)


class Composer:
    """Sentences of who does what where, from WordNet's words; common words come more often, as their counts in text say."""

    def __init__(self, folder: Path, seed: int = 0):
        self.draw = random.Random(seed)
        self.ing = {}
        for line in (folder / "verb.exc").read_text(encoding="utf-8").splitlines():
            form, base = line.split()[:2]
            if form.endswith("ing"):
                self.ing[base] = form
        counts = {"noun": {}, "verb": {}, "adjective": {}}
        for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
            key, _, count = line.split()
            word, _, sense = key.partition("%")
            kind, file = (int(part) for part in sense.split(":")[:2])
            of = {1: "noun", 2: "verb", 3: "adjective", 5: "adjective"}.get(kind)
            seen = {"noun": THINGS, "verb": ACTS}.get(of, {file: ""} if of else {})
            if file in seen and word.isalpha():
                counts[of][word] = counts[of].get(word, 0) + int(count)
        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if line[0] != " " and int(fields[1]) in THINGS and fields[4].replace("_", "").islower():
                counts["noun"].setdefault(fields[4].replace("_", " "), 0)  # never met in the counted text, yet a word
        self.words = {
            kind: (list(own), list(itertools.accumulate(count + 0.05 for count in own.values())))
            for kind, own in counts.items()
        }

    def word(self, kind: str) -> str:
        words, cumulated = self.words[kind]
        return self.draw.choices(words, cum_weights=cumulated)[0]

    def thing(self) -> str:
        """A noun with its determiner and, at times, an adjective."""
        which, noun = self.draw.choice(DETERMINERS), self.word("noun")
        if which in PLURAL:
            noun += "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
        words = [self.word("adjective"), noun] if self.draw.random() < 0.35 else [noun]
        if which == "a" and words[0][0] in "aeiou":
            which = "an"
        return " ".join([which, *words])

    def act(self) -> str:
        verb = self.word("verb")
        return self.ing.get(verb) or (verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb) + "ing"

    def sentence(self) -> str:
        place, others = self.draw.choice(PLACES), self.draw.random()
        words = [self.thing()]
        if others < 0.15:
            words += ["and", self.thing()]
        if others < 0.8:
            words += [*(["is"] if self.draw.random() < 0.3 else []), self.act()]
            if self.draw.random() < 0.3:
                words.append(self.thing())
        words += [place, self.thing()]
        if self.draw.random() < 0.3:
            words += [self.draw.choice(PLACES), self.thing()]
        return " ".join(words)

    def sentences(self, count: int) -> list[str]:
        return cleaned([self.sentence() for _ in range(count)])


def gcide(path: Path) -> list[str]:
    """Definitions and quotations, paragraph by paragraph (a .dict.dz is a gzip file)."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        indented = [line.strip() for line in paragraph.splitlines() if line.startswith("   ")]
        definition = NUMBERING.sub("", MARKUP.sub(" ", " ".join(indented)))
        sentences += SENTENCE_END.split(definition)
    return cleaned(sentences)


def read_files(paths: list[Path]) -> list[str]:
    """The lines of text files, cut into sentences."""
    sentences = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise SystemExit(f"error: --text {path}: {error.strerror}") from None
        sentences += [part for line in lines for part in SENTENCE_END.split(line)]
    return cleaned(sentences)


def cleaned(sentences: list[str]) -> list[str]:
    """Without what is too short or too long to be a sentence, each once, in their order."""
    kept = {}
    for sentence in sentences:
        words = sentence.strip(" ,;:").split()
        if SHORTEST <= len(words) <= LONGEST:
            kept[" ".join(words)] = None
    return list(kept)


def english(files: list[Path] | None) -> list[str]:
    """Sentences of the given files, or of the dictionaries."""
    if files:
        return read_files(files)
    with tempfile.TemporaryDirectory() as folder:
        return fetch_dictionaries(Path(folder))


if __name__ == "__main__":
    print(*english(None), sep="\n")
