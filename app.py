"""A page over the pictures that lie beside this file: the entry of a Hugging Face Space, see docs/gallery.md.

    python app.py

From the environment: IMAGEDEX_PICTURES (default: pictures; where there is such a folder, the gallery is brought in step with it
first), IMAGEDEX_GALLERY (default: gallery), IMAGEDEX_MODEL, IMAGEDEX_KEEP, HOST, PORT.
"""

import os
from pathlib import Path

from imagedex import endings
from imagedex.commands import index, serve


def flags(**values: str | None) -> list[str]:
    return [word for name, value in values.items() if value for word in (f"--{name}", value)]


def main() -> None:
    setting, in_space = os.environ.get, "SPACE_ID" in os.environ
    gallery = flags(gallery=setting("IMAGEDEX_GALLERY", "gallery"), model=setting("IMAGEDEX_MODEL"))
    pictures = setting("IMAGEDEX_PICTURES", "pictures")
    if Path(pictures).is_dir():
        index([pictures, *gallery])
    host = setting("HOST", "0.0.0.0" if in_space else "127.0.0.1")
    serve([*gallery, *flags(host=host, port=setting("PORT", "7860"), keep=setting("IMAGEDEX_KEEP"))])


if __name__ == "__main__":
    endings.run(main)
