"""Tables that name pictures by their address, as Conceptual Captions' do. Nothing is fetched: the pictures lie on the disk.

They are found under the name that the address ends in, where only one address ends so, or as ``<row>_<crc32 of the
address>`` (rows from 0), as the usual downloader of Conceptual Captions calls them, with or without an ending.
"""

import logging
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

from imagedex.corpora.paths import list_files
from imagedex.corpora.schema import counted, cut
from imagedex.errors import UserError

logger = logging.getLogger(__name__)

FETCH_THEM = (
    "none is fetched from the network: download them, for example with img2dataset, and give the folder that it writes as "
    "--dataset_name"
)


def is_address(name: str | None) -> bool:
    return bool(name) and re.match(r"\w+://", name) is not None


def local_names(addresses: Sequence[str | None], root: Path, where: str) -> list[str]:
    """The path below ``root`` of the picture of each address; of one that is not there a name under which it is missed.

    Raises:
        UserError: none of them is there.
    """
    files: dict[str, str | None] = {}
    for path in list_files(root):
        base = posixpath.basename(path)
        for name in {base, posixpath.splitext(base)[0]}:
            files[name] = None if name in files else path  # a name that stands twice tells nothing
    shared = Counter(_last_part(address) for address in set(addresses))
    names, found = [], 0
    for row, address in enumerate(addresses):
        numbered, last = f"{row}_{zlib.crc32((address or '').encode())}", _last_part(address)
        name = files.get(numbered) or (files.get(last) if last and shared[last] == 1 else None)
        found += name is not None
        names.append(name or numbered)
    if not found:
        first = next((address for address in addresses if address), "")
        raise UserError(
            f"{where} names {counted(len(addresses), 'picture')} by address ({cut(first, 100)}), and none lies below {root}; "
            f"{FETCH_THEM}"
        )
    logger.info("%s: of %s by address, %d lie below %s", where, counted(len(addresses), "picture"), found, root)
    return names


def _last_part(address: str | None) -> str:
    try:
        return unquote(posixpath.basename(urlparse(address or "").path))
    except ValueError:
        return ""
