"""Checkpoints that are whole: each has a manifest of its files, and one that lacks something is not gone on from.

A checkpoint is written aside and renamed when its manifest, which is written last, is there. So a folder named checkpoint-N is
whole unless something happened to it later; what the manifest says is compared with the files before a run goes on from it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from imagedex.errors import UserError
from imagedex.files import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# part -> how the files begin that hold it, DeepSpeed's and those of sharded trainings included
MODEL_PARTS = {"the model's weights": ("model.safetensors", "model-", "pytorch_model", "adapter_model", "global_step")}
PARTS = MODEL_PARTS | {  # what a run goes on from
    TRAINER_STATE_NAME: (TRAINER_STATE_NAME,),
    OPTIMIZER_NAME: ("optimizer", "global_step"),
    SCHEDULER_NAME: (SCHEDULER_NAME, "global_step"),
    "rng_state.pth": ("rng_state",),
}


def number_of(checkpoint: Path) -> int | None:
    """Its step; None for a folder of another name."""
    match = NUMBERED.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    found = [
        path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if number_of(path) is not None and path.is_dir()
    ]
    return sorted(found, key=number_of)


def describe(file: Path) -> dict:
    """Size and hash of a file, which is on the disk afterwards, whatever happens to the machine."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())
        return {
            "size": os.fstat(content.fileno()).st_size,
            "sha256": hashlib.file_digest(content, "sha256").hexdigest(),
        }


def write_manifest(folder: Path) -> None:
    """What is in the folder by now, folders in it included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {path.relative_to(folder).as_posix(): describe(path) for path in files}
    write_atomically(folder / MANIFEST, json.dumps({"files": entries}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """File -> its size and hash; None where there is no manifest. Raises `ValueError` for a broken one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {"size": int(entry["size"]), "sha256": str(entry["sha256"])} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"its {MANIFEST} is broken") from None


def fault(folder: Path, parts: dict = PARTS) -> str | None:
    """Why this checkpoint is not what it was when it was written, or lacks one of the parts; None for a whole one."""
    try:
        manifest = read_manifest(folder)
        differing = fault_of_files(folder, manifest) if manifest is not None else fault_unlisted(folder)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return differing or lacking(os.listdir(folder), parts)


def lacking(names: list[str], parts: dict) -> str | None:
    for part, beginnings in parts.items():
        if not any(name.startswith(beginnings) for name in names):
            return f"{part} is not there"
    return None


def fault_of_files(folder: Path, manifest: dict[str, dict]) -> str | None:
    """The first file that is not as its manifest says; sizes come first, they cost nothing."""
    for name, entry in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is not there"
        if (size := (folder / name).stat().st_size) != entry["size"]:
            return f"{name} has {size:,} bytes, and had {entry['size']:,} when it was written"
    for name, entry in manifest.items():
        with open(folder / name, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
                return f"{name} has changed since it was written"
    return None


def fault_unlisted(folder: Path) -> str | None:
    """Of a checkpoint of an earlier imagedex, which has no manifest: a file that was cut off where that shows."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is not whole"
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "numpy")
            except (SafetensorError, OSError):
                return f"{path.name} is not whole"
        if path.name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_INDEX_NAME):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                content = None
            if not isinstance(content, dict):
                return f"{path.name} is not whole"
            for shard in set(content.get("weight_map", {}).values()):
                if not (folder / shard).is_file():
                    return f"{shard} is not there"
    return None


def say_unchecked(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).exists():
        logger.warning("%s has no %s: its files are all there, but could not be checked", checkpoint, MANIFEST)


def newest_whole(folder: Path) -> str | None:
    """The newest whole checkpoint of a run; which ones it passes over, and why, is said."""
    for checkpoint in reversed(numbered(folder)):
        reason = fault(checkpoint)
        if reason is None:
            say_unchecked(checkpoint)
            return str(checkpoint)
        logger.warning("%s is not whole and is passed over: %s", checkpoint, reason)
    return None


def require_whole(name: str) -> str:
    """The checkpoint that --resume_from_checkpoint names. Raises `UserError`."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {name}: there is no such folder")
    reason = fault(folder)
    if reason:
        within = numbered(folder)
        hint = f"; give one of those within it, such as {within[-1]}" if within else ""
        raise UserError(f"--resume_from_checkpoint {name} is not a whole checkpoint: {reason}{hint}")
    say_unchecked(folder)
    return name


def put_in_place(new: Path, place: Path) -> None:
    """Renames a whole checkpoint to its place; one that was there goes aside, where `new` was."""
    old = new.with_name(f"{new.name}.before")
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def move_files(source: Path, folder: Path) -> None:
    """Each file, or folder of files, of `source` takes its place in `folder` in one go."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)


def remove(checkpoints: list[Path], aside: Path) -> None:
    """Each is renamed before it is removed: what is named checkpoint-N is whole, also of a run that is killed meanwhile."""
    aside.mkdir(exist_ok=True)
    for checkpoint in checkpoints:
        os.replace(checkpoint, aside / checkpoint.name)
    shutil.rmtree(aside, ignore_errors=True)


def rotate(folder: Path, aside: Path, limit: int | None, keep: set[Path]) -> None:
    """Removes checkpoints until `limit` are left: never those to keep, and first those of steps that are yet to come, which were
    passed over or belong to an abandoned course."""
    if not limit or limit <= 0:
        return
    now = max(map(number_of, keep))
    found = sorted(numbered(folder), key=lambda path: (number_of(path) <= now, number_of(path)))
    removable = [path for path in found if path not in keep]
    remove(removable[: max(0, len(found) - max(limit, len(keep)))], aside)
