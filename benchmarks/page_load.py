r"""Fifty visitors at once: how long the page and the JSON endpoint make them wait, and what the server holds in memory.

    python benchmarks/page_load.py                                   # 50 visitors, 100,000 pictures
    python benchmarks/page_load.py --users 8 --seconds 5 --pictures 2000
    python benchmarks/page_load.py --pictures 1000000 --model DIR    # another dual encoder

`imagedex serve` runs in a process of its own, on this machine, which also plays the visitors. Each of them asks, looks for a
second and asks again, every question another one: once through the JSON endpoint, once as a browser does on the page (and then
the first 12 thumbnails that it has not seen). The gallery's vectors are random ones, written as `imagedex index` writes them;
its pictures are 300 drawn files. Without --model, a small XMatchingModel with random weights answers.
"""

import argparse
import http.client
import importlib.metadata
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from million_queries import PLACES, THINGS, draw_pictures, save_model

COLUMNS = ("asked", "users", "pictures", "seconds", "answers", "per_second", "median_ms", "p95_ms", "max_ms", "errors",
           "start_mib", "peak_mib", "hardware", "torch", "gradio")  # fmt: skip
LOOK = 1.0  # seconds between an answer and the visitor's next question
THUMBNAILS = 12  # on a screen


def make_gallery(folder: Path, model: str, photos: Path, pictures: int) -> None:
    """As `imagedex index` would leave it, of so many pictures that were never encoded."""
    import pyarrow as pa

    from imagedex.encoding.store import ROWS_PER_SHARD
    from imagedex.gallery import catalog
    from imagedex.gallery.gallery import Gallery

    gallery = Gallery.open(folder, model)
    files = sorted(str(path) for path in photos.iterdir())
    gallery.add(photos)
    row, dimension = gallery.table.slice(0, 1).to_pylist()[0], gallery.query_vector(["a dog"]).shape[0]
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (pictures, 16), dtype=np.uint8)
    for start in range(0, pictures, ROWS_PER_SHARD):
        own = keys[start : start + ROWS_PER_SHARD]
        vectors = rng.standard_normal((len(own), dimension), dtype=np.float32)
        gallery.store.write(own, vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    columns = {name: pa.repeat(pa.scalar(row[name], catalog.SCHEMA.field(name).type), pictures) for name in row}
    columns["image_id"] = [f"folder {number % 50}/{number:07d}.png" for number in range(pictures)]
    columns["path"] = [files[number % len(files)] for number in range(pictures)]
    columns["key"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), pictures, [None, pa.py_buffer(keys)])
    catalog.write(folder, gallery.header, pa.table(columns, schema=catalog.SCHEMA))


class Server:
    """`imagedex serve` in a process of its own."""

    def __init__(self, gallery: Path):
        with socket.create_server(("127.0.0.1", 0)) as own:
            self.port = own.getsockname()[1]
        command = [sys.executable, "-m", "imagedex", "serve", "--gallery", str(gallery), "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()  # its address, when it listens
        self.ask("POST", "/imagedex/search", {"query": ["a dog"]})

    def ask(self, method: str, path: str, body=None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, path, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        read = answer.read()
        connection.close()
        if answer.status != 200:
            raise OSError(f"{path}: status {answer.status}")
        return read

    def mib(self, name: str) -> int:
        """VmRSS (now) or VmHWM (the most until now)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


class Visitor(threading.Thread):
    """Asks until the end; `times` are the seconds that each answer took."""

    def __init__(self, server: Server, number: int, end: float):
        super().__init__(daemon=True)
        self.server, self.end, self.dice = server, end, random.Random(number)
        self.session = f"{self.dice.getrandbits(60):x}"  # of an open page
        self.times, self.errors, self.seen, self.wanted = [], 0, set(), []

    def run(self) -> None:
        time.sleep(self.dice.random() * LOOK)
        while time.time() < self.end:
            words = f"{self.dice.choice(THINGS)} number {self.dice.randrange(10**6)} {self.dice.choice(PLACES)}"
            started = time.perf_counter()
            try:
                self.ask(f"the {words}")
                self.times.append(time.perf_counter() - started)
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                self.errors += 1
            self.look()
            time.sleep(LOOK)

    def look(self) -> None:
        """What is done with an answer."""


class JsonVisitor(Visitor):
    def ask(self, sentence: str) -> None:
        self.server.ask("POST", "/imagedex/search", {"query": [sentence], "top_k": 24})


class PageVisitor(Visitor):
    """As the page's JavaScript asks. The time ends with the answer; thumbnails are fetched after it."""

    form = None  # number of the page's function that a typed sentence calls

    def ask(self, sentence: str) -> None:
        data = [sentence, "", None, "", 24, True, False, None, None]
        asked = {"data": data, "fn_index": self.form, "session_hash": self.session}
        answer = json.loads(self.server.ask("POST", "/gradio_api/run/predict", asked))
        self.wanted = [card["thumbnail"] for card in answer["data"][0]["cards"][:THUMBNAILS]]

    def look(self) -> None:
        for path in dict.fromkeys(self.wanted):
            if path not in self.seen:
                self.server.ask("GET", path)
        self.seen |= set(self.wanted)
        self.wanted = []


def page_function(server: Server) -> int:
    config = json.loads(server.ask("GET", "/config"))
    query = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "query")
    return next(one["id"] for one in config["dependencies"] if [query, "submit"] in one["targets"])


def measure(gallery: Path, kind: type[Visitor], name: str, users: int, seconds: float, pictures: int) -> dict:
    server = Server(gallery)
    try:
        start = server.mib("VmRSS")
        if kind is PageVisitor:
            PageVisitor.form = page_function(server)
        visitors = [kind(server, number, time.time() + seconds) for number in range(users)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join()
        peak = server.mib("VmHWM")
    finally:
        server.stop()
    times = sorted(1000 * one for visitor in visitors for one in visitor.times)
    row = {"asked": name, "users": users, "pictures": pictures, "seconds": seconds, "answers": len(times)}
    row |= {"per_second": round(len(times) / seconds, 1), "median_ms": round(statistics.median(times))}
    row |= {"p95_ms": round(times[int(0.95 * (len(times) - 1))]), "max_ms": round(times[-1])}
    row |= {"errors": sum(visitor.errors for visitor in visitors), "start_mib": start, "peak_mib": peak}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "gradio")}
    return row | {"hardware": hardware()} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--model", help="a dual encoder's folder (default: a small one with random weights)")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not args.model:
            save_model(folder / "model")
        draw_pictures(folder / "photos")
        make_gallery(folder / "gallery", args.model or str(folder / "model"), folder / "photos", args.pictures)
        rows = []
        for name, kind in (("json", JsonVisitor), ("page", PageVisitor)):
            rows.append(measure(folder / "gallery", kind, name, args.users, args.seconds, args.pictures))
            print({name: value for name, value in rows[-1].items() if name not in ("hardware", "torch", "gradio")})
    write(args.results_dir / f"page_load-{hardware()}.csv", COLUMNS, rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
