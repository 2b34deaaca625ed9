"""Encoding a folder of pictures: a gallery, sentence-transformers with the same weights, and the tower's bare forward pass.

    python benchmarks/encode_pictures.py                       # ViTs at 224, JPEGs of 640 x 480
    python benchmarks/encode_pictures.py --tower vit_b32 vit_s16 --pictures 512

The weights are random, which costs as much as trained ones. All three encode the same pictures in one process, in turn,
`--repeat` times. *Bare* is `get_image_features` on pixels that lie ready: no way of encoding can be faster than the model.
A gallery's time is that of all of `Gallery.add`: finding, hashing, decoding, encoding, writing.
"""

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from compare_losses import write
from gradient_cache_memory import ROOT, hardware
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 300}
SHAPES = {  # width, layers, heads, patch
    "vit_b16": (768, 12, 12, 16),
    "vit_b32": (768, 12, 12, 32),
    "vit_s16": (384, 12, 6, 16),
    "vit_tiny": (64, 2, 2, 32),
}
COLUMNS = (
    "tower", "pictures", "batch_size", "who", "pictures_a_second", "of_bare", "least", "most", "repeats", "hardware", "threads",
    "torch", "transformers", "sentence-transformers",
)  # fmt: skip


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of 640 x 480 about as large as a camera's, 110 kB: smooth colours and some grain."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    for path in paths:
        rough = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
        grain = generator.normal(0, 12, (480, 640, 1))
        Image.fromarray(np.clip(np.asarray(rough) + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def save_model(folder: Path, tower: str) -> None:
    """A CLIP of the tower's size, with the tokenizer and the image processor that go with it."""
    torch.manual_seed(0)
    width, layers, heads, patch = SHAPES[tower]
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch}
    vision |= {"intermediate_size": 4 * width, "image_size": 224}
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=256)).eval().save_pretrained(folder)
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizerFast(vocab={word: place for place, word in enumerate(words)}, merges=[])
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)


class Bare:
    """The tower alone; its pixels are drawn once."""

    def __init__(self, model: Path, paths: list[Path], batch_size: int):
        self.model = CLIPModel.from_pretrained(model).eval().to(DEVICE)
        self.pixels, self.steps = torch.randn(batch_size, 3, 224, 224, device=DEVICE), len(paths) // batch_size

    def encode(self) -> None:
        with torch.inference_mode():
            for _ in range(self.steps):
                self.model.get_image_features(pixel_values=self.pixels)
        if DEVICE == "cuda":
            torch.cuda.synchronize()


class InGallery:
    """A new gallery each time."""

    def __init__(self, model: Path, paths: list[Path], batch_size: int):
        from imagedex import Gallery
        from imagedex.commands import default_workers

        self.folder, self.pictures = model.parent / "gallery", paths[0].parent
        self.options = {"batch_size": batch_size, "num_workers": default_workers()}
        self.open = lambda: Gallery.open(self.folder, str(model), device=DEVICE)
        self.gallery = self.open()
        self.gallery.model.encoder  # noqa: B018  loads the weights

    def encode(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        gallery = self.open()
        gallery.model = self.gallery.model
        gallery.add(self.pictures, **self.options)


class SentenceTransformers:
    """As its documentation says: `model.encode` of opened pictures."""

    def __init__(self, model: Path, paths: list[Path], batch_size: int):
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(model), device=DEVICE)
        self.paths, self.batch_size = paths, batch_size

    def encode(self) -> None:
        pictures = [Image.open(path) for path in self.paths]
        self.model.encode(pictures, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)


WAYS = {"bare": Bare, "gallery": InGallery, "sentence-transformers": SentenceTransformers}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(tower: str, paths: list[Path], batch_size: int, repeats: int) -> list[dict]:
    """Rows of the table: median pictures a second, and what that is of the bare forward pass of the same turn."""
    seconds = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model, tower)
        ways = {name: way(model, paths, batch_size) for name, way in WAYS.items()}
        for turn in range(repeats + 1):  # the first, which warms up, is not counted
            for name, way in ways.items():
                started = time.perf_counter()
                way.encode()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, own in seconds.items():
        shares = sorted(bare / one for bare, one in zip(seconds["bare"], own, strict=True))
        row = {"tower": tower, "pictures": len(paths), "batch_size": batch_size, "who": name}
        row |= {"pictures_a_second": round(len(paths) / median(own), 1), "of_bare": round(median(shares), 3)}
        row |= {"least": round(shares[0], 3), "most": round(shares[-1], 3), "repeats": repeats, "hardware": hardware()}
        rows.append(row | {"threads": torch.get_num_threads()})
        rows[-1] |= {name: importlib.metadata.version(name) for name in COLUMNS[-3:]}
        print({name: rows[-1][name] for name in COLUMNS[:8]}, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", nargs="+", choices=SHAPES, default=["vit_b16", "vit_b32", "vit_s16"])
    parser.add_argument("--pictures", type=int, default=256, help="default: 256")
    parser.add_argument("--batch_size", type=int, default=32, help="default: 32, which divides the pictures")
    parser.add_argument("--repeat", type=int, default=3, help="default: 3")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.pictures % args.batch_size:
        parser.error("--batch_size must divide --pictures")
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_pictures(Path(folder), args.pictures)
        rows = [row for tower in args.tower for row in compare(tower, paths, args.batch_size, args.repeat)]
    path = args.results_dir / f"encode_pictures-{hardware()}.csv"
    write(path, COLUMNS, rows)
    print(path)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
