"""Captioned pictures as a stream, for corpora that do not fit a disk: tar shards in webdataset's layout.

A sample is the files of one shard that share a name up to the first dot: ``000000.jpg`` with ``000000.txt`` (a caption a
line) or ``000000.json`` (a caption, or a list of them, under a key such as ``caption``). A row of the stream is one
caption with its picture. ``datasets`` reads the shards, shuffles them, and shares them out over processes and
DataLoader workers. Folders and Hub datasets of another form stream too, where their image column holds pictures.
"""

import glob
import hashlib
import itertools
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
from datasets import Features, Image, IterableDataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node

from imagedex.corpora.forms import tar_samples
from imagedex.corpora.forms.cells import SPLIT_NAMES
from imagedex.corpora.forms.tables import (
    choose_caption_columns,
    choose_image_column,
    first_line,
    holds_pictures,
    is_path,
)
from imagedex.corpora.paths import require_folder
from imagedex.corpora.schema import counted, cut, listed
from imagedex.errors import LocalUserError, UserError
from imagedex.modeling.picture_reading import as_rgb

logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MOST_SHARDS = 1_000_000  # that a pattern may stand for


@dataclass
class PictureStream:
    """Rows of ``{"image": {"bytes", "path"}, "caption": str | None, "sample": str}``, read as they are asked for.

    ``caption`` is None in the one row of a sample that has no caption; ``sample`` says which sample of which shard, for
    messages. The picture is not decoded (:func:`decode`).

    Attributes:
        form: what is read, for the log and the model card, e.g. ``"webdataset stream of 12 shards"``.
        rows: the rows as a :class:`datasets.IterableDataset`.
    """

    form: str
    rows: IterableDataset

    @property
    def num_shards(self) -> int:
        """How many readers (processes times workers) can have a shard of their own."""
        return self.rows.num_shards

    def share(self, rank: int, world_size: int) -> "PictureStream":
        """The rows of one process: whole shards where their number divides by ``world_size``, else every n-th row."""
        return PictureStream(self.form, split_dataset_by_node(self.rows, rank=rank, world_size=world_size))

    def one_pass(self, seed: int = 0, number: int = 0, buffer_size: int = 0) -> Iterator[dict]:
        """Every row once (in a DataLoader worker: every row of its shards).

        Args:
            seed: with ``number``, the number of the pass, decides the order; all processes must use the same.
            buffer_size: rows are drawn from a buffer of so many, filled from up to ten shards at a time in an order
                that changes from pass to pass. 0: the order in which they are stored.

        Raises:
            LocalUserError: a shard cannot be read.
        """
        rows, last = self.rows, None
        if buffer_size:
            rows = rows.shuffle(generator=np.random.default_rng([seed, number]), buffer_size=buffer_size)
        try:
            for row in rows:
                last = row["sample"]
                yield row
        except (tarfile.TarError, zlib.error, ValueError, OSError, EOFError) as error:
            raise LocalUserError(
                f"a shard of the {self.form} cannot be read: {first_line(error)}"
                + (f"; among the last samples before it was {last}" if last else "")
            ) from error

    def first_captions(self, number: int) -> Iterator[str]:
        """The first ``number`` captions as they are stored: the same in every process."""
        captions = (row["caption"] for row in self.one_pass() if row["caption"] is not None)
        yield from itertools.islice(captions, number)


def open_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> PictureStream:
    """Opens shards for training; reads no more of them than is needed to tell the columns.

    Args:
        dataset_name: a folder of tar shards, or a folder or Hub dataset that ``load_dataset`` can stream; its train split.
        train_file: instead, shards by name: ``shards/{00000..00009}.tar``, a glob, a URL.
        image_column, caption_column: the files of a sample (``jpg``; ``txt``, ``json.caption`` or ``caption``);
            recognised when not given, captions under a known key of the json before those of a txt.

    Raises:
        UserError: no such shards, not in this layout, or no column of pictures or captions.
    """
    folder = Path(dataset_name).expanduser() if dataset_name else None
    if train_file:
        shards, where = expand_shards(train_file), f"--train_file {train_file}"
    elif folder is not None and folder.exists():
        folder = require_folder(folder, "--dataset_name")
        shards, where = shards_of_folder(folder), f"--dataset_name {folder}"
    elif dataset_name:
        shards, where = [], f"--dataset_name {dataset_name}"
    else:
        raise UserError("--streaming: name the shards with --dataset_name (a folder, a Hub id) or --train_file")
    try:
        if not shards:
            name = str(folder) if folder.exists() else dataset_name
            builder = load_dataset_builder(name, dataset_config_name)
            files = builder.config.data_files or {}
            if builder.info.builder_name == "webdataset":  # a data set of tar shards on the Hub
                shards = list(files.get("train", []))
        if shards:
            shards = [shard if "://" in shard else os.path.abspath(shard) for shard in map(str, shards)]
            choice = tar_samples.choose(shards, where, image_column, caption_column)
            rows = IterableDataset.from_generator(tar_samples.rows, gen_kwargs={"shards": shards, **choice._asdict()})
            form = f"webdataset stream of {counted(len(shards), 'shard')}"
            logger.info("%s: %s, pictures from %s, captions from %s", where, form, choice.image, choice.caption)
            return PictureStream(form, rows)
        rows = _train_rows(builder.as_streaming_dataset(), where)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  builders, the Hub client and file systems each raise their own
        raise UserError(f"{where} cannot be streamed: {first_line(error)}") from error
    inside = folder.resolve() if folder is not None and folder.exists() else None
    return _one_row_a_caption(rows, where, image_column, caption_column, inside)


def _train_rows(splits, where: str) -> IterableDataset:
    if "train" not in splits:
        raise UserError(f"{where} has no train split to stream; its splits are {', '.join(splits)}")
    rows = splits["train"]
    if rows.features is None:
        rows = rows.cast(Features.from_arrow_schema(pyarrow.Table.from_pylist(list(rows.take(5))).schema))
    return rows


def expand_shards(pattern: str) -> list[str]:
    """Names of shards from ``{00000..00009}``, ``{a,b}`` and globs; URLs are taken as they are.

    Raises:
        UserError: a file is not there, or is no tar file.
    """
    shards: list[str] = []
    missing = []
    for name in expand_braces(pattern):
        if not name.split("?")[0].endswith(SUFFIXES):
            raise UserError(
                f"--streaming reads tar shards, and --train_file {name} does not end in {', '.join(SUFFIXES)}"
            )
        if "://" in name:
            shards.append(name)
            continue
        name = os.path.expanduser(name)
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        shards += [file for file in found if os.path.isfile(file)]
        missing += [name] if not found or not os.path.isfile(found[0]) else []
    if missing:
        raise UserError(f"--train_file {pattern}: there is no {listed(missing, 3)}")
    _warn_of_cut_shards(shards)
    return list(dict.fromkeys(shards))


def expand_braces(pattern: str) -> list[str]:
    """``a{08..10}b{x,y}`` -> a08bx, a08by, a09bx, ...; numbers keep the width of the first one."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    first, last, names = found.groups()
    if names is None:
        if int(last) < int(first):
            raise UserError(f"--train_file {pattern}: {found[0]} counts down")
        if int(last) - int(first) >= MOST_SHARDS:
            raise UserError(f"--train_file {pattern}: {found[0]} are more than {MOST_SHARDS:,} shards")
        middles = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        middles = names.split(",")
    names: list[str] = []
    for middle in middles:
        names += expand_braces(pattern[: found.start()] + middle + pattern[found.end() :])
        if len(names) > MOST_SHARDS:
            raise UserError(f"--train_file {pattern}: stands for more than {MOST_SHARDS:,} shards")
    return names


def shards_of_folder(folder: Path) -> list[str]:
    """The tar files in ``folder`` and below, sorted, those of another split than train left aside; [] if it has none."""
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    others = [file for file in files if _split_of(file.relative_to(folder)) != "train"]
    if others and len(others) < len(files):
        logger.warning(
            "%s: streaming is for training; shards of another split are not used: %s",
            folder,
            listed([file.relative_to(folder).as_posix() for file in others], 3),
        )
        files = [file for file in files if file not in others]
    _warn_of_cut_shards(files)
    return [str(file) for file in files]


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def _warn_of_cut_shards(shards: list) -> None:
    """A tar file ends in two blocks of zeros; a reader of streams takes one that was cut between two files for whole."""
    cut = []
    for shard in map(str, shards):
        if shard.endswith(".tar") and "://" not in shard:
            with open(shard, "rb") as file:
                file.seek(max(0, os.path.getsize(shard) - 1024))
                if any(file.read()):
                    cut.append(shard)
    if cut:
        logger.warning("shards without a tar file's end, perhaps not copied whole: %s", listed(cut, 3))


def _one_row_a_caption(
    rows: IterableDataset, where: str, image_column: str | None, caption_column: str | None, inside: Path | None
) -> PictureStream:
    """Args: inside, the folder that local rows may name files of; None: a data set of the Hub."""
    image = choose_image_column(rows.features, image_column, where)
    if is_path(rows.features[image]) or not holds_pictures(rows.features[image]):
        raise UserError(
            f"{where}: column {image!r} holds no pictures but {rows.features[image]}; a stream needs them themselves"
        )
    caption = choose_caption_columns(rows.features, caption_column, where)[0]
    kept = rows.select_columns([image, caption]).cast_column(image, Image(decode=False))

    def expand(batch: dict[str, list]) -> dict[str, list]:
        stored = batch[image][0]
        sample = (stored or {}).get("path") or "a row without a file name"
        if inside and stored and stored.get("bytes") is None and stored.get("path"):
            path = os.path.abspath(inside / stored["path"])
            if not Path(path).is_relative_to(inside) or "://" in stored["path"]:
                raise LocalUserError(f"{where}: a row names {cut(sample)}, which is not below {inside}")
            stored = {"bytes": None, "path": path}
        captions = tar_samples.captions_of(batch[caption][0], sample)
        return {"image": [stored] * len(captions), "caption": captions, "sample": [sample] * len(captions)}

    expanded = kept.map(expand, batched=True, batch_size=1, remove_columns=[image, caption])
    form = f"stream of {counted(rows.num_shards, 'shard')}"
    logger.info("%s: %s, pictures from %s, captions from %s", where, form, image, caption)
    return PictureStream(form, expanded)


def decode(row: dict) -> PIL.Image.Image:
    """The picture of a row, upright and RGB. Raises LocalUserError, which names sample and shard, when it cannot be read."""
    try:
        if row["image"] is None:
            raise FileNotFoundError("it has no picture")
        return as_rgb(Image().decode_example(row["image"]))
    except Exception as error:  # noqa: BLE001  Pillow's plugins raise anything from SyntaxError to struct.error
        raise LocalUserError(
            f"the picture of sample {row['sample']} cannot be read ({first_line(error)[:200]}); mend it, or leave such "
            "pictures out with --unreadable_images skip"
        ) from error


def picture_number(row: dict) -> int:
    """63 bits of a hash of the stored picture: equal for rows that show the same picture, on every machine.

    Of the file's content and not of the sample's key, because many corpora count their keys anew in each shard, and
    others store a picture again with each of its captions.
    """
    stored = row["image"] or {}
    content = stored.get("bytes") or (stored.get("path") or row["sample"]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
