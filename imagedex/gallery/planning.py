"""What an update would change: the catalog as its sources are now, before anything is encoded."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from imagedex.errors import UserError
from imagedex.gallery import catalog, columns, looked, scanning, sources


def planned(
    folder: Path, table: pa.Table, header: catalog.Header, checked: Sequence, threads: int, progress: bool
) -> tuple[pa.Table, scanning.Changes, list[str]]:
    """Looks at the sources.

    Args:
        folder: of the gallery. table: its catalog as it is.
        header: of the catalog as it will be; gets the sources' roots.
        checked: the sources, see `imagedex.gallery.sources.check`.

    Returns: the catalog as it will be, but for what cannot be decoded; what changes; the roots of the sources.

    Raises `UserError`: two pictures would have one image_id.
    """
    roots, changes, places, said = catalog.Roots(dict(header.roots)), scanning.Changes(), [], []
    known = list(zip(table["image_id"].to_pylist(), table["root"].to_pylist(), strict=True))
    for source in checked:
        taken = {place.image_id for place in places if place.root != str(source)}
        taken |= {name for name, root in known if root != str(source)}
        there = sources.look(source, roots.prefix(str(source), taken))
        places += there.places
        said.append(there.said)
        for ending, count in there.others.items():
            changes.passed_over[ending] = changes.passed_over.get(ending, 0) + count
    header.roots = roots.prefixes
    names = {str(source) for source in checked}
    check_names(table, places, names)
    now = in_step(folder, table, places, names, changes, threads, progress)
    captions = {place.image_id: place.captions for place in places}
    now, new = columns.brought_up_to_date(table, now, names, captions, columns.joined(said))
    changes.said_anew(new)
    return now, changes, sorted(names)


def check_names(table: pa.Table, places: Sequence[scanning.Place], roots: set[str]) -> None:
    """Raises `UserError` where two pictures would have one image_id: one of them could not be found."""
    others = table.filter(pc.invert(pc.is_in(table["root"], pa.array(sorted(roots), pa.string()))))
    seen = dict(zip(others["image_id"].to_pylist(), others["path"].to_pylist(), strict=True))
    for place in places:
        if seen.setdefault(place.image_id, place.path) != place.path:
            both = f"{seen[place.image_id]} and {place.path}"
            raise UserError(
                f"{both} would both be called {place.image_id}; give one folder that holds both, or two galleries"
            )


def in_step(
    folder: Path,
    table: pa.Table,
    places: Sequence[scanning.Place],
    roots: set[str],
    changes: scanning.Changes,
    threads: int,
    progress: bool,
) -> pa.Table:
    """The table as the sources are now, without vectors yet. A file that could not be opened is tried again."""
    known = {
        row["image_id"]: row
        for row in table.select(["image_id", "path", "bytes", "changed", "key", "root"]).to_pylist()
    }
    ours = {name for name, row in known.items() if row["root"] in roots}
    new = []
    for place in places:
        row = known.get(place.image_id)
        if row is None or row["key"] == scanning.NOT_READ or not place.is_as(row):
            new.append(place)
    described = looked.described(folder, new, threads, progress)
    for row in described:
        before = known.get(row["image_id"])
        if before is None:
            changes.added.append(row["image_id"])
        elif before["key"] != row["key"]:
            changes.changed.append(row["image_id"])
    changes.removed = sorted(ours - {place.image_id for place in places})
    changes.unchanged = len(places) - len(changes.added) - len(changes.changed)
    gone = {*changes.removed, *(row["image_id"] for row in described)}
    stays = pc.invert(pc.is_in(table["image_id"], pa.array(sorted(gone), pa.string())))
    table = columns.joined([table.filter(stays), scanning.as_table(described)])
    return table.sort_by("image_id")
