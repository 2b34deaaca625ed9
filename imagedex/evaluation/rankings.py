"""Rankings and the files they are kept in: JSON lines, Parquet, or Maria's tab-separated lines of file names."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from imagedex.errors import UserError
from imagedex.files import whole_file, write_atomically

FORMATS = ("jsonl", "parquet", "tsv")
ROW_GROUP = 16_384  # rows of a .parquet that are written at once


@dataclass
class Ranking:
    """The pictures found for one query, best first.

    Attributes:
        query: the sentence that was asked.
        images: image_ids, at most k, no repeats.
        scores: as many, descending (cosines for vectors, less a picture's bias where it has one; log-probabilities for
            identifiers).
        cosines: as many, where scores are not the cosines themselves.
        targets: the right pictures' image_ids, where they are known.
        rank: where the best of them stands in the whole gallery, ties counted against it; `math.inf` when none was found.
        cosine_rank: where it would stand by cosines, where scores are not the cosines.
    """

    query: str
    images: list[str]
    scores: list[float]
    targets: list[str] | None = None
    rank: float | None = None
    cosines: list[float] | None = None
    cosine_rank: float | None = None


def rankings_path(folder: str | Path, output_format: str) -> Path:
    return Path(folder) / f"rankings.{output_format}"


def check_names(image_ids: Sequence[str], output_format: str) -> None:
    """Raises `UserError` when a name has a tab or a line break and the format is tab-separated lines."""
    broken = [name for name in image_ids if output_format == "tsv" and any(sign in name for sign in "\t\n\r")]
    if broken:
        raise UserError(
            f"{len(broken)} pictures have a tab or a line break in their name, the first is {broken[0]!r}: "
            "tsv cannot hold them, use --output_format jsonl"
        )


def write_rankings(rankings: Sequence[Ranking], path: str | Path) -> Path:
    """Writes `query`, `images`, `scores` and, where those are others, `cosines`, in the form of the file's extension: .jsonl,
    .parquet or .tsv.

    A .tsv holds, on one line a query, its file names alone, separated by tabs: the form of Maria's retrieval results.
    """
    path = Path(path)
    output_format = _format_of(path)
    if output_format == "parquet":
        write_parquet((row_of(ranking) for ranking in rankings), path)
    else:
        write_atomically(path, lines_of(rankings, output_format))
    return path


def lines_of(rankings: Sequence[Ranking], output_format: str) -> bytes:
    """The lines of these rankings in a .jsonl or .tsv."""
    if output_format == "tsv":
        check_names([name for ranking in rankings for name in ranking.images], "tsv")
        lines = ["\t".join(ranking.images) for ranking in rankings]
    else:
        lines = [json.dumps(row_of(ranking), ensure_ascii=False) for ranking in rankings]
    return "".join(line + "\n" for line in lines).encode("utf-8")


def write_parquet(rows: Iterable[dict], path: Path) -> None:
    """Rows of `row_of`, all with the same fields, in groups: never more than one of them is in memory."""
    strings, floats = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float64())
    columns = [("query", pyarrow.string()), ("images", strings), ("scores", floats)]
    rows = iter(rows)
    group = list(islice(rows, ROW_GROUP))
    if any("cosines" in row for row in group):
        columns.append(("cosines", floats))
    schema = pyarrow.schema(columns)
    with whole_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(group, schema))
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def read_rankings(path: str | Path) -> list[Ranking]:
    """What `write_rankings` wrote; from a .tsv the queries come back empty and without scores."""
    path = Path(path)
    output_format = _format_of(path)
    if output_format == "parquet":
        return [Ranking(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: names may hold other line separators
    if output_format == "tsv":
        return [Ranking("", line.split("\t") if line else [], []) for line in lines]
    return [Ranking(**json.loads(line)) for line in lines]


def short_float(value: float) -> float:
    """A float32 score as the shortest decimal that gives the same float32 back (0.3, not 0.30000001192092896)."""
    return float(str(np.float32(value)))


def row_of(ranking: Ranking) -> dict:
    """What is kept of a ranking."""
    row = {"query": ranking.query, "images": ranking.images, "scores": ranking.scores}
    return row if ranking.cosines is None else row | {"cosines": ranking.cosines}


def _format_of(path: Path) -> str:
    output_format = path.suffix[1:]
    if output_format not in FORMATS:
        raise UserError(f"{path}: rankings are kept as {', '.join('.' + name for name in FORMATS)}")
    return output_format
