"""A gallery that `imagedex index` keeps on disk, asked by run_retrieval.py: its pictures, and its vectors as they are."""

import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch

from imagedex.encoding.dual_encoder import DualEncoder
from imagedex.encoding.store import Store
from imagedex.errors import UserError
from imagedex.gallery import catalog
from imagedex.gallery.gallery import VECTORS
from imagedex.gallery.model import GalleryModel
from imagedex.gallery.pictures import open_picture
from imagedex.retrieval.gallery import usable_captions

logger = logging.getLogger(__name__)


class PlacedImage(datasets.Image):
    """Opened by its place, which may be within an archive."""

    def decode_example(self, value: dict, token_per_repo_id=None):
        return open_picture(value["path"])


class KeptGallery:
    """
    Args: folder, as the user named it. Raises `UserError`: there is no gallery, or none of its pictures can be found.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder).expanduser()
        known = catalog.read(self.folder)
        if known is None:
            raise UserError(
                f"--gallery {folder}: there is no gallery; make one with: imagedex index PHOTOS --gallery {folder}"
            )
        self.header, table = known
        self.table = table.filter(pc.equal(table["unreadable"], "")).combine_chunks()
        if not len(self.table):
            raise UserError(f"--gallery {folder} holds no picture that can be found")
        if len(self.table) < len(table):
            logger.warning(
                "--gallery %s: %d pictures cannot be read and are not found", folder, len(table) - len(self.table)
            )

    def rows(self, held_out: tuple[int, int] | None = None) -> datasets.Dataset:
        """Rows of the corpora's schema, one a picture, in the order of their image_ids. Args: held_out, see `read_gallery`."""
        places = self.table["path"].combine_chunks()
        images = pa.StructArray.from_arrays([pa.nulls(len(places), pa.binary()), places], ["bytes", "path"])
        table = pa.table({"image_id": self.table["image_id"], "image": images, "captions": self.table["captions"]})
        text = datasets.Value("string")
        features = datasets.Features({"image_id": text, "image": PlacedImage(), "captions": datasets.List(text)})
        rows = datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))
        return rows if held_out is None else usable_captions(rows, *held_out, True)

    def is_of(self, encoder: DualEncoder) -> bool:
        """Whether its vectors are this model's."""
        model = GalleryModel(encoder.name, header=self.header)
        model.encoder = encoder
        return bool(self.header.maker) and model.maker == self.header.maker

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, D) float32 in the order of the rows, and (N,) float32 biases, None of a model without a bank. Raises
        `UserError`: some are not there."""
        store = Store(self.folder / VECTORS, self.header.maker, "gallery")
        try:
            rows = store.rows(catalog.keys_of(self.table))
        except (KeyError, FileNotFoundError):
            raise UserError(f"{self.folder} lacks vectors of its pictures; give the index command again") from None
        bias = torch.from_numpy(rows.array("bias")).float() if "bias" in store.shards[0].fields else None
        return torch.from_numpy(rows.array("vectors")).float(), bias
