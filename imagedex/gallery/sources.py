"""What a gallery is made from: each kind of source, brought to places of pictures and to what it says of them.

folder            the pictures in it and below; `metadata.csv`, `.jsonl` or `.parquet` beside them (the imagefolder of `datasets`)
list.txt          a path a line
shard.tar         pictures; `x.json` and `x.txt` beside `x.jpg`, as img2dataset writes them
table.parquet     a row a picture; folders of such files, saved data sets, `hf:owner/name:split`, a `datasets.Dataset`
"""

import logging
import os
import posixpath
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from imagedex.errors import UserError
from imagedex.gallery import columns, scanning, tables
from imagedex.gallery.scanning import NOT_LOOKED_AT, Place

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAMED_BY = ("file_name", "file_path", "filename", "image")  # the column of metadata that says which picture


@dataclass
class Looked:
    """A source as it is now.

    Attributes:
        others: ending -> files that are no pictures, and what else is passed over.
        said: `image_id` and the user's columns of pictures of which the source says something.
    """

    places: list[Place] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    said: pa.Table = field(default_factory=lambda: pa.table({"image_id": pa.array([], pa.string())}))


def check(source, gallery: Path, image_column: str | None = None, image_dir: str | None = None) -> Path | tables.Tables:
    """A source as it was given, known to be one. Raises `UserError`."""
    if hasattr(source, "cache_files") and hasattr(source, "features"):  # a Dataset, without importing datasets
        return tables.of_dataset(source, gallery, image_column, image_dir)
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"{type(source).__name__} is no source of pictures; give a path, hf:owner/name or a split's Dataset"
        )
    if str(source).startswith(tables.HUB):
        return tables.of_hub(str(source), image_column)
    path = scanning.check_source(source)
    table = None if path.suffix.lower() in (".txt", ".tar") else tables.of_path(path, image_column, image_dir)
    if table is None and (image_column or image_dir):
        raise UserError(f"--image_column and --image_dir are for tables; {source} is none")
    return table or path


def look(source: Path | tables.Tables, prefix: str) -> Looked:
    """Args: prefix, of the image_ids. Raises `UserError`."""
    if isinstance(source, tables.Tables):
        return of_tables(source, prefix)
    places, others = scanning.places_in(source, prefix)
    if source.is_dir():
        return with_metadata(source, prefix, places, others)
    rows = [{"image_id": place.image_id} | place.said for place in places if place.said]
    said = (
        [with_ids([row.pop("image_id") for row in rows], columns.of_user(columns.of_rows(rows), str(source)))]
        if rows
        else []
    )
    return Looked(places, others, *said)


def with_ids(image_ids: list[str], said: pa.Table) -> pa.Table:
    ids = pa.array(image_ids, pa.string())
    return said.append_column("image_id", ids) if said.column_names else pa.table({"image_id": ids})


def say_repeated(where: str, number: int, said: pa.Table) -> None:
    """Args: number, of rows whose picture an earlier row has named; said, the columns beside captions."""
    if number and len(said.column_names) > 1:
        logger.warning(
            "%s: %d rows name a picture for the second time; their captions are added, in columns the first row counts",
            where,
            number,
        )


# tables


def of_tables(source: tables.Tables, prefix: str) -> Looked:
    parts = tables.read(source)
    looked, said, missing, seen, repeated = Looked(), [], [], {}, 0
    for part, names in zip(parts, tables.image_ids(parts, source.name), strict=True):
        changed, kept, ids = os.stat(part.file).st_mtime_ns, [], []
        for row, name in enumerate(names):
            captions, stored = part.captions[row], part.names[row]
            if part.held[row] or not stored:  # without either, it is a picture that cannot be read
                place = Place(prefix + name, part.places[row], source.name, NOT_LOOKED_AT, changed, captions)
            elif (place := of_named(stored, source, prefix, captions)) is None:
                missing.append(stored)
                continue
            before = seen.setdefault((place.image_id, place.path), place)
            if before is not place:  # a row a caption
                before.captions = list(dict.fromkeys(before.captions + captions))
                repeated += 1
                continue
            kept.append(row)
            ids.append(place.image_id)
            looked.places.append(place)
        said.append(with_ids(ids, part.said.take(pa.array(kept, pa.int64()))))
    if missing:
        first = f"{len(missing)} rows name pictures that are not there, the first is {missing[0][:200]}"
        if not looked.places:
            raise UserError(f"{source}: {first}; looked below {source.folder}; say where they are with --image_dir")
        logger.warning("%s: %s", source, first)
        looked.others[tables.GONE] = len(missing)
    looked.said = columns.joined(said) if said else looked.said
    say_repeated(str(source), repeated, looked.said)
    return looked


def of_named(name: str, source: tables.Tables, prefix: str, captions: list[str]) -> Place | None:
    """The file that a row names; None where it is not there. Raises `UserError`: outside the folder, or an address."""
    from imagedex.corpora.forms.addresses import FETCH_THEM, is_address
    from imagedex.corpora.paths import picture_at

    if is_address(name):
        raise UserError(f"{source} names pictures by address ({name[:100]}); {FETCH_THEM.partition(' and give')[0]}")
    picture = picture_at(source.folder, name, captions, asked_by=str(source))
    try:
        status = os.stat(picture.path)
    except (OSError, ValueError):
        return None
    return Place(
        prefix + picture.image_id, picture.path, source.name, status.st_size, status.st_mtime_ns, picture.captions
    )


# folders


def with_metadata(root: Path, prefix: str, places: list[Place], others: dict[str, int]) -> Looked:
    """Metadata lies in the folder or in one below, and names pictures from there."""
    by_name = {place.image_id.removeprefix(prefix): place for place in places}
    said, ids = [], set()
    for file in metadata_files(root, others):
        rows, captions = read_metadata(root / file)
        below = posixpath.dirname(file)
        named = [
            posixpath.normpath(posixpath.join(below, str(name).replace("\\", "/")))
            for name in rows["file_name"].to_pylist()
        ]
        strangers = [name for name in named if name not in by_name]
        if strangers:
            logger.warning(
                "%s: %d rows name pictures that are not in %s, the first is %s",
                file,
                len(strangers),
                root,
                strangers[0][:200],
            )
            others[tables.GONE] = others.get(tables.GONE, 0) + len(strangers)
        kept, own = [], []
        for row, name in enumerate(named):
            place = by_name.get(name)
            if place is None:
                continue
            place.captions = list(dict.fromkeys(place.captions + captions[row])) if captions else place.captions
            if name not in ids:
                ids.add(name)
                kept.append(row)
                own.append(place.image_id)
        rest = columns.of_user(rows.drop_columns(["file_name"]), file)
        said.append(with_ids(own, rest.take(pa.array(kept, pa.int64()))))
        say_repeated(file, len(named) - len(strangers) - len(kept), said[-1])
    return Looked(places, others, *([columns.joined(said)] if said else []))


def metadata_files(root: Path, others: dict[str, int]) -> list[str]:
    """Their paths below the folder; they are no longer among the others."""
    from imagedex.corpora.paths import list_files

    if not any(others.get(os.path.splitext(name)[1]) for name in METADATA):
        return []
    found = [name for name in list_files(root) if posixpath.basename(name) in METADATA]
    for name in found:
        ending = os.path.splitext(name)[1]
        others[ending] -= 1
        if not others[ending]:
            del others[ending]
    return found


def read_metadata(file: Path) -> tuple[pa.Table, list[list[str]]]:
    """Rows with `file_name`, and the captions of each ([] where there are none at all). Raises `UserError`."""
    from datasets import Features

    from imagedex.corpora.forms.delimited import read_delimited
    from imagedex.corpora.forms.json_rows import read_rows
    from imagedex.corpora.forms.tables import known_column

    if file.suffix == ".parquet":
        try:
            table = pa.parquet.read_table(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read as parquet: {' '.join(str(error).split())[:160]}") from error
    elif file.suffix == ".jsonl":
        table = columns.of_rows([row for _, row in read_rows(file)])
    else:
        table = pa.table({name: columns.with_types(cells) for name, cells in read_delimited(file).columns.items()})
    tables.check_names(table.column_names, str(file))
    named = known_column(table.column_names, NAMED_BY)
    if named is None:
        raise UserError(f"{file} has no column file_name; its columns are {', '.join(table.column_names)[:300]}")
    names = table[named].cast(pa.string())
    rest = table.drop_columns([named])
    captions, said = tables.captions_and_columns(rest, Features.from_arrow_schema(rest.schema), str(file))
    return said.append_column("file_name", names), captions
