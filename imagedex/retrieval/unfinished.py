"""Rankings on disk while they are being found: a run that was killed goes on after the last whole block of queries.

folder/unfinished/
  rankings.jsonl (or .tsv)   whole lines; a .parquet is made of JSON lines at the end
  judged.jsonl               of each query with a right picture its rank, and the whole ranking of those that are to be shown
  progress.json              what was asked of what, how many queries are answered, and how far both files reach

What stands in a file behind the place that progress.json names is torn, and is written over.
"""

import json
import logging
import os
import shutil
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from imagedex.evaluation.rankings import Ranking, lines_of, rankings_path, write_parquet
from imagedex.files import write_atomically, writing

logger = logging.getLogger(__name__)

FOLDER = "unfinished"
JUDGED, PROGRESS = "judged.jsonl", "progress.json"
_STATE = ("done", "seconds", "reach", "whole")
_OF_JUDGED = ("targets", "rank", "cosine_rank")


class Unfinished:
    """The rankings of one model.

    Args:
        folder: where rankings.* will be.
        fingerprint: of model, gallery, queries and arguments; what a run with another one has left is begun anew.
        shown: places of the queries whose rankings the contact sheet will show.

    Attributes:
        done: queries that are answered.
        seconds: how long that took.
        whole: whether they were all.
    """

    def __init__(self, folder: Path, output_format: str, fingerprint: str, shown: Container[int] = ()):
        self.target, self.folder = rankings_path(folder, output_format), folder / FOLDER
        self.fingerprint, self.shown, self.format = fingerprint, shown, output_format
        self.rankings = self.folder / ("rankings.tsv" if output_format == "tsv" else "rankings.jsonl")
        self.done, self.seconds, self.reach, self.whole = 0, 0.0, {self.rankings.name: 0, JUDGED: 0}, False
        self._open()

    def _open(self) -> None:
        try:
            state = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
            if state["fingerprint"] == self.fingerprint and self._are_there(state["reach"], state["whole"]):
                self.done, self.seconds, self.reach, self.whole = (state[name] for name in _STATE)
                logger.info("%d queries are answered in %s already", self.done, self.folder)
                return
            logger.info("what is in %s was asked of another model, gallery or file: begun anew", self.folder)
        except FileNotFoundError:
            pass
        except (KeyError, TypeError, ValueError):
            logger.warning("%s is damaged: begun anew", self.folder / PROGRESS)
        with writing(self.target.parent):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            for name in self.reach:
                (self.folder / name).touch()
            self._save()

    def _are_there(self, reach: dict[str, int], whole: bool) -> bool:
        """Whether the files hold what progress.json says."""
        paths = {name: self._path(name, whole) for name in self.reach}
        return all(path.is_file() and path.stat().st_size >= reach[name] for name, path in paths.items())

    def _path(self, name: str, whole: bool) -> Path:
        """Whole rankings may bear their last name already."""
        path = self.folder / name
        return self.target if whole and name == self.target.name and not path.exists() else path

    def _save(self) -> None:
        state = {name: getattr(self, name) for name in ("fingerprint", *_STATE)}
        write_atomically(self.folder / PROGRESS, json.dumps(state))

    def append(self, rankings: Sequence[Ranking], seconds: float) -> None:
        """The next queries' answers, of which all or none will count."""
        judged = [self._judged(ranking, place) for place, ranking in enumerate(rankings, start=self.done)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged if row)
        content = {self.rankings.name: lines_of(rankings, self.rankings.suffix[1:]), JUDGED: lines.encode("utf-8")}
        with writing(self.target.parent):
            for name, added in content.items():
                with open(self.folder / name, "r+b") as file:  # not made anew: a folder that was deleted is noticed
                    file.seek(self.reach[name])
                    file.write(added)
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())
            self.reach = {name: reach + len(content[name]) for name, reach in self.reach.items()}
            self.done, self.seconds = self.done + len(rankings), self.seconds + seconds
            self._save()

    def _judged(self, ranking: Ranking, place: int) -> dict:
        """What of a ranking is needed at the end; nothing, where nobody knows the right picture and it is not shown."""
        kept = vars(ranking) if place in self.shown else {name: getattr(ranking, name) for name in _OF_JUDGED}
        return {name: value for name, value in kept.items() if value is not None}

    def judged(self) -> Iterator[Ranking]:
        """The answers in their order, of queries with a right picture all, else of those that are shown; without what was found,
        but where they are shown."""
        with open(self.folder / JUDGED, "rb") as file:
            left = self.reach[JUDGED]
            while left > 0 and (line := file.readline()):
                left -= len(line)
                yield Ranking(**({"query": "", "images": [], "scores": []} | json.loads(line)))

    def finish(self) -> Path:
        """The file of rankings, whole, under its name."""
        with writing(self.target.parent):
            self.whole = True
            self._save()
            path = self._path(self.rankings.name, self.whole)
            if path != self.target:
                os.truncate(path, self.reach[path.name])
            if self.format == "parquet":
                with path.open(encoding="utf-8", newline="\n") as file:
                    write_parquet(map(json.loads, file), self.target)
            elif path != self.target:
                os.replace(path, self.target)
        return self.target

    def clear(self) -> None:
        """Once all that is made of it is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
