"""``shape_scenes``: the built-in corpus of small compositional pictures, drawn here, the same on every machine.

Several shapes, colours and sizes a picture, placed on a grid; five captions a picture, true of it and usually of no
other. What remains for a reader who makes no mistake is :func:`perfect_reader`. The corpus brings no split.
"""

import io
import os
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from imagedex.corpora.schema import FormContents, Picture
from imagedex.corpora.shape_scenes.captions import captions_of, perfect_reader
from imagedex.corpora.shape_scenes.drawing import draw_scene
from imagedex.corpora.shape_scenes.graph import VERSION, Scene, make_scenes, scene_id
from imagedex.errors import UserError
from imagedex.files import A_DAY, clear_leftovers, write_atomically

__all__ = ["DEFAULT_SCENES", "draw_missing", "perfect_reader", "read"]

DEFAULT_SCENES = 600
MAX_SCENES = 100_000


def read(
    config_name: str | None = None, *, folder: str | os.PathLike | None = None, seed: int = 0, image_size: int = 96
) -> FormContents:
    """The corpus, its pictures drawn where they are not there yet.

    Args:
        config_name: the number of scenes, as text; :data:`DEFAULT_SCENES` when not given.
        folder: where the pictures are kept; below the datasets cache when not given.
        seed: another seed, other scenes.
        image_size: pixels, both ways.

    Raises:
        UserError: ``config_name`` is no number of scenes, or the folder cannot be written.
    """
    n_scenes = _number_of_scenes(config_name)
    if folder is None:
        name = f"v{VERSION}-seed{seed}-{image_size}px"
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "imagedex_shape_scenes" / name
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    scenes = make_scenes(n_scenes, seed)
    try:
        draw_missing(scenes, folder, image_size)
    except OSError as error:
        raise UserError(f"shape_scenes cannot be drawn into {folder}: {error.strerror or error}") from error
    pictures = [
        Picture(
            scene_id(number),
            str(folder / scene_id(number)),
            [caption.text for caption in captions],
            scene.signature,
        )
        for number, (scene, captions) in enumerate(zip(scenes, captions_of(n_scenes, seed), strict=True))
    ]
    return FormContents(f"built-in shape_scenes ({n_scenes} scenes, seed {seed})", {"train": pictures})


def draw_missing(scenes: tuple[Scene, ...], folder: Path, image_size: int = 96) -> int:
    """Draws those scenes whose file is not in ``folder``; each appears whole or not at all. Returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder, older_than=A_DAY)
    there = set(os.listdir(folder))
    missing = [number for number in range(len(scenes)) if scene_id(number) not in there]
    for number in tqdm(missing, desc="Drawing shape_scenes", unit="scenes", disable=None if missing else True):
        png = io.BytesIO()
        draw_scene(scenes[number], image_size).save(png, format="PNG")
        write_atomically(folder / scene_id(number), png.getvalue())
    return len(missing)


def _number_of_scenes(config_name: str | None) -> int:
    if config_name is None:
        return DEFAULT_SCENES
    text = str(config_name)
    if not text.isdecimal() or not 2 <= int(text) <= MAX_SCENES:
        raise UserError(
            f"--dataset_config_name {config_name}: shape_scenes takes a number of scenes, 2 to {MAX_SCENES}"
        )
    return int(text)
