"""Training pictures cut out at random, as torchvision documents RandomResizedCrop and RandomHorizontalFlip, without it.

Every draw comes from torch's generator: a seed repeats a run, and workers of a DataLoader differ from each other.
"""

import math

import torch
from PIL import Image

from imagedex.corpora.arguments import CorpusArguments
from imagedex.errors import UserError
from imagedex.modeling.picture_reading import as_rgb
from imagedex.training.image_processor import output_size

TRIES = 10


class RandomResizedCrop:
    """PIL picture -> a random part of it, resized to `size`, mirrored in half of the cases.

    The part's area is uniform in `scale` (fractions of the whole), its width / height log-uniform in `ratio` and its place
    uniform. Ten draws that do not fit inside the picture end in the largest central part of an allowed ratio.

    Args: size (height, width) in pixels; resample, Pillow's filter.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        resample: int = Image.Resampling.BILINEAR,
    ):
        self.size, self.scale, self.ratio, self.flip, self.resample = size, scale, ratio, flip, resample

    def __repr__(self):
        return f"RandomResizedCrop({self.size}, {self.scale}, {self.ratio}, {self.flip}, {self.resample})"

    @classmethod
    def for_processor(cls, image_processor, **options) -> "RandomResizedCrop":
        """With the size and filter of the pictures that `image_processor` makes for evaluation. Raises `UserError`.

        Args: options, `scale` and `flip` where they are not the default's.
        """
        size = output_size(image_processor)
        if size is None:
            raise UserError(
                "--image_augmentation needs pictures of one size, but the image processor's depends on the picture; "
                "give it a crop_size"
            )
        resample = getattr(image_processor, "resample", None)
        return cls(size, **options) if resample is None else cls(size, resample=int(resample), **options)

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of a picture of this size to keep: left, top, right, bottom in pixels."""
        smallest, largest = self.ratio
        for _ in range(TRIES):
            area = width * height * uniform(*self.scale)
            ratio = math.exp(uniform(math.log(smallest), math.log(largest)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = below(height - h + 1), below(width - w + 1)
                return left, top, left + w, top + h
        w = min(width, round(height * largest))
        h = min(height, round(width / smallest))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image: Image.Image) -> Image.Image:
        image = as_rgb(image)
        # Cut first, then resize: Pillow's resize(box=) would let pixels from outside the part in at its edges.
        image = image.crop(self.box(*image.size)).resize(self.size[::-1], self.resample)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if uniform(0, 1) < self.flip else image


def uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def below(count: int) -> int:
    """0, ..., count - 1, each as likely."""
    return torch.randint(count, (1,)).item()


def build_augmentation(data: CorpusArguments, image_processor) -> RandomResizedCrop | None:
    """What `--image_augmentation` names, for the pictures that `image_processor` makes. Raises `UserError`."""
    if data.image_augmentation == "none":
        return None
    return RandomResizedCrop.for_processor(image_processor, **data.crop_options())
