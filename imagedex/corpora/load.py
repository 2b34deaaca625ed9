"""``load_corpus``: recognises which form a corpus has from what is there, says so, and returns it in the schema."""

import logging
import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict

from imagedex.corpora import shape_scenes
from imagedex.corpora.arguments import NO_CORPUS, CorpusArguments
from imagedex.corpora.drawn import draw_part
from imagedex.corpora.forms import beside, blip, coco, flickr, hub, imagefolder, karpathy, lxmert, sidecar
from imagedex.corpora.forms.contents import FOUND, Columns
from imagedex.corpora.paths import (
    list_files,
    list_pictures,
    picture_at,
    report_passed_over,
    report_unused,
    require_folder,
)
from imagedex.corpora.schema import Corpus, FormContents, build_dataset, counted, listed, validate
from imagedex.corpora.splits import RetrievalSplits, split_corpus
from imagedex.corpora.verify import check_choice, drop_missing, verify_images
from imagedex.errors import UserError

logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """What the user said about a corpus; each form takes from it what concerns it."""

    config_name: str | None = None
    image_dir: str | None = None
    columns: Columns = FOUND
    num_proc: int | None = None
    visual_genome_dir: str | None = None


class Form(NamedTuple):
    """A form that a folder can have: how it is recognised, and how it is read."""

    looks_like: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, Request], FormContents]
    files: tuple[str, ...] = ()  # names of caption files that may also be given themselves


# The first form that finds its file wins, so the particular ones come before the general ones.
FORMS = (
    Form(
        "Karpathy's dataset_*.json or dataset.json",
        karpathy.find,
        lambda found, request: karpathy.read(found, config_name=request.config_name, image_dir=request.image_dir),
        karpathy.FILES,
    ),
    Form(
        "LXMERT's mscoco_train.json, mscoco_nominival.json, mscoco_minival.json, vgnococo.json",
        lxmert.find,
        lambda found, request: lxmert.read(
            found,
            config_name=request.config_name,
            image_dir=request.image_dir,
            visual_genome_dir=request.visual_genome_dir,
        ),
    ),
    Form(
        "BLIP's flickr30k_train.json",
        blip.find,
        lambda found, request: blip.read(found, config_name=request.config_name, image_dir=request.image_dir),
        tuple(f"{stem}_train.json" for stem in blip.STEMS),
    ),
    Form(
        "COCO's captions_train2017.json, in the folder or in annotations",
        coco.find,
        lambda found, request: coco.read(found, config_name=request.config_name, image_dir=request.image_dir),
        coco.FILES,
    ),
    Form(
        "captions.txt or Flickr8k.token.txt (Flickr8k), results.csv or results_20130124.token (Flickr30k), with pictures",
        flickr.find,
        lambda found, request: flickr.read(found, image_dir=request.image_dir, columns=request.columns),
        flickr.FILES,
    ),
    Form(
        "an imagefolder with metadata.csv, .jsonl or .parquet",
        imagefolder.find,
        lambda found, request: imagefolder.read(found, image_dir=request.image_dir, columns=request.columns),
    ),
    Form(
        "x.txt or x.caption beside each x.jpg (img2dataset's folders, too)",
        sidecar.find,
        lambda found, request: sidecar.read(found, image_dir=request.image_dir),
    ),
    Form(
        "one table of any name beside the pictures",
        beside.find,
        lambda found, request: beside.read(found, image_dir=request.image_dir, columns=request.columns),
    ),
    Form(
        "a dataset of parquet, arrow, csv or json files with an image and a caption column",
        hub.find,
        lambda found, request: hub.read(
            found,
            config_name=request.config_name,
            image_dir=request.image_dir,
            columns=request.columns,
            num_proc=request.num_proc,
        ),
    ),
)


def load_corpus(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    image_dir: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    unreadable_images: str = "error",
    num_proc: int | None = None,
    seed: int = 0,
    visual_genome_dir: str | None = None,
    put_aside: str = "",
) -> Corpus:
    """Loads a captioned corpus, or a bare folder of pictures, into the schema of :mod:`imagedex.corpora.schema`.

    Args:
        dataset_name: a local folder in a known form (or its caption file), ``shape_scenes``, or a Hub id.
        dataset_config_name: the Hub dataset's configuration; for ``shape_scenes`` the number of scenes; for a folder of
            several Karpathy files which one (``coco``); for LXMERT's files the sources of sentences (``mscoco,vg``).
        train_file: instead of ``dataset_name``, a table file with an image path column and a caption column.
        validation_file: beside ``train_file``, the same for validation.
        image_dir: the folder that the pictures' paths are relative to, where that is not plain from the corpus. Alone,
            without ``dataset_name`` and ``train_file``: a gallery of the pictures in it, without captions. For
            ``shape_scenes``: the folder to draw into.
        image_column: the column with the pictures or their paths; recognised when not given.
        caption_column: the column with the captions (text or lists of text); recognised when not given.
        unreadable_images: ``"error"``, or ``"skip"`` to leave out unreadable and missing pictures, named in the log.
        num_proc: processes for preprocessing.
        seed: draws other scenes of ``shape_scenes``; no other corpus uses it.
        visual_genome_dir: for LXMERT's ``vgnococo.json``, the folder of Visual Genome's pictures.
        put_aside: what says of the split in place of the table itself, for the log; "": a table's own split is kept.

    Raises:
        UserError: anything about the corpus that the user can mend.
    """
    check_choice(unreadable_images)
    columns = Columns(image_column, caption_column, put_aside)
    request = Request(dataset_config_name, image_dir, columns, num_proc, visual_genome_dir)
    if dataset_name and (train_file or validation_file):
        raise UserError("--dataset_name and --train_file/--validation_file: give one or the other")
    if validation_file and not train_file:
        raise UserError("--validation_file needs --train_file")
    if train_file:
        contents = hub.read_files(train_file, validation_file, image_dir=image_dir, columns=columns)
    elif dataset_name == "shape_scenes":
        contents = shape_scenes.read(dataset_config_name, folder=image_dir, seed=seed)
    elif dataset_name:
        contents = _read_named(dataset_name, request)
    elif image_dir:
        contents = read_bare_folder(require_folder(image_dir, "--image_dir"))
    else:
        raise UserError(NO_CORPUS)
    return _finish(contents, unreadable_images, num_proc)


def read_bare_folder(folder: Path) -> FormContents:
    """Every picture in ``folder`` and below, without captions: something to search in, nothing to train on."""
    names = list_pictures(folder)
    if not names:
        raise UserError(f"--image_dir {folder}: there are no pictures in it")
    report_passed_over(folder, list_files(folder))
    return FormContents(
        "folder of pictures without captions",
        {"train": [picture_at(folder, name, []) for name in names]},
        captioned=False,
    )


def _read_named(dataset_name: str, request: Request) -> FormContents:
    path = Path(os.path.abspath(os.path.expanduser(dataset_name)))
    if path.is_file():
        return _read_file(path, request)
    if path.is_dir():
        return _read_folder(path, request)
    names_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", dataset_name) and not dataset_name.startswith(".")
    if not names_hub or path.parent.is_dir():
        raise UserError(
            f"--dataset_name {dataset_name}: there is no such folder (a Hub dataset is named owner/name; the built-in "
            "corpus is shape_scenes)"
        )
    return hub.read(
        dataset_name,
        config_name=request.config_name,
        image_dir=request.image_dir,
        columns=request.columns,
        num_proc=request.num_proc,
    )


def _read_folder(folder: Path, request: Request) -> FormContents:
    require_folder(folder, "--dataset_name")
    for form in FORMS:
        found = form.find(folder)
        if found is not None:
            return form.read(found, request)
    pictures = list_pictures(folder)
    if pictures:
        raise UserError(
            f"--dataset_name {folder} holds {counted(len(pictures), 'picture')} but no captions; "
            f"put beside them one of: {_known()}"
        )
    seen = sorted(path.name for path in folder.iterdir())
    raise UserError(f"--dataset_name {folder} has no known form (it holds {listed(seen, 5)}); known are: {_known()}")


def _read_file(file: Path, request: Request) -> FormContents:
    """A caption file given by its own name: read in its form, whatever else its folder holds."""
    for form in FORMS:
        if any(fnmatch(file.name, name) for name in form.files):
            return form.read(file, request)
    raise UserError(
        f"--dataset_name {file} is a file of no known form; for a table of pictures and captions use --train_file"
    )


def _known() -> str:
    return "; ".join(form.looks_like for form in FORMS)


def _finish(contents: FormContents, unreadable_images: str, num_proc: int | None) -> Corpus:
    """Missing and unreadable pictures, the table, the schema, and a word about what was found."""
    splits, left_out = {}, []
    for split, rows in hub.unique_across_splits(contents.splits).items():
        if not isinstance(rows, Dataset):
            rows, missing = drop_missing(rows, unreadable_images=unreadable_images, split=split)
            left_out += missing
            rows = build_dataset(rows, split, contents.captioned)
        rows, unreadable = verify_images(rows, unreadable_images=unreadable_images, num_proc=num_proc, split=split)
        left_out += unreadable
        splits[split] = validate(rows, split)
    if contents.captioned:
        _report_unused(contents)
    logger.info("Corpus recognised as %s: %s", contents.form, "; ".join(sizes(splits, contents.captioned)))
    return Corpus(contents.form, DatasetDict(splits), left_out)


def _report_unused(contents: FormContents) -> None:
    """Says which pictures lie beside those that are named; only where pictures are files."""
    used: dict[str, list[str]] = {}
    for rows in contents.splits.values():
        for picture in [] if isinstance(rows, Dataset) else rows:
            used.setdefault(picture.path.removesuffix(picture.image_id), []).append(picture.image_id)
    for root, image_ids in used.items():
        report_unused(root, image_ids, list_files(root))


def sizes(splits: dict[str, Dataset], captioned: bool) -> list[str]:
    """`train 12 pictures with 48 captions`, of each split."""
    said = []
    for split, rows in splits.items():
        captions = f" with {counted(sum(map(len, rows['captions'])), 'caption')}" if captioned else ""
        said.append(f"{split} {counted(len(rows), 'picture')}{captions}")
    return said


def load_splits(data: CorpusArguments) -> RetrievalSplits:
    """The corpus that the arguments name, split as they say. Raises `UserError`."""
    corpus = load_corpus(
        data.dataset_name,
        data.dataset_config_name,
        train_file=data.train_file,
        validation_file=data.validation_file,
        image_dir=data.image_dir,
        visual_genome_dir=data.visual_genome_dir,
        image_column=data.image_column,
        caption_column=data.caption_column,
        unreadable_images=data.unreadable_images,
        num_proc=data.preprocessing_num_workers,
        put_aside=data.typed_hold_out(),
    )
    if (data.dataset_name or data.train_file) and not any(map(len, corpus.splits["train"]["captions"])):
        raise UserError(
            f"{data.dataset_name or data.train_file}: no picture of the train split has a caption, all are empty; pictures "
            "alone are given with --image_dir"
        )
    data.leave_split_to([name for name in corpus.splits if name != "train"])
    if data.max_images is not None or data.captions_per_image is not None:
        part = draw_part(corpus.splits["train"], data.max_images, data.captions_per_image, data.draw_seed)
        corpus.splits["train"] = part
        logger.info("Drawn of it: %s", sizes({"train": part}, True)[0])
    return split_corpus(
        corpus,
        held_out_captions_per_image=data.held_out_captions_per_image,
        held_out_images=data.held_out_images,
        split_seed=data.split_seed,
        eval_gallery=getattr(data, "eval_gallery", "all"),
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
    )
