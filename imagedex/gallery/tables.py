"""Galleries from tables: Parquet and Arrow files, data sets that were saved or come from the Hub, and `datasets.Dataset` objects.

A row is a picture: embedded, or the path of one, which must lie below the table's folder (or the one given beside it). Nothing is
fetched from the network but data sets of the Hub, which `datasets` downloads and keeps by its own rules. Pictures are neither
copied nor held in memory, but of a `Dataset` that lies in memory alone.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imagedex.errors import UserError
from imagedex.files import whole_file
from imagedex.gallery import columns
from imagedex.gallery.pictures import WITHIN
from imagedex.gallery.rows import SUFFIXES, arrow_table, bytes_of, place_of

logger = logging.getLogger(__name__)

HUB = "hf:"
HELD = ".tables"  # within a gallery: pictures of a `Dataset` that lay in memory alone
GONE = "(a row whose picture is not there)"


@dataclass(frozen=True)
class Tables:
    """Table files that are one source.

    Attributes:
        name: under which the gallery knows it, its pictures' root.
        files: each with the rows of it that count, None for all, in their order.
        folder: of pictures that rows name; None: rows must hold theirs.
        image_column: None: found by name and type.
    """

    name: str
    files: tuple[tuple[str, np.ndarray | None], ...] = field(compare=False)
    folder: Path | None = field(compare=False)
    image_column: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass
class Rows:
    """Of one table file: where the picture of each row is, and what else it says. places: addresses of embedded pictures; names:
    stored file names, or paths where `held` is False."""

    file: str
    places: list[str]
    names: list[str]
    held: np.ndarray
    captions: list[list[str]]
    said: pa.Table


def of_path(path: Path, image_column: str | None, image_dir: str | None) -> Tables | None:
    """The tables that a file or a folder is; None of what holds pictures as such."""
    files = [path] if path.is_file() else saved_files(path) or loose_files(path)
    if not files or files[0].suffix.lower() not in SUFFIXES:
        return None
    folder = Path(image_dir).expanduser().absolute() if image_dir else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"--image_dir {image_dir}: there is no such folder")
    return Tables(str(path), tuple((str(file), None) for file in files), folder, image_column)


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has made; [] of any other."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in saved_files(within(folder, split))]
        if not (folder / "state.json").is_file():
            return []
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [within(folder, one["filename"]) for one in record["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is a data set that is damaged: {' '.join(str(error).split())[:160]}") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is a data set that lacks {missing[0].name}; save it again")
    return files


def within(folder: Path, name: str) -> Path:
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(folder):
        raise UserError(f"{folder}: its record names {name[:100]}, which lies outside of it")
    return path


def loose_files(folder: Path) -> list[Path]:
    """The Parquet and Arrow files of a folder that holds no picture, such as a data set of the Hub that was downloaded."""
    from imagedex.gallery.scanning import extensions

    found, pictures = [], extensions()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            ending = os.path.splitext(name)[1].lower()
            if ending in pictures:
                return []
            if ending in SUFFIXES and not name.startswith("."):
                found.append(Path(parent, name))
    return found


def of_hub(source: str, image_column: str | None) -> Tables:
    """`hf:owner/name`, `hf:owner/name:split` or `hf:owner/name:configuration:split`. Raises `UserError`."""
    import datasets

    from imagedex.hub import hub_reason

    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{source}: give hf:owner/name, hf:owner/name:split or hf:owner/name:configuration:split")
    split, config = rest[-1] if rest else None, rest[0] if len(rest) == 2 else None
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # noqa: BLE001  builders, the Hub client and file systems each raise their own
        reason = hub_reason(error, "dataset") or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source} cannot be loaded: {reason}") from error
    parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    files = tuple((one["filename"], None) for part in parts for one in part.cache_files)
    return Tables(source, files, Path(datasets.config.HF_CACHE_HOME).absolute(), image_column)


def of_dataset(dataset, gallery: Path, image_column: str | None, image_dir: str | None) -> Tables:
    """A `datasets.Dataset`. Its pictures are found again in the files that it is mapped from; where it lies in memory, they are
    written into the gallery first. Paths in rows are those of the cache of `datasets`, or below `image_dir`."""
    import datasets
    from datasets.table import list_table_cache_files

    folder = Path(image_dir or datasets.config.HF_CACHE_HOME).expanduser().absolute()
    name = f"dataset-{dataset._fingerprint}"
    indices = None if dataset._indices is None else dataset._indices.column(0).to_numpy().astype(np.int64)
    files = list_table_cache_files(dataset.data)
    sizes = [len(table) for table in map(arrow_table, files) if table.schema.names == dataset.data.schema.names]
    if len(sizes) != len(files) or sum(sizes) != len(dataset.data):
        files, sizes = [str(gallery / HELD / f"{name}.arrow")], [len(dataset.data)]
        if not os.path.exists(files[0]):
            logger.info("the data set lies in memory, so that its pictures are written to %s", files[0])
            with whole_file(files[0]) as file, pa.ipc.new_stream(file, dataset.data.schema) as stream:
                stream.write_table(dataset.data.table, max_chunksize=100)
    starts = np.cumsum([0, *sizes])
    chosen = [
        None if indices is None else np.unique(indices[(indices >= start) & (indices < end)]) - start
        for start, end in zip(starts, starts[1:], strict=False)
    ]
    return Tables(name, tuple(zip(files, chosen, strict=True)), folder, image_column)


def read(source: Tables) -> list[Rows]:
    """Everything but the pictures. Raises `UserError`."""
    found = []
    for file, chosen in source.files:
        try:
            found.append(read_file(file, chosen, source))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:160]}") from error
    return found


def read_file(file: str, chosen: np.ndarray | None, source: Tables) -> Rows:
    from datasets import Features

    from imagedex.corpora.forms.tables import choose_image_column, holds_pictures, is_path

    parquet = pq.ParquetFile(file) if file.lower().endswith(".parquet") else None
    table = None if parquet else arrow_table(file)
    schema = parquet.schema_arrow if parquet else table.schema
    check_names(schema.names, file)
    features = Features.from_arrow_schema(schema)
    image = choose_image_column(features, source.image_column, file)
    if not holds_pictures(features[image]):
        raise UserError(
            f"{file}: column {image!r} holds no pictures but {features[image]}; name another with --image_column"
        )
    others = [one.name for one in schema if one.name != image and (columns.kept_type(one.type) or not holds(one.type))]
    rest = parquet.read(columns=others).select(others) if parquet else table.select(others)
    if is_path(features[image]):
        stored = (parquet.read(columns=[image]) if parquet else table)[image]
        names, held = stored.to_pylist(), np.zeros(len(stored), bool)
    else:
        names, held = stored_names(parquet or table, image, schema.field(image).type)
    rows = np.arange(len(names)) if chosen is None else chosen
    columns.say_left_out(file, [one for one in schema if one.name not in (image, *others)])
    taken = pa.array(rows)
    captions, said = captions_and_columns(rest.take(taken) if chosen is not None else rest, features, file)
    places = [f"{file}{WITHIN}{place_of(row, image)}" for row in rows.tolist()]
    return Rows(
        file, places, [names[row] or "" for row in rows.tolist()], held[rows], captions or [[] for _ in places], said
    )


def check_names(names: Sequence[str], file: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{file} has several columns {twice[0]!r}; give each a name of its own")


def holds(kind: pa.DataType) -> bool:
    """Whether values of this type are large: pictures, sounds, vectors. They are not read to be left out."""
    return pa.types.is_nested(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary(kind)


def stored_names(table: pq.ParquetFile | pa.Table, image: str, kind: pa.DataType) -> tuple[list, np.ndarray]:
    """The file name of each embedded picture, and whether the row holds it; without reading the pictures where the file's
    statistics tell."""
    struct = pa.types.is_struct(kind)
    named = struct and kind.get_field_index("path") >= 0
    if isinstance(table, pa.Table):
        chunks = table[image].chunks
        held = [bytes_of(chunk).is_valid().to_numpy(zero_copy_only=False) for chunk in chunks]
        names = [
            name for chunk in chunks for name in (chunk.field("path").to_pylist() if named else [None] * len(chunk))
        ]
        return names, np.concatenate(held) if held else np.empty(0, bool)
    column = f"{image}.bytes" if struct else image
    names = [None] * table.metadata.num_rows
    if named:
        names = [row["path"] if row else None for row in table.read(columns=[f"{image}.path"])[image].to_pylist()]
    held = []
    place = next(at for at in range(len(table.schema)) if table.schema.column(at).path == column)
    for group in range(table.num_row_groups):
        part = table.metadata.row_group(group)
        counted = part.column(place).statistics
        if counted is not None and counted.has_null_count and counted.null_count in (0, part.num_rows):
            held.append(np.full(part.num_rows, counted.null_count == 0))
        else:
            batches = table.iter_batches(32, row_groups=[group], columns=[column])
            held += [bytes_of(batch.column(0)).is_valid().to_numpy(zero_copy_only=False) for batch in batches]
    return names, np.concatenate(held) if held else np.empty(0, bool)


def captions_and_columns(table: pa.Table, features, where: str) -> tuple[list[list[str]], pa.Table]:
    """Captions of each row ([] where no column holds any), and the user's columns, captions by that very name left out."""
    names = caption_columns(features, table.column_names)
    captions: list[list[str]] = []
    if names:
        for row in zip(*(table[name].to_pylist() for name in names), strict=True):
            values = [text for value in row for text in (value if isinstance(value, list) else [value])]
            captions.append([text.strip() for text in values if isinstance(text, str) and text.strip()])
    rest = table.drop_columns([name for name in names if name == "captions"])
    for name in rest.column_names:
        labels = getattr(features.get(name), "names", None)  # of a ClassLabel
        if labels and pa.types.is_integer(rest[name].type):
            known = pa.array(labels, pa.string())
            rows = pc.if_else(
                pc.and_(pc.greater_equal(rest[name], 0), pc.less(rest[name], len(labels))), rest[name], None
            )
            rest = rest.set_column(rest.column_names.index(name), name, known.take(rows.combine_chunks()))
    return captions, columns.of_user(rest, where)


def caption_columns(features, among: Sequence[str]) -> list[str]:
    from imagedex.corpora.forms.tables import choose_caption_columns

    try:
        return [name for name in choose_caption_columns(features, None, "") if name in among]
    except UserError:  # a gallery needs none
        return []


def image_ids(parts: Sequence[Rows], name: str) -> list[list[str]]:
    """For each part a name of each row's picture: where stored names tell all embedded pictures apart these, else, and where the
    row holds nothing, its place in the tables."""
    from imagedex.corpora.forms.embedded import stored_name

    stored = [[stored_name(one) for one in part.names] for part in parts]
    held = [
        one
        for part, own in zip(parts, stored, strict=True)
        for one, is_held in zip(own, part.held, strict=True)
        if is_held
    ]
    apart = all(held) and len(set(held)) == len(held)
    stems = [os.path.splitext(os.path.basename(part.file))[0] for part in parts]
    before = (
        [f"{stem}/" if stems.count(stem) == 1 else f"{at:05d}/" for at, stem in enumerate(stems)] if stems[1:] else [""]
    )
    if held and not apart:
        logger.info("%s: stored names do not tell its pictures apart; they are called by their rows", name)
    return [
        [
            one if apart and one else f"{start}{int(row_of(place)):08d}"
            for one, place in zip(own, part.places, strict=True)
        ]
        for own, part, start in zip(stored, parts, before, strict=False)
    ]


def row_of(place: str) -> str:
    return place.rpartition(WITHIN)[2].partition(":")[0]
