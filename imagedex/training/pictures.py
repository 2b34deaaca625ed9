"""Pictures of a corpus as a training reads them: pixels, or kept pixels; and batches of them."""

import functools
import logging
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, Value

from imagedex.encoding.store import picture_keys, without_origin
from imagedex.errors import UserError
from imagedex.modeling.picture_reading import read_cut_pictures, read_pictures

logger = logging.getLogger(__name__)

CHECKSUM = "checksum"  # of what is kept of a picture
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")  # what image processors give


class Pictures(torch.utils.data.Dataset):
    """Row -> what the image processor makes of the picture: `pixel_values` (3, height, width) float32, and what comes with it.

    Args:
        gallery: a corpus split, one row a picture.
        image_processor: any; it resizes, crops and normalises as it says.
        keep: read every picture once with `datasets.map` (parallel, cached on disk) and keep the numbers from then on: a byte
            a number where the processor's normalisation can be undone exactly, else four.
        augment: for training only, PIL picture -> PIL picture of the processor's size, in place of its resizing and
            cropping (see `augmentation.py`).
    """

    def __init__(
        self, gallery: Dataset, image_processor, keep: bool = False, num_proc: int | None = None, augment=None
    ):
        self.image_processor, self.augment = image_processor, augment
        self.gallery, self.rows = gallery, gallery.select_columns(["image"])
        self.levels = None
        self.kept: dict[str, tuple[tuple[int, ...], np.dtype]] = {}  # name -> shape and type of what is kept
        if keep:
            first = read_pictures([self.rows[0]["image"]], image_processor)
            self.kept = {name: (tuple(value.shape[1:]), value.numpy().dtype) for name, value in first.items()}
            self.levels = Levels.of(image_processor, first["pixel_values"])
            if self.levels:
                self.kept["pixel_values"] = self.kept["pixel_values"][0], np.dtype(np.uint8)
            self.rows = self.rows.map(
                self._bytes_of,
                batched=True,
                batch_size=64,
                num_proc=num_proc,
                remove_columns=["image"],
                features=Features({name: Value("binary") for name in self.kept} | {CHECKSUM: Value("uint32")}),
                desc="Reading pictures",
            )

    def _bytes_of(self, batch: dict) -> dict[str, list[bytes]]:
        inputs = read_pictures(batch["image"], self.image_processor)
        if self.levels:
            if not self.levels.explain(inputs["pixel_values"]):
                raise UserError(
                    "--keep_pixels: the image processor treats some pictures unlike the first; leave it out"
                )
            inputs["pixel_values"] = self.levels.taken(inputs["pixel_values"])
        kept = {name: [row.tobytes() for row in value.numpy()] for name, value in inputs.items()}
        rows = (dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True))
        return kept | {CHECKSUM: [self._checksum(row) for row in rows]}

    def _checksum(self, stored: dict[str, bytes]) -> int:
        return functools.reduce(lambda sum, name: zlib.crc32(stored[name], sum), sorted(self.kept), 0)

    def _read_anew(self, row: int) -> dict[str, bytes]:
        """Where a cached file has changed since it was written."""
        original = self.gallery[row]
        shown = original.get("image_id", f"picture {row}")
        logger.warning("--keep_pixels: what is kept of %s is damaged; it is read anew", shown)
        return {name: values[0] for name, values in self._bytes_of({"image": [original["image"]]}).items()}

    def keys(self) -> np.ndarray:
        """(pictures, 16) uint8, by which what is made of a picture is kept; see `Store`."""
        return picture_keys(self.gallery)

    @property
    def settings(self) -> list:
        """What decides, beside the picture, which numbers the model gets; JSON values."""
        return [without_origin(self.image_processor.to_dict()), repr(self.augment)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if self.kept:
            stored = self.rows[row]
            if self._checksum(stored) != stored[CHECKSUM]:
                stored = self._read_anew(row)
            inputs = {
                name: torch.from_numpy(np.frombuffer(stored[name], dtype=dtype).reshape(shape).copy())
                for name, (shape, dtype) in self.kept.items()
            }
            if self.levels:
                inputs["pixel_values"] = self.levels.given(inputs["pixel_values"])
            return inputs
        return picture_inputs(self.rows[row]["image"], self.image_processor, self.augment)


@dataclass
class Levels:
    """A picture's normalised numbers as the 256 levels that they came from, a quarter of the size.

    Attributes: scale, mean, std, (3, 1, 1) float32: a number is (level * scale - mean) / std.
    """

    scale: float
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, image_processor, example: torch.Tensor) -> "Levels | None":
        """Of a processor that says its scale, mean and deviation. None where they do not explain the example (B, 3, height,
        width) within float32's rounding: it has values between the levels, or is not such a processor."""
        config = getattr(image_processor, "data_config", None)  # timm's
        if config:
            scale, mean, std = 1 / 255, config["mean"], config["std"]
        else:
            names = ("rescale_factor", "image_mean", "image_std")
            scale, mean, std = (getattr(image_processor, name, None) for name in names)
        if not (scale and mean and std and example.ndim == 4 and example.shape[1] == len(mean)):
            return None
        levels = cls(scale, *(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std)))
        return levels if levels.explain(example) else None

    def explain(self, pixels: torch.Tensor) -> bool:
        return torch.allclose(self.given(self.taken(pixels)), pixels, atol=1e-5, rtol=1e-5)

    def taken(self, pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels * self.std + self.mean) / self.scale).round().clamp(0, 255).to(torch.uint8)

    def given(self, levels: torch.Tensor) -> torch.Tensor:
        # rescaled in double precision, as the processors do it: the same bits come out
        return ((levels.double() * self.scale).float() - self.mean) / self.std


def picture_inputs(picture, image_processor, augment=None) -> dict[str, torch.Tensor]:
    """One picture as a row of a batch. Args: augment, as in `Pictures`."""
    if augment is None:
        inputs = read_pictures([picture], image_processor)
    else:
        inputs = read_cut_pictures([augment(picture)], image_processor)
    return {name: value[0] for name, value in inputs.items()}


def stacked(rows: list[dict], prefix: str = "") -> dict[str, torch.Tensor]:
    """What rows of pictures have, one below the other: pixels, or states that were kept."""
    names = [prefix + name for name in (*IMAGE_INPUTS, "image_states") if rows and prefix + name in rows[0]]
    return {name: torch.stack([row[name] for row in rows]) for name in names}
