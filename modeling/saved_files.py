"""Files that lie beside a model's weights: written whole or not at all, and found where the weights came from."""

import os
import tempfile
from pathlib import Path

HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


def hub_options(kwargs: dict) -> dict:
    """Of the keywords of `from_pretrained` those that say where files come from."""
    return {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}


def replace_file(path: Path, content: bytes) -> None:
    """Writes beside the target and renames: a reader sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
