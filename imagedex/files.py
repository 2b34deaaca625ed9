"""Files that appear whole or not at all, and folders that belong to one run."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagedex.errors import UserError

RUN_RECORD = "run_arguments.json"  # in an output folder: the arguments of the training that made it


# What the file system may refuse: no room, no right, or a folder that somebody has deleted.
_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT,
                errno.ENOTDIR}  # fmt: skip


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Writes beside the target and renames: a reader sees the old file or the whole new one, never half of it."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path | str) -> Iterator:
    """A file open for bytes beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def writing_to(folder: Path | str, flag: str = "output_dir") -> Iterator[None]:
    """Around what writes there: one line when the disk is full or read-only, or when the folder was deleted."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise UserError(
            f"--{flag} {folder} cannot be written: {error.strerror}. What is there is whole; the same command goes on from it"
        ) from error


@contextmanager
def alone_in(folder: Path | str, flag: str = "output_dir") -> Iterator[None]:
    """Refuses a folder in which another process is at work. The kernel lets go when a process ends, however it ends."""
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"--{flag} {folder}: another run is at work there; wait for its end, or give another folder"
        ) from None
    except (ImportError, OSError):  # a system or a file system without such locks
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def whole_folder(folder: Path):
    """A temporary folder to fill, renamed to `folder` when the block ends well and removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_output_dir(output_dir: str | Path, arguments: dict, record: str) -> Path:
    """Refuses an output folder that cannot be written or that belongs to a run with other arguments; writes nothing.

    Args: arguments, what makes two runs the same (JSON values); record, the file in the folder that keeps them
    (written by the script with `write_atomically` once its inputs are known to be good).
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; give a folder")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # asks the file system itself: permissions do not bind root
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({existing}: {error.strerror})") from error
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    try:
        before = json.loads((folder / record).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--output_dir {folder} is not empty and not a run of this script; give another folder"
        ) from None
    arguments = json.loads(json.dumps(arguments))
    differing = sorted(name for name in before.keys() | arguments.keys() if before.get(name) != arguments.get(name))
    if differing:
        shown = ", ".join(f"{name} ({before.get(name)!r} then, {arguments.get(name)!r} now)" for name in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"--output_dir {folder} holds a run with other arguments: {shown}{more}; give another folder")
    return folder
