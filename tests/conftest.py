"""What several test files need: tiny towers, a tiny captioned corpus, a way to launch the real command lines."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import (  # noqa: F401  fixtures
    gallery_ids,
    logging_put_back,
    own_datasets_cache,
    picture_folder,
    save_generative,
    tiny_clip,
    tiny_siglip,
    tiny_xmatching,
)

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (240, 220, 50)}
TEXT_CONFIG = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
VISION_CONFIG = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip


@pytest.fixture
def text_config():
    return dict(TEXT_CONFIG)


@pytest.fixture
def vision_config():
    return dict(VISION_CONFIG)


@pytest.fixture(scope="session")
def flickr_folder(tmp_path_factory):
    """Twelve two-colour pictures with four captions each, laid out as Flickr8k: captions.txt and images/."""
    folder = tmp_path_factory.mktemp("flickr")
    (folder / "images").mkdir()
    rows = []
    for left, a in COLOURS.items():
        for right, b in COLOURS.items():
            if left == right:
                continue
            picture = Image.new("RGB", (32, 24), a)
            picture.paste(b, (16, 0, 32, 24))
            name = f"{left}_{right}.jpg"
            picture.save(folder / "images" / name, quality=95)
            rows += [
                (name, f"{left} on the left and {right} on the right"),
                (name, f"the left side is {left} , the right side is {right}"),
                (name, f"a {left} half next to a {right} half"),
                (name, f"{left} beside {right}"),
            ]
    with open(folder / "captions.txt", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows(rows)
    return folder


def _write_shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def write_shard():
    """write_shard(path, [(name, bytes, text or what becomes json), ...]): a tar file of them in this order."""
    return _write_shard


@pytest.fixture
def flickr_shards(flickr_folder, tmp_path):
    """The pictures and captions of `flickr_folder` as four tar shards of three samples."""
    with open(flickr_folder / "captions.txt", newline="") as file:
        captions = {}
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    folder, names = tmp_path / "shards", list(captions)
    folder.mkdir()
    for shard in range(4):
        files = []
        for name in names[3 * shard : 3 * shard + 3]:
            files.append((name, (flickr_folder / "images" / name).read_bytes()))
            files.append((name.replace(".jpg", ".json"), {"caption": captions[name], "width": 32}))
        _write_shard(folder / f"{shard:05d}.tar", files)
    return folder


@pytest.fixture
def launch(tmp_path):
    """launch("run_x.py", "--flag", ...) -> CompletedProcess, as a user would: a fresh process in an empty folder."""

    def run(script, *arguments, launcher=(sys.executable,), cwd=tmp_path, timeout=300, **env):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        }
        command = [*launcher, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment | env, capture_output=True, text=True, timeout=timeout)

    return run
