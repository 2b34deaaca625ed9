"""Outputs of frozen towers, kept on disk: each caption and each picture is read once, in this run and in every later one."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from imagedex.encoding.store import ROWS_PER_SHARD, Store, StoredRows, check_room, key_of, weights_fingerprint
from imagedex.errors import UserError
from imagedex.files import CannotWrite
from imagedex.training.draws import drawing_from

logger = logging.getLogger(__name__)

IN_MEMORY = 2**31  # bytes held where keep_dir is full or read-only
LARGEST_SHARD = 2**28  # bytes: all states of a large tower's patches are a megabyte a picture


def default_keep_dir() -> Path:
    """IMAGEDEX_KEEP_DIR, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("IMAGEDEX_KEEP_DIR") or cache / "imagedex" / "kept")


class KeptStates(torch.utils.data.Dataset):
    """Row -> {name: pooled states of a frozen tower}, mapped from disk; of several views of a picture one is drawn each time.

    Args: name, "text_states" or "image_states"; views, each the rows of one view.
    """

    def __init__(self, name: str, views: list[StoredRows]):
        self.name, self.views = name, views

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        view = self.views[torch.randint(len(self.views), (1,)).item() if len(self.views) > 1 else 0]
        return {self.name: torch.from_numpy(np.array(view.row(self.name, row)))}

    def states(self, rows, view: int = 0) -> torch.Tensor:
        """(rows, ...) of one view, at once."""
        return torch.from_numpy(self.views[view].array(self.name, rows))


class Keeper:
    """What keeps the outputs of one tower.

    Args:
        name: "text_states" or "image_states".
        tower: the frozen tower, on its device and in evaluation mode.
        pool: batch of tensors -> (rows, ...) states; kept as float32, integers as int32.
        collator: rows -> batch.
        settings: JSON values and tensors beside the weights that decide what the states are (pooling, preprocessing).
        keep_dir: of all that is kept; each tower with its settings has a folder of its own in it.
    """

    def __init__(
        self, name: str, tower, pool: Callable, collator, settings, keep_dir, batch_size: int, workers: int = 0
    ):
        self.name, self.pool, self.collator = name, pool, collator
        self.batch_size, self.workers, self.row_bytes = batch_size, workers, 1
        maker = {"tower": weights_fingerprint(tower, settings), "states": name}
        folder = Path(keep_dir or default_keep_dir()).expanduser() / f"{name}-{maker['tower'][:16]}"
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"--keep_dir: {existing} is a file; give a folder")
        try:
            self.store = Store(folder, maker, "store", IN_MEMORY)
        except OSError as error:
            raise UserError(f"--keep_dir: {folder} cannot be read: {error.strerror}") from error

    def keep(self, rows, keys: np.ndarray, views: int | None = None, together: bool = False) -> KeptStates:
        """States of all rows; those that are not kept yet are encoded. Raises `UserError`.

        Args:
            rows: a dataset of model inputs, in the order they will be asked for.
            keys: (rows, 16) uint8, see `Store`.
            views: of rows that are drawn anew each time they are asked for, how many are kept; None: rows do not change.
            together: every process calls this at the same time, and they share the work. Otherwise each does all that it finds
                missing.
        """
        every = [keys] if views is None else [view_keys(keys, view) for view in range(views)]
        self.say(rows, np.concatenate(every))
        shares = [(0, 1)]
        if together:
            state = PartialState()
            shares.insert(
                0, (state.process_index, state.num_processes)
            )  # after it, what only another machine's disk has
        for share in shares:
            if (
                together
            ):  # all have looked for what is missing before anyone writes, and all have written before anyone reads
                state.wait_for_everyone()
            self.store.reload()
            if together:
                state.wait_for_everyone()
            for view, own in enumerate(every):
                self.fill(rows, own, None if views is None else view, share)
        return KeptStates(self.name, [self.store.rows(own) for own in every])

    def fill(self, rows, keys: np.ndarray, view: int | None, share: tuple[int, int]) -> None:
        def encode(batches):
            loader = torch.utils.data.DataLoader(
                rows if view is None else View(rows, keys, view),
                batch_sampler=batches,
                collate_fn=self.collator,
                num_workers=min(self.workers, len(batches)),
            )
            title = f"Keeping {self.name.replace('_', ' ')}" + ("" if view is None else f", view {view + 1}")
            for batch in tqdm(loader, desc=title, disable=None if batches and not share[0] else True):
                with torch.no_grad():  # not around the yield: whoever asks for batches may train between them
                    states = self.pool(batch).cpu()
                yield {self.name: (states.float() if states.is_floating_point() else states.int()).numpy()}

        rows_per_shard = max(1, min(ROWS_PER_SHARD, LARGEST_SHARD // self.row_bytes))
        self.store.fill(keys, encode, self.batch_size, share, rows_per_shard)

    def say(self, rows, keys: np.ndarray) -> None:
        """How much will be written, before it is; and whether there is room."""
        missing, different = self.store.missing(keys), len(np.unique(keys, axis=0))
        there = f"{different - len(missing):,} of {different:,} {self.name.replace('_', ' ')} are kept in {self.store.folder}"
        if not len(missing):
            logger.info(there)
            return
        with torch.no_grad():
            shape = self.pool(self.collator([rows[int(missing[0]) % len(rows)]])).shape[1:]
        self.row_bytes = 4 * int(np.prod(shape))
        size = len(missing) * self.row_bytes
        logger.info("%s; the others take %.1f MB there", there, size / 1e6)
        try:
            check_room(self.store.folder, size)
        except CannotWrite as error:
            if size > IN_MEMORY:
                raise
            self.store.hold(error)


class View(torch.utils.data.Dataset):
    """Rows that are drawn at random, drawn in the one way that belongs to a key, whichever process asks, and when."""

    def __init__(self, rows, keys: np.ndarray, view: int):
        self.rows, self.keys, self.view = rows, keys, view

    def __getitem__(self, row: int) -> dict:
        with drawing_from(int.from_bytes(self.keys[row].tobytes()[:8], "little") >> 1):
            return self.rows[row]


def view_keys(keys: np.ndarray, view: int) -> np.ndarray:
    """(rows, 16) uint8: the keys of one view of the rows."""
    made = b"".join(key_of(key.tobytes(), view.to_bytes(8, "little")) for key in keys)
    return np.frombuffer(made, np.uint8).reshape(-1, keys.shape[1])


def token_keys(tokens) -> np.ndarray:
    """(rows, 16) uint8 of a dataset of token lists: equal for equal tokens."""
    names, made = sorted(tokens.column_names), []
    for batch in tokens.with_format("arrow").iter(batch_size=1000):
        columns = [batch[name].to_pylist() for name in names]
        made += [key_of(*(repr(values).encode() for values in row)) for row in zip(*columns, strict=True)]
    return np.frombuffer(b"".join(made), np.uint8).reshape(-1, 16)


def kept_sizes(keep_dir: Path) -> dict[str, int]:
    """Bytes of each folder that a `Keeper` made there."""
    folders = sorted(path for path in keep_dir.glob("*_states-*") if (path / "store.json").exists())
    return {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}


def clear_kept(keep_dir: Path) -> dict[str, int]:
    """Removes what was kept there and nothing else; says how many bytes each folder had."""
    sizes = kept_sizes(keep_dir)
    for name in sizes:
        shutil.rmtree(keep_dir / name)
    return sizes
