"""Pictures of the page, desktop and phone, light and dark, of drawn scenes. See `make screenshots`.

python tests/page/screenshots.py --model runs/quickstart/xmatching --output_dir build/screenshots
"""

import argparse
import base64
import io
import tempfile
import time
from pathlib import Path

from page_in_browser import Page, served
from PIL import Image

from imagedex.corpora.shape_scenes.drawing import draw_scene
from imagedex.corpora.shape_scenes.graph import make_scenes, scene_id
from imagedex.gallery.gallery import Gallery
from imagedex.page.server import application

QUERY = "#query :is(input, textarea)"
SENTENCE = "a rosy hoop left of an orange diamond"  # which the first scene is


def drawn(folder: Path, scenes: int) -> Path:
    folder.mkdir()
    for number, scene in enumerate(make_scenes(scenes)):
        draw_scene(scene, 320).save(folder / scene_id(number))
    return folder


class Album(Page):
    """The page; `keep` writes what is seen."""

    def __init__(self, album: Path, *args, **size):
        self.album = album
        super().__init__(*args, **size)

    def keep(self, name: str) -> None:
        time.sleep(0.7)
        picture = Image.open(io.BytesIO(base64.b64decode(self.screenshot()))).convert("RGB")
        picture.save(self.album / f"{name}.jpg", quality=82, optimize=True)

    def ask_for(self, text: str, seen: str = "document.querySelectorAll('#grid-0 figure').length > 3") -> None:
        self.type(QUERY, text)
        self.until(seen)
        self.until("[...document.querySelectorAll('#grid-0 figure img')].filter(i => i.offsetParent)"
                   ".slice(0, 6).every(i => i.naturalWidth > 0)")  # fmt: skip


def portraits(folder: Path, album: Path, address: str) -> None:
    for name, width, height in (("desktop", 1280, 800), ("phone", 390, 844)):
        for scheme in ("light", "dark"):
            with Album(album, folder / f"{name}-{scheme}", address, width=width, height=height) as page:
                page.scheme(scheme)
                page.keep(f"{name}-{scheme}-empty")
                page.ask_for(SENTENCE)
                page.keep(f"{name}-{scheme}")
                if page.ask("!!document.querySelector('#keep input')?.offsetParent"):
                    page.ask("document.querySelector('#keep input').click()")
                    page.until("document.querySelector('#grid-0 .improbable')")
                    page.keep(f"{name}-{scheme}-kept")
                    page.ask("document.querySelector('#grid-0 .rest')?.click()")
                    page.keep(f"{name}-{scheme}-rest")
                page.ask("document.querySelector('#grid-0 .more').click()")
                page.until("document.querySelector('#chips')?.innerText")
                page.ask("document.querySelector('#options button').click()")
                page.keep(f"{name}-{scheme}-options")
                page.ask("document.querySelector('#grid-0 figure').scrollIntoView()")
                page.ask("document.querySelector('#grid-0 figure').click()")
                page.keep(f"{name}-{scheme}-large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained model's folder")
    parser.add_argument("--second", help="another one, which answers beside it")
    parser.add_argument("--scenes", type=int, default=400, help="drawn pictures in the gallery (default: 400)")
    parser.add_argument("--output_dir", type=Path, default=Path("build/screenshots"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photos, galleries = drawn(folder / "scenes", args.scenes), []
        for number, model in enumerate(filter(None, (args.model, args.second))):
            galleries.append(Gallery.open(folder / str(number), model))
            galleries[-1].add(photos)
        with served(application(galleries)) as address:
            portraits(folder, args.output_dir, address)
    print(args.output_dir)


if __name__ == "__main__":
    main()
