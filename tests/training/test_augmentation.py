"""Random crops against the documented algorithm: exact bounds, the distribution, the fallback, seeds and workers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

import run_xmatching
from imagedex import command_line
from imagedex.bounds import check_bounds
from imagedex.corpora import load_corpus
from imagedex.corpora.arguments import CorpusArguments, DataArguments
from imagedex.errors import UserError
from imagedex.training.augmentation import RandomResizedCrop, build_augmentation
from imagedex.training.pictures import Pictures

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 12}, resample=2)
DRAWS = 4000


def boxes(crop, width, height, count=DRAWS, seed=0):
    """(count, 4) of left, top, right, bottom."""
    torch.manual_seed(seed)
    return np.array([crop.box(width, height) for _ in range(count)])


def furthest_apart(a, b):
    """Kolmogorov-Smirnov: the largest distance of two samples' distribution functions."""
    at = np.concatenate([a, b])
    return max(abs(np.mean(a[:, None] <= at, axis=0) - np.mean(b[:, None] <= at, axis=0)))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (100, 100), (90, 300), (7, 5)])
def test_a_part_lies_inside_and_keeps_to_scale_and_ratio(width, height):
    left, top, right, bottom = boxes(RandomResizedCrop((224, 224)), width, height).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    w, h = right - left, bottom - top
    assert (w > 0).all() and (h > 0).all()
    # sides are rounded to pixels, so the exact ones lie within half a pixel
    assert ((w + 0.5) * (h + 0.5) >= 0.08 * width * height).all() and ((w - 0.5) * (h - 0.5) <= width * height).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


def test_area_ratio_and_place_are_distributed_as_documented():
    """Against an independent sampler: area uniform in 8-100 %, ratio log-uniform, whatever does not fit drawn again."""
    side, random = 2000, np.random.default_rng(0)
    area, ratio = random.uniform(0.08, 1, 40_000), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 40_000))
    fits = (area * ratio <= 1) & (area / ratio <= 1)
    area, ratio = area[fits][:DRAWS], ratio[fits][:DRAWS]
    left, top, right, bottom = boxes(RandomResizedCrop((224, 224)), side, side).T
    w, h = right - left, bottom - top
    # two samples of this size are further apart than this once in a hundred thousand times
    bound = 2.47 * math.sqrt(2 / DRAWS)
    assert furthest_apart(w * h / side**2, area) < bound
    assert furthest_apart(np.log(w / h), np.log(ratio)) < bound
    place = random.uniform(0, 1, DRAWS)
    assert furthest_apart(left / np.maximum(side - w, 1), place) < bound
    assert furthest_apart(top / np.maximum(side - h, 1), place) < bound


@pytest.mark.parametrize(
    ("width", "height", "scale", "expected"),
    [
        (1000, 10, (0.08, 1.0), (493, 0, 506, 10)),  # far too wide: 10 high, 4/3 of it wide, in the middle
        (10, 1000, (0.08, 1.0), (0, 493, 10, 506)),  # far too tall: 10 wide, 4/3 of it high
        (40, 36, (4.0, 5.0), (0, 0, 40, 36)),  # of an allowed ratio, but nothing fits: the whole picture
    ],
)
def test_after_ten_tries_the_central_part(width, height, scale, expected):
    assert {tuple(box) for box in boxes(RandomResizedCrop((8, 8), scale=scale), width, height, 20)} == {expected}


def test_ten_tries_and_no_more(monkeypatch):
    asked = []
    monkeypatch.setattr("imagedex.training.augmentation.uniform", lambda low, high: asked.append((low, high)) or high)
    RandomResizedCrop((8, 8), scale=(0.5, 4.0)).box(50, 50)
    assert len(asked) == 2 * 10 and asked[0] == (0.5, 4.0)
    assert asked[1] == pytest.approx((math.log(3 / 4), math.log(4 / 3)))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pixels_are_the_part_resized_and_mirrored(flip):
    picture, crop = noise(50, 40), RandomResizedCrop((16, 12), flip=flip)
    torch.manual_seed(3)
    box = crop.box(50, 40)
    part = np.asarray(picture)[box[1] : box[3], box[0] : box[2]]
    expected = np.asarray(Image.fromarray(part).resize((12, 16), Image.Resampling.BILINEAR))
    torch.manual_seed(3)
    found = np.asarray(crop(picture))
    assert found.dtype == np.uint8 and found.shape == (16, 12, 3)
    assert np.array_equal(found, expected[:, ::-1] if flip else expected)


def test_half_of_the_pictures_are_mirrored():
    crop = RandomResizedCrop((1, 2), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    picture = Image.fromarray(np.array([[[255], [0]]] * 2, dtype=np.uint8).repeat(3, axis=2))
    torch.manual_seed(0)
    mirrored = [np.asarray(crop(picture))[0, 0, 0] < 128 for _ in range(2000)]
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / math.sqrt(2000)


def test_size_and_filter_are_those_of_the_image_processor():
    crop = RandomResizedCrop.for_processor(PROCESSOR)
    assert (crop.size, crop.resample) == ((16, 12), Image.Resampling.BILINEAR)
    crop = RandomResizedCrop.for_processor(ViTImageProcessorPil(size={"height": 8, "width": 10}, resample=0))
    assert (crop.size, crop.resample) == ((8, 10), Image.Resampling.NEAREST)
    free = CLIPImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False)
    with pytest.raises(UserError, match="give it a crop_size"):
        build_augmentation(CorpusArguments(image_augmentation="random_resized_crop"), free)
    assert build_augmentation(CorpusArguments(), free) is None


@pytest.mark.parametrize("arguments", [DataArguments, CorpusArguments])
def test_half_of_the_area_or_more_and_never_mirrored(arguments):
    """As the DSI for pictures cuts them: of every part the area, and of a picture whose left is dark the left."""
    crop = build_augmentation(
        arguments(image_augmentation="random_resized_crop", random_crop_scale=[0.5, 1.0], random_flip=0.0), PROCESSOR
    )
    left, top, right, bottom = boxes(crop, 200, 200, 1000).T
    w, h = right - left, bottom - top
    assert ((w + 0.5) * (h + 0.5) >= 0.5 * 200 * 200).all() and (w * h).min() < 0.55 * 200 * 200
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    for _ in range(20):
        row = np.asarray(crop(ramp))[0, :, 0].astype(int)
        assert (np.diff(row) >= 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"random_crop_scale": [0.5, 1.0]}, "--random_crop_scale says how pictures are cut"),
        ({"random_flip": 0.0}, "--random_flip says how pictures are cut"),
        ({"image_augmentation": "random_resized_crop", "random_crop_scale": [0.5]}, "0.5: give two shares"),
        ({"image_augmentation": "random_resized_crop", "random_crop_scale": [1.0, 0.5]}, "the smaller one first"),
        ({"image_augmentation": "random_resized_crop", "random_crop_scale": [0.0, 0.5]}, "more than 0"),
        ({"image_augmentation": "random_resized_crop", "random_flip": 1.5}, "give 0 to 1"),
    ],
)
def test_parts_that_cannot_be_cut_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_bounds(CorpusArguments, fields)
        CorpusArguments(**fields)


@pytest.fixture
def corpus(flickr_folder):
    return load_corpus(str(flickr_folder)).splits["train"]


def test_training_pictures_are_cut_anew_and_a_seed_repeats_them(corpus):
    pictures = Pictures(corpus, PROCESSOR, augment=RandomResizedCrop.for_processor(PROCESSOR))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append([pictures[2]["pixel_values"] for _ in range(3)])
    assert all(x.dtype == torch.float32 and x.shape == (3, 16, 12) for x in draws[0])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][0], draws[2][0])
    plain = Pictures(corpus, PROCESSOR)
    assert torch.equal(plain[2]["pixel_values"], plain[2]["pixel_values"])


def test_workers_draw_differently_and_repeat_by_seed(corpus):
    one_picture = corpus.select([0] * 8)
    pictures = Pictures(one_picture, PROCESSOR, augment=RandomResizedCrop.for_processor(PROCESSOR))

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat([batch["pixel_values"] for batch in DataLoader(pictures, batch_size=4, num_workers=2)])

    first = epoch(0)
    assert not torch.equal(first[:4], first[4:])  # a worker each
    assert torch.equal(first, epoch(0)) and not torch.equal(first, epoch(1))


class Stop(Exception):
    pass


def datasets_of_a_run(monkeypatch, arguments):
    """What run_xmatching.py gives the trainer."""
    given = {}

    def trainer(**kwargs):
        given.update(kwargs)
        raise Stop

    monkeypatch.setattr("imagedex.training.dual_encoder.trainer.XMatchingTrainer", trainer)
    with pytest.raises(Stop):
        run_xmatching.main(list(map(str, arguments)))
    return given


@pytest.fixture
def arguments(flickr_folder, tmp_path):
    return [
        "--dataset_name", flickr_folder, "--output_dir", tmp_path / "out", "--held_out_captions_per_image", 1, "--do_train",
        "--do_eval", "--use_cpu", "--report_to", "none", "--image_size", 16, "--text_pooling_layers", 1,
        "--text_config", '{"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}',
        "--vision_config", '{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}',
    ]  # fmt: skip


def test_pictures_to_evaluate_on_are_never_augmented(monkeypatch, arguments):
    given = datasets_of_a_run(monkeypatch, [*arguments, "--image_augmentation", "random_resized_crop"])
    train, gallery = given["train_dataset"].pictures, given["eval_dataset"].pictures
    assert not torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])
    picture = gallery.rows[0]["image"].convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    for _ in range(3):
        # the processor's: 0 to 255 becomes -1 to 1
        np.testing.assert_allclose(
            gallery[0]["pixel_values"], np.asarray(picture).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
        )
    given = datasets_of_a_run(monkeypatch, arguments)
    train = given["train_dataset"].pictures
    assert torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])  # off unless asked for


def test_one_shuffle_for_all_epochs(monkeypatch, arguments):
    def captions(*flags):
        given = datasets_of_a_run(monkeypatch, [*arguments, *flags])
        return given["args"].train_sampling_strategy, given["train_dataset"].texts["input_ids"][:]

    sampling, plain = captions()
    assert sampling == "random"
    sampling, once = captions("--shuffle_every_epoch", "false")
    assert sampling == "sequential" and once != plain and sorted(once) == sorted(plain)
    assert captions("--shuffle_every_epoch", "false")[1] == once
    assert captions("--shuffle_every_epoch", "false", "--seed", 7)[1] != once


def test_kept_pixels_cannot_be_augmented():
    with pytest.raises(UserError, match="--keep_pixels keeps each picture once.*random_resized_crop") as caught:
        command_line.parse_arguments(
            (DataArguments,), "", ["--keep_pixels", "--image_augmentation", "random_resized_crop"]
        )
    assert "\n" not in str(caught.value)
