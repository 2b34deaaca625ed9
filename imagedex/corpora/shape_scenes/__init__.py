"""``shape_scenes``: the built-in corpus of drawn pictures."""

from imagedex.corpora.shape_scenes.captions import perfect_reader
from imagedex.corpora.shape_scenes.corpus import DEFAULT_SCENES, draw_missing, read

__all__ = ["DEFAULT_SCENES", "draw_missing", "perfect_reader", "read"]
