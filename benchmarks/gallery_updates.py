r"""What a gallery takes on disk after many random updates, and what each update costs.

    python benchmarks/gallery_updates.py                                    # minutes on two cores
    python benchmarks/gallery_updates.py --pictures 300 --updates 1000 --singly 20

A folder of drawn pictures of 32 x 32 pixels, and a small XMatchingModel with random weights (512 numbers a vector). Pictures are
added, changed and removed at random, first in batches, then one by one, each followed by `Gallery.add`. Reported: bytes of all
shards beside those of the vectors that are in use, the most there ever were, and by update its seconds and the bytes it wrote (as
Linux counts them, of this process). `--catalog_rows`: what one change of a catalog of so many pictures writes.
"""

import argparse
import importlib.metadata
import random
import sys
import tempfile
import time
from pathlib import Path

from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from million_queries import save_model
from PIL import Image

WIDTH = 512
COLUMNS = ("pictures", "updates", "at_once", "disk_ratio", "most_disk_ratio", "seconds_an_update", "written_kib_an_update",
           "catalog_mib_of_rows", "hardware", "torch", "transformers")  # fmt: skip


def draw(path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (4, 4), rng.randbytes(48)).resize((32, 32)).save(path)


def update(folder: Path, names: list[str], most: int, rng: random.Random, count: int) -> None:
    """So many pictures are added, changed or removed; about as many stay as there were."""
    for _ in range(count):
        what = rng.choice(("add", "change", "remove"))
        if what == "remove" and len(names) > most * 0.8 or len(names) > most * 1.2:
            place = rng.randrange(len(names))
            names[place], names[-1] = names[-1], names[place]
            (folder / names.pop()).unlink()
        elif what == "change" and names:
            draw(folder / rng.choice(names), rng)
        else:
            names.append(f"{rng.randrange(100):02d}/{rng.getrandbits(64):016x}.bmp")
            draw(folder / names[-1], rng)


def bytes_written() -> int:
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("wchar")), 0)


def disk_ratio(gallery) -> float:
    """Bytes of all shards over those of the vectors and keys in use."""
    from imagedex.gallery.catalog import keys_of

    live = len({bytes(key) for key in keys_of(gallery.table)[gallery.readable]})
    row = sum(part[:1].nbytes for part in (gallery.store.shards[0].keys, *gallery.store.shards[0].fields.values()))
    return sum(path.stat().st_size for path in (gallery.folder / "vectors").iterdir()) / (live * row)


def measure(gallery, folder: Path, names: list[str], count: int, at_once: int, rng: random.Random) -> dict:
    seconds = written = done = 0
    ratios = [disk_ratio(gallery)]
    most = len(names)
    while done < count:
        update(folder, names, most, rng, min(at_once, count - done))
        done += min(at_once, count - done)
        before, started = bytes_written(), time.perf_counter()
        gallery.add(folder)
        seconds, written = seconds + time.perf_counter() - started, written + bytes_written() - before
        ratios.append(disk_ratio(gallery))
    assert sorted(gallery.table["image_id"].to_pylist()) == sorted(names)
    found = {
        "updates": count,
        "at_once": at_once,
        "disk_ratio": round(ratios[-1], 3),
        "most_disk_ratio": round(max(ratios), 3),
    }
    each = {"seconds_an_update": round(seconds / count, 4), "written_kib_an_update": round(written / count / 2**10, 1)}
    return found | each


def catalog_mib(table, rows: int, folder: Path, header) -> float:
    """What a change of a catalog of so many rows writes: it is replaced as a whole."""
    import pyarrow as pa

    from imagedex.gallery import catalog

    rng = random.Random(0)
    keys = pa.array([rng.randbytes(16) for _ in range(rows)], pa.binary(16))
    names = pa.array([f"{rng.randrange(1000):03d}/IMG_{number:08d}.jpg" for number in range(rows)])
    large = pa.concat_tables([table.slice(0, 1)] * rows).combine_chunks()
    for name, values in (("key", keys), ("image_id", names), ("path", names)):
        large = large.set_column(large.column_names.index(name), name, values)
    catalog.write(folder, header, large)
    return (folder / catalog.FILE).stat().st_size / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--at_once", type=int, default=200)
    parser.add_argument("--singly", type=int, default=500, help="of the updates, so many one by one")
    parser.add_argument("--catalog_rows", type=int, default=1_000_000)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from imagedex import Gallery

    rows, rng, names = [], random.Random(0), []
    versions = {"hardware": hardware(), **{name: importlib.metadata.version(name) for name in COLUMNS[-2:]}}
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "model"), WIDTH)
        gallery = Gallery.open(Path(folder, "gallery"), str(Path(folder, "model")))
        for number in range(args.pictures):
            names.append(f"{number % 100:02d}/{number:016x}.bmp")
            draw(Path(folder, "pictures", names[-1]), rng)
        gallery.add(Path(folder, "pictures"))
        catalog = round(catalog_mib(gallery.table, args.catalog_rows, Path(folder, "catalog"), gallery.header), 1)
        for count, at_once in ((args.updates - args.singly, args.at_once), (args.singly, 1)):
            row = measure(gallery, Path(folder, "pictures"), names, count, at_once, rng)
            rows.append(
                {"pictures": args.pictures}
                | row
                | {"catalog_mib_of_rows": f"{catalog} of {args.catalog_rows}"}
                | versions
            )
            print(rows[-1], flush=True)
    path = args.results_dir / f"gallery_updates-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    main()
