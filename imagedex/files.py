"""Files that appear whole or not at all, and folders that belong to one run."""

import errno
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagedex.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart there
    fcntl = None

RUN_RECORD = "run_arguments.json"  # in an output folder: the arguments of the training that made it
UNFINISHED = (
    "_unfinished"  # in an output folder: what is being written; pushes to the Hub pass over names that begin so
)
TEMPORARY = ".tmp"
LEFTOVER = re.compile(rf"{UNFINISHED}|\..+\.[a-z0-9_]{{8}}\{TEMPORARY}")  # what a killed process leaves

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# how libraries that are not written in Python say it; torch does not know why its write failed
NO_ROOM_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
FAILED_WRITES = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class CannotWrite(UserError):
    """The disk is full or read-only, or the folder is gone."""


@contextmanager
def writing_to(folder: Path | str) -> Iterator[None]:
    """Around what writes there: raises `CannotWrite`, one line, for what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise CannotWrite(
            f"{folder} cannot be written: {error.strerror}; what is there stays good, and the same command goes on from it"
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
    return LEFTOVER.fullmatch(path.name) is not None


def clear_leftovers(folder: Path) -> list[str]:
    """Removes what killed processes left in a folder that is locked; says their names."""
    found = sorted(path for path in folder.iterdir() if is_leftover(path))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in found]


def identity(folder: Path) -> tuple[int, int] | None:
    """Which folder that is, whatever its name; None where there is none."""
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def writing(folder: Path | str, error_type: type[UserError] = UserError):
    """Within it, a full disk and an output folder that is deleted are the user's to mend. Raises `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if reason := why_not_written(error, Path(folder)):
            raise error_type(reason) from error
        raise


def why_not_written(error: Exception, folder: Path) -> str | None:
    """What a person can do about it; None for an error of another kind."""
    if not folder.exists():
        return (
            f"--output_dir {folder} is gone: it was deleted or moved while this run was at work; give the command again"
        )
    own, text = isinstance(error, OSError), str(error)
    reason = next((words for words in NO_ROOM_TEXTS if words in text), None)
    if any(words in text for words in FAILED_WRITES):
        reason = "a write failed"
    if own and error.errno in NO_ROOM:
        reason = error.strerror
    if reason:
        return f"no room to write --output_dir {folder} ({reason}): make room, and give the same command again"
    if own and error.errno in (errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE) and str(folder) in text:
        return f"--output_dir {folder} cannot be written any more ({error.strerror})"
    return None


class Lock:
    """Holds a file for this process until the object goes, or the process does, however it ends. Raises `UserError` where
    another process holds it. `held` is False where the file system has no locks: then nobody knows."""

    living = weakref.WeakSet()

    def __init__(self, path: Path, refusal: str):
        self.place, self.held = identity(path), False
        if fcntl is None or not os.access(path, os.W_OK):
            return
        self.file = open(path, "r+b")  # noqa: SIM115  held; NFS locks only what may be written
        mine = [lock for lock in Lock.living if lock.place == self.place and lock.held]
        try:
            if not mine:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(refusal) from None
        except OSError:
            return
        self.held, self.before = True, mine  # one process has a file once
        Lock.living.add(self)

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked helper, which may outlive its parent for some seconds."""
        for lock in cls.living:
            lock.file.close()


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
