"""Room on disk: rows that no picture of the catalog needs any more are dropped before they are a fifth of the store."""

import logging

import numpy as np

from imagedex.encoding.store import ROWS_PER_SHARD, Store, as_scalars

logger = logging.getLogger(__name__)

MOST_SMALL = 32  # shards beyond what the rows need: each is a file to be opened
HEADER = 400  # bytes of a shard beside its rows
MOST = 1.15  # of the room that the live rows need
LEFT = 0.03  # dead rows that may stay, as a share of the live ones, when some are dropped


def without_vector(store: Store, keys: np.ndarray) -> np.ndarray:
    """Places among the keys whose vector is zero: their pictures could not be decoded."""
    rows = store.rows(keys)
    empty = [
        start + np.flatnonzero(~rows.array("vectors", slice(start, start + 2**14)).any(1))
        for start in range(0, len(rows), 2**14)
    ]
    return np.concatenate(empty) if empty else np.empty(0, np.int64)


def compact(store: Store, live: np.ndarray) -> None:
    """Writes shards anew that hold many dead rows or few living ones, where the store takes more room than it has to. A change of
    a few pictures therefore moves few rows: a shard waits until a seventh of all rows is dead.

    New shards are written before old ones are removed: a kill leaves rows twice, never none.

    Args: live (N, 16) keys that are needed.
    """
    alive = living(store, live)
    counts = np.array([int(own.sum()) for own in alive], np.int64)
    dead = np.array([len(own) for own in alive], np.int64) - counts
    size = sum(shard.path.stat().st_size for shard in store.shards)
    row_bytes = max(
        (sum(a[:1].nbytes for a in (shard.keys, *shard.fields.values())) for shard in store.shards), default=1
    )
    shards = -(-counts.sum() // ROWS_PER_SHARD)
    room = MOST * counts.sum() * row_bytes + shards * HEADER + row_bytes
    too_large = size > room or dead.sum() > (MOST - 1) * counts.sum() + 1
    if not too_large and len(alive) <= 2 * shards + MOST_SMALL:
        return
    worst = set(np.flatnonzero(counts < ROWS_PER_SHARD // 2).tolist())
    if too_large:
        order = np.argsort(-dead / np.maximum(counts, 1), kind="stable")
        left = dead.sum() - np.cumsum(dead[order])  # dead rows, were the shards up to this one written anew
        worst |= set(order[: 1 + int(np.argmax(left <= LEFT * counts.sum()))].tolist())
    rewrite(store, sorted(worst), alive)


def rewrite(store: Store, places: list[int], alive: list[np.ndarray]) -> None:
    """Args: places of shards; alive, for every shard (rows,) booleans."""
    old, written, waiting = [store.shards[place].path for place in places], [], []
    for place in places:  # never more than two shards in memory
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


def living(store: Store, live: np.ndarray) -> list[np.ndarray]:
    """For each shard (rows,) booleans: rows whose key is needed; of equal keys the first."""
    if not store.shards:
        return []
    keys, wanted = np.concatenate([as_scalars(shard.keys) for shard in store.shards]), np.unique(as_scalars(live))
    alive = np.zeros(len(keys), bool)
    if len(wanted):
        first = np.unique(keys, return_index=True)[1]
        at = np.minimum(np.searchsorted(wanted, keys[first]), len(wanted) - 1)
        alive[first] = wanted[at] == keys[first]
    return np.split(alive, np.cumsum([len(shard.keys) for shard in store.shards])[:-1])
