"""An image processor said in a recipe, against Pillow's arithmetic written out."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from imagedex import command_line
from imagedex.errors import UserError
from imagedex.training.arguments import ModelArguments
from imagedex.training.dual_encoder.arguments import XMatchingArguments
from imagedex.training.image_processor import build_image_processor, output_size
from imagedex.training.processors import build_processor
from imagedex.training.towers import check_towers

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": "bilinear",
            "image_mean": MEAN, "image_std": STD}  # fmt: skip


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (256, 256), (640, 427), (50, 40)])
def test_shortest_edge_256_centre_224_imagenet(tmp_path, width, height):
    build_image_processor(IMAGENET).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = noise(width, height)

    wide, high = (int(256 * width / height), 256) if width >= height else (256, int(256 * height / width))
    resized = picture.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - 224) // 2, (high - 224) // 2
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(np.float64) / 255
    expected = ((pixels - MEAN) / STD).transpose(2, 0, 1)
    found = processor(images=picture, return_tensors="np")["pixel_values"][0]
    assert found.shape == (3, 224, 224)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_left_out_and_what_is_not_cropped():
    squash = build_image_processor({"size": {"height": 20, "width": 30}})
    assert output_size(squash) == (20, 30)
    assert list(squash.image_mean) == list(CLIPImageProcessorPil.image_mean)
    assert output_size(build_image_processor({"size": {"shortest_edge": 20}})) is None
    assert output_size(build_image_processor(IMAGENET)) == (224, 224)
    assert build_image_processor(IMAGENET | {"resample": 3}).resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"siz": 1}, "no 'siz'; did you mean size"),
        ({"size": {"shortest": 3}}, "size"),
        ({"size": {"shortest_edge": 8}, "resample": "bilinar"}, "resample is one of nearest"),
        ({"size": {"shortest_edge": 8}, "image_mean": 0.5}, "image_mean is three numbers"),
        ({"size": {"shortest_edge": 8}, "image_std": [1, 2]}, "image_std is three numbers"),
        ({"size": {"shortest_edge": 8}, "crop_size": "big"}, "big"),
        ({"size": {"shortest_edge": 100_000}}, "size of 100,000 pixels: at most 4,096"),
        ({"size": {"height": 8, "width": 10**9}}, "size of 1,000,000,000 pixels"),
        ({"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 5000}}, "crop_size of 5,000 pixels"),
    ],
)
def test_mistakes_are_one_line(config, message):
    with pytest.raises(UserError, match=message) as caught:
        build_image_processor(config)
    assert "\n" not in str(caught.value) and "--image_processor_config" in str(caught.value)


def parse(*flags):
    return command_line.parse_arguments((ModelArguments, XMatchingArguments), "", list(flags))


def test_on_the_command_line_and_what_contradicts_it():
    flags = ("--image_processor_config", json.dumps(IMAGENET), "--vision_config", '{"model_type": "resnet"}',
             "--text_config", '{"model_type": "bert"}')  # fmt: skip
    arguments = parse(*flags)
    check_towers(*arguments)
    nothing = ("model_name_or_path", None), None
    processor = build_processor(arguments[0], *nothing, None, ["a red half"], {}).image_processor
    assert processor.to_dict() == build_image_processor(IMAGENET).to_dict()
    with pytest.raises(UserError, match="leave --image_size out"):
        build_processor(arguments[0], *nothing, 64, ["a red half"], {})
    with pytest.raises(UserError, match="not both"):
        check_towers(*parse(*flags, "--image_processor_name", "x"))
    with pytest.raises(UserError, match="not valid JSON"):
        parse("--image_processor_config", "{size: 3")
    with pytest.raises(UserError, match="must be a mapping with a size"):
        parse("--image_processor_config", '{"crop_size": 3}')
    with pytest.raises(UserError, match="did you mean crop_size"):
        check_towers(*parse("--image_processor_config", '{"size": {"shortest_edge": 9}, "cropsize": 8}'))
