"""Files that appear whole or not at all, and folders that belong to one run."""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagedex.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None

logger = logging.getLogger(__name__)

RUN_RECORD = "run_arguments.json"  # in an output folder: the arguments of the training that made it
UNFINISHED = "_unfinished"  # in an output folder: what is being written; pushes to the Hub pass over such names
TEMPORARY = ".tmp"
LEFTOVER = re.compile(rf"\..+\.[a-z0-9_]{{8}}\{TEMPORARY}")  # what a killed process leaves
A_DAY = 24 * 60 * 60  # seconds: nobody writes to a file that long

# What the file system refuses. How libraries that are not written in Python say it; torch does not know why its write failed.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ROOM_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
FAILED_WRITES = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTDIR}


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Writes beside the target and renames: a reader sees the old file or the whole new one, never half of it."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path | str) -> Iterator:
    """A file open for bytes beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path):
    """A temporary folder to fill, renamed to `folder` when the block ends well and removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=TEMPORARY))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def is_leftover(path: Path) -> bool:
    """Whether this is what a process of ours was writing when it was killed, if none is at work there."""
    of_training = path.name == UNFINISHED and (path.parent / RUN_RECORD).exists()
    return of_training or LEFTOVER.fullmatch(path.name) is not None


def clear_leftovers(folder: Path, within: bool = False, older_than: float = 0.0) -> list[str]:
    """Removes what killed processes left in a folder that is locked, and logs its names, which are returned.

    Args: within, also in the folders that lie in it; older_than, seconds since it was written to, of a folder that several
    processes fill, which is not locked.
    """
    removed = []
    for path in sorted(folder.rglob("*") if within else folder.glob("*")):
        with suppress(OSError):  # another process clears up, too; or the folder is only read
            if not is_leftover(path) or (older_than and path.lstat().st_mtime > time.time() - older_than):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(path.relative_to(folder).as_posix())
    if removed:
        more = f" and {len(removed) - 10} more" if len(removed) > 10 else ""
        logger.info("removed what a stopped run left unfinished in %s: %s%s", folder, ", ".join(removed[:10]), more)
    return removed


def identity(folder: Path) -> tuple[int, int] | None:
    """Which folder that is, whatever its name; None where there is none."""
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class CannotWrite(UserError):
    """The disk is full or read-only, or the folder is gone."""


@contextmanager
def writing(folder: Path | str, error_type: type[UserError] = CannotWrite, flag: str = "") -> Iterator[None]:
    """Around what writes there: what the file system refuses is the user's to mend, whichever library says it.

    Args: flag, of the command line, that named the folder. Raises `error_type`, one line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := why_not_written(error, Path(folder), f"--{flag} {folder}" if flag else str(folder)):
            raise error_type(reason) from error
        raise


def why_not_written(error: Exception, folder: Path, shown: str) -> str | None:
    """What a person can do about it; None for an error of another kind, or of another folder."""
    number, text, there = getattr(error, "errno", None), str(error), folder.exists()
    reason = next((words for words in NO_ROOM_TEXTS if words in text), None)
    if any(words in text for words in FAILED_WRITES):
        reason = "a write failed"
    if number in NO_ROOM or (reason and there):
        reason = os.strerror(number) if number in NO_ROOM else reason
        return f"no room to write {shown} ({reason}): make room, and give the same command again"
    if number in REFUSED and concerns(error, folder) and (there or number != errno.ENOENT):
        why = os.strerror(number)
        return f"{shown} cannot be written ({why}); what is there stays good, and the same command goes on from it"
    if not there:
        return f"{shown} is gone: it was deleted or moved while this run was at work; give the command again"
    return None


def concerns(error: OSError, folder: Path) -> bool:
    """Whether it is about the folder, something in it, or one that it lies in; or does not say what it is about."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    place, folder = Path(os.path.abspath(error.filename)), Path(os.path.abspath(folder))
    return place.is_relative_to(folder) or folder.is_relative_to(place)


class Lock:
    """Keeps others out of a file or a folder until it is released, or the process goes, however it ends.

    Args:
        shown: for people, whose place it is.
        reentrant: whether this process may have it more than once; otherwise its own threads are kept out, too.

    Attributes:
        held: False where the file system has no locks: then nobody knows.

    Raises:
        UserError: another has it.
    """

    living = weakref.WeakSet()
    handle = None

    def __init__(self, path: Path | str, shown: str, reentrant: bool = False):
        self.held, self.place = False, identity(path)
        mine = [lock for lock in Lock.living if lock.place == self.place and lock.held] if reentrant else []
        if fcntl is None:
            return
        try:  # NFS locks only what may be written, so no folders
            self.handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
            if not mine:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"{shown}: another run is at work there; wait until it ends, or give another folder"
            ) from None
        except OSError:
            self.release()
            return
        self.held, self.before = True, mine  # one process has a file once
        Lock.living.add(self)

    def release(self) -> None:
        self.held = False
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def __del__(self):
        self.release()

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked helper, which may outlive its parent for some seconds."""
        for lock in cls.living:
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock.leave_to_parent)


def create(path: Path, content: str) -> bool:
    """Writes a file that must not be there yet, whole; False where another process was first."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(temporary, path)
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)


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
    if not folder.exists() or all(is_leftover(path) for path in folder.iterdir()):
        return folder
    try:
        before = json.loads((folder / record).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--output_dir {folder} is not empty and not a run of this script; give another folder"
        ) from None
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UserError(
            f"--output_dir {folder} has a broken {record}, so nobody can tell whether it holds the same run; give another folder"
        )
    arguments = json.loads(json.dumps(arguments))
    differing = sorted(name for name in before.keys() | arguments.keys() if before.get(name) != arguments.get(name))
    if differing:
        shown = ", ".join(f"{name} ({before.get(name)!r} then, {arguments.get(name)!r} now)" for name in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"--output_dir {folder} holds a run with other arguments: {shown}{more}; give another folder")
    return folder
