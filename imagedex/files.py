"""Files that appear whole or not at all, and folders that belong to one run."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from imagedex.errors import UserError

RUN_RECORD = "run_arguments.json"  # in an output folder: the arguments of the training that made it


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Writes beside the target and renames: a reader sees the old file or the whole new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
