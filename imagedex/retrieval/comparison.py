"""Several models asked the same sentences: names, one table, and what they are to be measured against."""

import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from transformers.utils import cached_file

from imagedex.corpora.provenance import QUERIES, Training, possibly_trained, question, read_asked, warning_of
from imagedex.corpora.shape_scenes import DEFAULT_SCENES, perfect_reader
from imagedex.errors import UserError
from imagedex.evaluation.exact import OTHER_GALLERIES, figures_within
from imagedex.evaluation.figures import Figures
from imagedex.evaluation.rankings import Ranking
from imagedex.evaluation.table import table
from imagedex.retrieval.queries import Queries, QueryFile

logger = logging.getLogger(__name__)

CEILING = "a reader who makes no mistake"
COLUMNS = {
    "identifiers": "identifiers",
    "hits@1": "Hits@1",
    "hits@10": "Hits@10",
    "mrr": "MRR",
    "ms_per_query": "ms a query",
    "bytes": "on disk",
    "gallery_size": "gallery",
}
GROUP_COLUMNS = {"queries": "queries", "pictures": "pictures", "hits@1": "Hits@1", "hits@5": "Hits@5", "hits@10": "Hits@10",
                 "mrr": "MRR"}  # fmt: skip
# what is needed to answer; a training folder holds more
_NEEDED = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
           "identifiers.json")  # fmt: skip
_BESIDE_WEIGHTS = ("identifiers.safetensors", "caption_bank.safetensors")


def model_labels(names: Sequence[str]) -> dict[str, str]:
    """A short name for each model -> the name it was given: a folder's own name, with as much of its path as tells it from
    the others; a Hub id as it is. Raises `UserError` when a model is given twice."""
    parts = {}
    for name in names:
        folder = Path(name).expanduser()
        parts[name] = folder.resolve().parts if folder.is_dir() else (name,)
    if len(set(parts.values())) < len(names):
        twice = next(name for name in names if list(parts.values()).count(parts[name]) > 1 or names.count(name) > 1)
        raise UserError(f"--model_name_or_path names {twice} twice; give each model once")
    labels = {}
    for name, own in parts.items():
        others = [other for other in parts.values() if other != own]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        labels["/".join(own[-length:])] = name
    return labels


def folder_of(label: str) -> str:
    """The name of the folder that a model's answers go to."""
    return label.replace("/", "--").strip(".") or "model"


def size_on_disk(name_or_path: str, index_dir: Path | None = None) -> int:
    """Bytes of what is needed to answer: weights, tokenizer, identifiers, and the gallery's vectors."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        folder = Path(cached_file(name_or_path, "config.json")).parent
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in _NEEDED]
    if all(path.suffix != ".safetensors" or path.name in _BESIDE_WEIGHTS for path in files):
        files += folder.glob("pytorch_model*.bin")
    if index_dir is not None and index_dir.is_dir():
        files += [path for path in index_dir.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files)


def reference_rows(
    model_folders: Sequence[str],
    queries: Queries | QueryFile,
    dataset_name: str | None,
    dataset_config_name: str | None,
    gallery,
) -> dict[str, dict]:
    """What the models are to be measured against, where it is known for exactly these queries and this gallery: the
    baselines that a training run computed, and the ceiling of the built-in scenes."""
    if not queries.has_targets:
        return {}
    rows = {}
    for folder in model_folders:
        rows |= kept_baselines(Path(folder).expanduser(), queries, len(gallery))
    if dataset_name == "shape_scenes":
        scenes = int(dataset_config_name or DEFAULT_SCENES)
        try:
            figures = perfect_reader(queries.read().sentences, gallery["image_id"], n_scenes=scenes)
        except (KeyError, ValueError):  # sentences of another corpus, whose meaning nobody knows
            return rows
        rows[CEILING] = figures | {"gallery_size": len(gallery)}
    return rows


def kept_baselines(folder: Path, queries: Queries | QueryFile, gallery_size: int) -> dict[str, dict]:
    """The rows of `baselines.json` in a model's folder, if the run that wrote it asked these very queries."""
    try:
        rows = json.loads((folder / "baselines.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    asked = read_asked(folder) or []
    if len(asked) != len(queries):
        return {}
    own = queries.read()
    if sorted(asked) != sorted(zip(own.sentences, own.targets, strict=True)):
        return {}
    galleries = [  # a row of held-out pictures has figures of two galleries
        {name: figures_within(row, prefix) for name, row in rows.items()} for prefix in ("", *OTHER_GALLERIES)
    ]
    return {n: own for rows in galleries for n, own in rows.items() if own.get("gallery_size") == gallery_size}


def possibly_trained_queries(
    models: Mapping[str, Sequence[str]],
    queries: Queries | QueryFile,
    path: str | Path,
    dataset_name: str | None,
    gallery,
) -> dict[str, int]:
    """How many of the queries each model may have been trained on, where it can be told; the log warns of each model.

    Args: models, label -> the models behind it (with --rerank_with there are two); path, of the file of queries.
    """
    if not queries.has_targets:
        return {}
    path = Path(path)
    origin = Training.of(path.parent) if path.name == QUERIES else None
    trainings = {name: Training.of(name) for name in dict.fromkeys(name for own in models.values() for name in own)}
    if not any(trainings.values()):
        return {}
    captions = [
        (text, row["image_id"])
        for row in (gallery.select_columns(["image_id", "captions"]) if "captions" in gallery.column_names else ())
        for text in row["captions"]
    ]
    listed = [one for one in (origin, *trainings.values()) if one is not None and one.asked]
    # of a million queries only those that somebody's training knows of are held
    known = {question(*one) for one in captions}.union(*(one.asked for one in listed))
    asked, targets = Counter(), set()
    for block in queries.blocks():
        for sentence, own in zip(block.sentences, block.targets, strict=True):
            targets.update(own)
            # by the first of its right pictures that somebody's training knows of
            asked.update([one for one in (question(sentence, target) for target in own) if one in known][:1])
    captions = [one for one in captions if one[1] in targets]
    seen = possibly_trained(trainings, list(asked), [dataset_name] if dataset_name else [], captions, origin)
    if origin is None and asked.total() == len(queries):  # a model may be the one that kept these queries back
        origin = next((one for one in listed if asked.keys() <= one.asked), None)
    for name, own in seen.items():
        if own:
            count, before = sum(asked[one] for one in own), origin and origin.arguments
            logger.warning("%s", warning_of(name, count, len(queries), trainings[name], before))
    behind = {label: [seen[name] for name in own if name in seen] for label, own in models.items()}
    return {label: sum(asked[one] for one in set().union(*own)) for label, own in behind.items() if own}


def group_figures(judged: Iterable[Ranking], new_image_ids: Collection[str], gallery_size: int) -> dict[str, dict]:
    """Figures of the queries for trained pictures ("seen") and for those added without training ("new") apart; everything
    is searched in both. Nothing where no picture was added."""
    if not new_image_ids:
        return {}
    groups = {"seen": Figures(), "new": Figures()}
    for ranking in judged:
        is_new = set(ranking.targets) <= set(new_image_ids)
        groups["new" if is_new else "seen"].add(ranking.rank, tuple(ranking.targets))
    sizes = {"seen": gallery_size - len(new_image_ids), "new": len(new_image_ids)}
    return {
        name: {figure: v for figure, v in figures.summary().items() if math.isfinite(v)}
        | {"queries": len(figures), "pictures": sizes[name]}
        for name, figures in groups.items()
        if len(figures)
    }


def group_table(groups: Mapping[str, Mapping]) -> str:
    return table(groups, GROUP_COLUMNS)
