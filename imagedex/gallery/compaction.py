"""Room on disk: rows that no picture of the catalog needs any more are dropped before they are a fifth of the store."""

import logging

import numpy as np

from imagedex.encoding.store import ROWS_PER_SHARD, Store, as_scalars

logger = logging.getLogger(__name__)

MOST_SMALL = 32  # shards beyond what the rows need: each is a file to be opened
MOST = 1.15  # of the room that the live rows need


def without_vector(store: Store, keys: np.ndarray) -> np.ndarray:
    """Places among the keys whose vector is zero: their pictures could not be decoded."""
    rows = store.rows(keys)
    empty = [
        start + np.flatnonzero(~rows.array("vectors", slice(start, start + 2**14)).any(1))
        for start in range(0, len(rows), 2**14)
    ]
    return np.concatenate(empty) if empty else np.empty(0, np.int64)


def compact(store: Store, live: np.ndarray) -> None:
    """Writes shards anew that hold dead rows or few rows, where the store takes more room than it has to.

    New shards are written before old ones are removed: a kill leaves rows twice, never none.

    Args: live (N, 16) keys that are needed.
    """
    wanted = np.unique(as_scalars(live)) if len(live) else np.empty(0, "V16")
    alive = [np.isin(as_scalars(shard.keys), wanted) for shard in store.shards]
    first = first_of_equal(store)
    alive = [own & again for own, again in zip(alive, first, strict=True)]
    sizes = [shard.path.stat().st_size for shard in store.shards]
    row_bytes = max(
        (sum(a[:1].nbytes for a in (shard.keys, *shard.fields.values())) for shard in store.shards), default=1
    )
    needed = sum(int(own.sum()) for own in alive) * row_bytes
    crowded = len(store.shards) > 2 * -(-len(wanted) // ROWS_PER_SHARD) + MOST_SMALL
    if sum(sizes) <= MOST * needed + row_bytes and not crowded:
        return
    worst = [place for place, own in enumerate(alive) if not own.all() or len(own) < ROWS_PER_SHARD // 2]
    old, written, waiting = [store.shards[place].path for place in worst], [], []
    for place in worst:  # never more than two shards in memory
        shard, own = store.shards[place], alive[place]
        waiting.append({"keys": shard.keys[own]} | {name: field[own] for name, field in shard.fields.items()})
        if sum(len(part["keys"]) for part in waiting) >= ROWS_PER_SHARD:
            written += write(store, waiting, ROWS_PER_SHARD)
    written += write(store, waiting, 1)
    for path in set(old) - set(written):
        path.unlink(missing_ok=True)
    store.reload()
    logger.info("%s: %d shards written anew as %d", store.folder, len(old), len(written))


def write(store: Store, waiting: list[dict[str, np.ndarray]], least: int) -> list:
    """New shards of the rows that wait, while there are at least so many; those that are left go on waiting."""
    written = []
    while waiting and sum(len(part["keys"]) for part in waiting) >= least:
        rows = {name: np.concatenate([part[name] for part in waiting]) for name in waiting[0]}
        waiting[:] = [{name: value[ROWS_PER_SHARD:] for name, value in rows.items()}]
        written.append(store.write(**{name: value[:ROWS_PER_SHARD] for name, value in rows.items()}))
    return written


def first_of_equal(store: Store) -> list[np.ndarray]:
    """For each shard (rows,) booleans: whether this is the first row of its key."""
    keys = np.concatenate([as_scalars(shard.keys) for shard in store.shards]) if store.shards else np.empty(0, "V16")
    first = np.zeros(len(keys), bool)
    if len(keys):
        first[np.unique(keys, return_index=True)[1]] = True
    return np.split(first, np.cumsum([len(shard.keys) for shard in store.shards])[:-1]) if store.shards else []
