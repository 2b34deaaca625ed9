"""Several processes index what one indexes, byte for byte."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from imagedex.encoding.store import ROWS_PER_SHARD

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def index(photos, gallery, model, *launcher):
    command = [sys.executable, *launcher, "-m", "imagedex", "index", photos, "--gallery", gallery, "--model", model]
    command += ["--device", "cpu", "--num_workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contents(gallery):
    return {path.name: path.read_bytes() for path in gallery.rglob("*") if path.is_file()}


def test_two_processes_write_what_one_writes(tiny_xmatching, tmp_path):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(ROWS_PER_SHARD + 40):  # two shards, one for each process
        Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)).save(photos / f"{number}.bmp")
    (photos / "broken.jpg").write_bytes(b"x")
    one = index(photos, tmp_path / "one", tiny_xmatching)
    two = index(photos, tmp_path / "two", tiny_xmatching, *TORCHRUN)
    assert one.splitlines()[0].replace("one", "two") == two.splitlines()[0] and len(two.splitlines()) == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "two" / "vectors").glob("shard-*"))) == 2
