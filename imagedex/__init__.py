"""imagedex: find pictures from sentences.

One import root, in a checkout as in an installed package: ``imagedex.modeling``, ``imagedex.configuration``,
``imagedex.metrics`` and the scripts (``imagedex.run_xmatching``, ...) lie inside the installed package, and beside this
folder in a checkout.
"""

import importlib
from pathlib import Path

__version__ = "0.2.0"

HERE = Path(__file__).resolve().parent
IS_CHECKOUT = not (HERE / "modeling").is_dir()
if IS_CHECKOUT:
    __path__.append(str(HERE.parent))

DATA = HERE.parent if IS_CHECKOUT else HERE  # where recipes/, model_cards/ and accelerate_configs/ lie


def __getattr__(name: str):
    """`from imagedex import Gallery`, without torch before it is asked for."""
    if name == "Gallery":
        return importlib.import_module("imagedex.gallery.gallery").Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
