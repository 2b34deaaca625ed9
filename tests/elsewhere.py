"""A fresh process in another folder, in which nothing of this repository can be imported: where a saved model stands alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Before a script: what it may use, and a picture.
PREAMBLE = """
import json, os, sys
import numpy as np, torch
from PIL import Image
for name in ("imagedex", "modeling", "configuration"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is importable: this test proves nothing")
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor
name = sys.argv[1]
picture = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
"""


def picture() -> Image.Image:
    """The picture that PREAMBLE makes."""
    return Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))


def run_elsewhere(script: str, folder: Path, name, *arguments, **environment) -> dict:
    """The JSON that a script, told a model's name and the arguments, prints last. Args: folder, made; where it runs."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, str(name), *arguments],
        cwd=folder,
        env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
