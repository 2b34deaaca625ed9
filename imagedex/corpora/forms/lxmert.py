"""LXMERT's caption files (arXiv 1908.07490), from which Vokenization and Maria train: COCO and Visual Genome.

``mscoco_train.json``, ``mscoco_nominival.json``, ``mscoco_minival.json`` and ``vgnococo.json`` are lists of
``{"img_id": "COCO_train2014_000000318556", "sentf": {"mscoco": [...], "vqa": [...], ...}, "labelf": {...}}``. ``sentf``
keeps sentences by source: mscoco and vg are captions, vqa, gqa and visual7w questions.

The corpus of Maria, and the default: mscoco sentences; train + nominival to train on, minival to validate on.
"""

import logging
import re
from pathlib import Path

from imagedex.corpora.paths import find_image_root, picture_at, require_folder
from imagedex.corpora.reading import name_in, read_json
from imagedex.corpora.schema import FormContents, Picture, counted
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

COCO_FILES = {"train": ("mscoco_train", "mscoco_nominival"), "validation": ("mscoco_minival",)}
VISUAL_GENOME_FILE = "vgnococo"
SOURCES = ("mscoco", "vg", "vqa", "gqa", "visual7w")

# Where the pictures lie relative to the caption files; the originals have data/lxmert beside data/mscoco/images.
_COCO_FOLDERS = ("", "images", "mscoco", "mscoco/images", "coco", "coco/images", "../mscoco/images", "../mscoco",
                 "../coco/images", "../coco")  # fmt: skip
_VISUAL_GENOME_FOLDERS = ("", "images", "vg", "vg/images", "../vg", "../vg/images")
_COCO_ID = re.compile(r"COCO_(?P<folder>\w+)_\d+")


def find(folder: Path) -> Path | None:
    """``folder``, when any of the four files is in it."""
    names = [*COCO_FILES["train"], *COCO_FILES["validation"], VISUAL_GENOME_FILE]
    return folder if any((folder / f"{name}.json").is_file() for name in names) else None


def read(
    folder: Path,
    *,
    config_name: str | None = None,
    image_dir: str | None = None,
    visual_genome_dir: str | None = None,
) -> FormContents:
    """Reads the files that are there.

    Args:
        config_name: sources of sentences, comma-separated, ``mscoco`` when not given. With a source besides mscoco, the
            pictures of ``vgnococo.json`` are trained on too.
        image_dir: the COCO folder, with ``train2014/`` and ``val2014/``.
        visual_genome_dir: the Visual Genome folder, with ``VG_100K/`` and ``VG_100K_2/`` or all pictures in one;
            ``image_dir`` when not given.

    Raises:
        UserError: an unknown source, a file of another form, a missing train file, or pictures that cannot be found.
    """
    sources = _sources(config_name)
    rows = {split: _read_files(folder, names, sources) for split, names in COCO_FILES.items()}
    if not rows["train"]:
        raise UserError(
            f"{folder} holds none of {', '.join(f'{name}.json' for name in COCO_FILES['train'])}, or they "
            f"hold no sentence of {', '.join(sources)}"
        )
    if sources != ["mscoco"]:
        rows["train"] += _read_files(folder, (VISUAL_GENOME_FILE,), sources)
    coco = [coco_name(image_id) for part in rows.values() for image_id, _ in part if is_coco(image_id)]
    genome = [image_id for image_id, _ in rows["train"] if not is_coco(image_id)]
    coco_root = _root(coco, folder, image_dir, _COCO_FOLDERS, "COCO") if coco else None
    locate = _genome_locator(genome, folder, visual_genome_dir or image_dir)
    splits: dict[str, list[Picture]] = {}
    for split, part in rows.items():
        for image_id, sentences in part:
            root, name = (coco_root, coco_name(image_id)) if is_coco(image_id) else locate(image_id)
            splits.setdefault(split, []).append(picture_at(root, name, sentences, image_id, asked_by=str(folder)))
    return FormContents(f"LXMERT {', '.join(_present(folder, sources))} (sentences: {', '.join(sources)})", splits)


def is_coco(image_id: str) -> bool:
    return _COCO_ID.fullmatch(image_id) is not None


def coco_name(image_id: str) -> str:
    """``COCO_train2014_000000318556`` -> ``train2014/COCO_train2014_000000318556.jpg``."""
    return f"{_COCO_ID.fullmatch(image_id)['folder']}/{image_id}.jpg"


def _sources(config_name: str | None) -> list[str]:
    sources = [name.strip() for name in re.split("[,+]", config_name)] if config_name else ["mscoco"]
    sources = list(dict.fromkeys(sources))
    unknown = [name for name in sources if name not in SOURCES]
    if unknown:
        raise UserError(
            f"--dataset_config_name {config_name}: no source of sentences called {', '.join(unknown)}; known are "
            f"{', '.join(SOURCES)}"
        )
    return sources


def _present(folder: Path, sources: list[str]) -> list[str]:
    names = [*COCO_FILES["train"], *COCO_FILES["validation"], *([VISUAL_GENOME_FILE] if sources != ["mscoco"] else [])]
    return [name for name in names if (folder / f"{name}.json").is_file()]


def _read_files(folder: Path, names: tuple[str, ...], sources: list[str]) -> list[tuple[str, list[str]]]:
    """(img_id, sentences of the sources, in their order) of each row that has any."""
    rows, without = [], 0
    for name in names:
        file = folder / f"{name}.json"
        if not file.is_file():
            logger.warning("%s is not there; the corpus is read without it", file)
            continue
        try:
            for row in read_json(file):
                sentences = [sentence for source in sources for sentence in _listed(row["sentf"].get(source, []))]
                if sentences:
                    rows.append((name_in(row["img_id"], file), sentences))
                without += not sentences
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file} is not LXMERT's form: rows with img_id and sentf are expected ({error})"
            ) from error
    if without:
        logger.info("%s: %s without a sentence of %s left out", ", ".join(names), counted(without, "picture"), sources)
    return rows


def _listed(sentences: object) -> list:
    if not isinstance(sentences, list):
        raise TypeError(f"sentences are no list but {sentences!r:.40}")
    return sentences


def _root(names: list[str], folder: Path, given: str | None, usual: tuple[str, ...], what: str) -> Path:
    base = require_folder(given, "--image_dir") if given else folder
    below = ("", "images") if given else usual
    return find_image_root(names, [(base / place).resolve() for place in below], f"{folder} ({what})")


def _genome_locator(names: list[str], folder: Path, given: str | None):
    """How an id becomes (root, path below it): VG_100K and VG_100K_2 side by side, or all pictures in one folder."""
    if not names:
        return lambda image_id: (folder, f"{image_id}.jpg")
    base = require_folder(given, "--visual_genome_dir") if given else folder
    roots = [(base / place).resolve() for place in (("", "images") if given else _VISUAL_GENOME_FOLDERS)]
    for root in roots:
        if (root / "VG_100K").is_dir():
            second = root / "VG_100K_2"
            return lambda image_id: (
                root,
                f"VG_100K_2/{image_id}.jpg" if (second / f"{image_id}.jpg").is_file() else f"VG_100K/{image_id}.jpg",
            )
    files = [f"{name}.jpg" for name in names]
    root = find_image_root(files, roots, f"{folder} (Visual Genome)", "--visual_genome_dir")
    return lambda image_id: (root, f"{image_id}.jpg")
