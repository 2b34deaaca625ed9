"""Pictures that are kept: the numbers of those that are read each time, in the least bytes that hold them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from imagedex.errors import UserError
from imagedex.training.pictures import Pictures

PROCESSORS = {
    "vit": (ViTImageProcessorPil(size={"height": 24, "width": 16}), 1),
    "clip": (CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), 1),
    # padded after cropping and normalised after that: the padding is black
    "clip, padded": (CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 16, "width": 16}), 1),
    "not normalised": (ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False), 4),
    "patches": (Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20), 4),
}


@pytest.fixture
def gallery():
    draw = np.random.default_rng(0)
    return Dataset.from_dict(
        {"image": [Image.fromarray(draw.integers(0, 256, (30 + 5 * n, 40, 3), dtype=np.uint8)) for n in range(4)]}
    )


@pytest.mark.parametrize("name", PROCESSORS)
def test_kept_pictures_are_those_that_are_read(gallery, name):
    image_processor, size = PROCESSORS[name]
    read, kept = Pictures(gallery, image_processor), Pictures(gallery, image_processor, keep=True)
    for row in range(len(gallery)):
        wanted, found = read[row], kept[row]
        assert found.keys() == wanted.keys()
        for part, value in wanted.items():
            assert found[part].dtype == value.dtype
            assert torch.equal(found[part], value)
        assert len(kept.rows[row]["pixel_values"]) == size * wanted["pixel_values"].numel()


def test_a_processor_that_is_not_the_same_for_all_is_refused(gallery):
    class Fading(ViTImageProcessorPil):
        def __call__(self, images, **kwargs):
            inputs = super().__call__(images, **kwargs)
            if len(images) > 1:
                inputs["pixel_values"] = inputs["pixel_values"] / 2 + 0.123
            return inputs

    with pytest.raises(UserError, match="--keep_pixels: the image processor treats some pictures unlike the first"):
        Pictures(gallery, Fading(size={"height": 16, "width": 16}), keep=True)


@pytest.mark.parametrize("name", ["vit", "patches"])
def test_a_flipped_byte_of_a_kept_picture_is_found_and_the_picture_read_anew(gallery, name, tmp_path, caplog):
    gallery.save_to_disk(tmp_path)
    gallery = Dataset.load_from_disk(tmp_path)
    image_processor, _ = PROCESSORS[name]
    Pictures(gallery, image_processor, keep=True)
    kept = Pictures(gallery, image_processor, keep=True)  # as a later run, from the cache
    expected = kept[2]["pixel_values"].clone()
    path = Path(kept.rows.cache_files[0]["filename"])
    content, row = path.read_bytes(), kept.rows[2]["pixel_values"]
    with path.open("r+b") as file:
        file.seek(content.index(row) + len(row) // 2)
        file.write(bytes([row[len(row) // 2] ^ 16]))
    damaged = Pictures(gallery, image_processor, keep=True)
    assert damaged.rows[2]["pixel_values"] != row  # from the same file
    assert torch.equal(damaged[2]["pixel_values"], expected) and "picture 2 is damaged" in caplog.text
    assert torch.equal(damaged[1]["pixel_values"], kept[1]["pixel_values"]) and caplog.text.count("damaged") == 1
