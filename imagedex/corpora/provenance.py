"""What an output folder tells of the captions that its model was trained on, and which questions may be among them."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagedex.corpora.splits import hash_fraction
from imagedex.files import RUN_RECORD

QUERIES = "eval_queries.csv"  # in an output folder: the captions that its run held out, with the right pictures
# What decides which captions a run has trained on; a path by its last part, since it may be written in several ways.
SPLIT_FIELDS = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "max_images", "captions_per_image", "draw_seed",
    "held_out_captions_per_image", "held_out_images", "split_seed",
)  # fmt: skip

Question = tuple[str, str]  # (sentence, image_id of the right picture)


def differences(there: Mapping, here: Mapping) -> str:
    """The fields of the split in which the arguments of two runs differ, for people; "" where they are the same."""
    fields = [name for name in SPLIT_FIELDS if _plain(there, name) != _plain(here, name)]
    return ", ".join(f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in fields)


def names_in(cell) -> list:
    """What stands in a cell that names the right picture, or several as a JSON list; [] where it is empty."""
    names = cell
    if isinstance(cell, str) and cell.startswith("["):
        try:
            names = json.loads(cell)
        except (ValueError, RecursionError):
            names = cell
    return names if isinstance(names, list) else [] if names in (None, "") else [names]


def cell_of(names: Sequence[str]) -> str:
    """What `names_in` reads."""
    return names[0] if len(names) == 1 and names_in(names[0]) == [names[0]] else json.dumps(names, ensure_ascii=False)


def read_asked(folder: str | Path) -> list[tuple[str, tuple[str, ...]]] | None:
    """The captions that the run of this folder held out, and what is right for each; None where it left no list that can be
    read."""
    try:
        with open(Path(folder) / QUERIES, encoding="utf-8", newline="") as file:
            rows = [(question(row["caption"], "")[0], tuple(names_in(row["image"]))) for row in csv.DictReader(file)]
            return rows if all(isinstance(name, str) for _, names in rows for name in names) else None
    except (OSError, KeyError, ValueError, AttributeError):
        return None


def question(sentence: str, image_id: str) -> Question:
    """As questions are compared: any white space is one blank."""
    return " ".join(sentence.split()), image_id


@dataclass
class Training:
    """The run that trained a model on captions.

    Attributes:
        arguments: all of the run.
        asked: what it held out; None: its folder has no list.
    """

    arguments: dict
    asked: set[Question] | None = None

    @classmethod
    def of(cls, name_or_path: str | Path) -> "Training | None":
        """None where the name is no folder of a run that trained captions: a Hub id, a model of others, figures alone."""
        folder = Path(name_or_path).expanduser()
        try:
            arguments = json.loads((folder / RUN_RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not arguments.get("do_train") or arguments.get("objective") == "identifier":  # pictures alone
            return None
        asked = read_asked(folder)
        return cls(arguments, None if asked is None else {(text, name) for text, names in asked for name in names})

    @property
    def corpora(self) -> set[str]:
        """How its corpus is named, each by its last part."""
        return {str(_plain(self.arguments, name)) for name in ("dataset_name", "train_file")} - {"None"}

    def may_have_seen(self, asked: Question) -> bool:
        """Whether it may have been trained on a caption of its own corpus."""
        captions, images, seed = (self.arguments.get(name) or 0 for name in SPLIT_FIELDS[-3:])
        if images:
            return hash_fraction(seed, asked[1]) >= images
        if self.asked is None:
            return not captions  # nothing was held out; else nobody knows
        if not captions:
            return False  # the corpus says itself what is trained, to every model alike
        known = not self.arguments.get("max_eval_samples") or asked[1] in {image_id for _, image_id in self.asked}
        return known and asked not in self.asked


def possibly_trained(
    trainings: Mapping[str, Training | None],
    asked: Sequence[Question],
    corpora: Iterable[str] = (),
    captions: Iterable[Question] = (),
    origin: Training | None = None,
) -> dict[str, set[Question]]:
    """Which questions models may have been trained on.

    Args:
        trainings: model -> its training, None where nobody knows.
        asked: the questions.
        corpora: names of the corpus that the gallery is of.
        captions: all captions of that corpus, where they are known; a sentence of the user's own was never trained.
        origin: the run that held these questions out, where it is known.

    Returns:
        model -> the questions, for the models whose training is known and was on this corpus.
    """
    wanted = {question(*one) for one in asked}
    listed = [one for one in (origin, *trainings.values()) if one is not None and one.asked and one.asked & wanted]
    names = {Path(name).name for name in corpora}.union(*(one.corpora for one in listed))
    real = wanted & ({question(*one) for one in captions} or set().union(*(one.asked for one in listed)))
    return {
        model: {one for one in real if training.may_have_seen(one)}
        for model, training in trainings.items()
        if training is not None and training.corpora & names
    }


def warning_of(model: str, seen: int, asked: int, training: Training, origin: Mapping | None) -> str:
    """One line for people. Args: origin, the arguments of the run that held the questions out, where it is known."""
    split = differences(training.arguments, origin) if origin else ""
    split = split or ", ".join(f"{name} {training.arguments.get(name)}" for name in SPLIT_FIELDS[-3:])
    return (
        f"{model} may have been trained on {seen} of the {asked} captions asked, which its training did not hold out "
        f"({split}): its figures may be too good, so do not compare them with the others'"
    )


def _plain(record: Mapping, name: str):
    value = record.get(name) or None
    return Path(value).name if isinstance(value, str) else value
