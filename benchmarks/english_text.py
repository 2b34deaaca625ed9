"""English text for the stand-in T5: two dictionaries that Debian carries, as clean sentences.

WordNet's glosses are present-day English, and its examples are sentences; GCIDE (Webster of 1913 with additions) is ten times as
much prose. Neither holds a caption of any picture.
"""

import gzip
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
        return [*wordnet(folder / "usr/share/wordnet"), *gcide(folder / "usr/share/dictd/gcide.dict.dz")]
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
