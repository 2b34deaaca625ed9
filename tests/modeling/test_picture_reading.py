"""Pictures of every kind, each against what a viewer shows, computed by arithmetic; and what cannot be read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from imagedex.modeling.picture_reading import ORIENTATION, SLIMMEST, as_rgb, read_pictures

GREY = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (8, 1))
SHOWN = GREY[..., None].repeat(3, axis=2)
COLOURS = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 40)], axis=-1)
PALETTE = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
OVER_WHITE = np.concatenate([[[255] * 3], PALETTE[1:]])


def saved(picture, form, **options):
    """The picture as it comes back from a file."""
    content = io.BytesIO()
    picture.save(content, form, **options)
    return Image.open(io.BytesIO(content.getvalue()))


def grey(values):
    return Image.fromarray(values)


def with_palette():
    picture = Image.fromarray(GREY // 64, "P")
    picture.putpalette(PALETTE.flatten().tolist())
    return picture


def with_alpha(alpha):
    return Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(np.full_like(GREY, alpha))])


def animated(form, **options):
    first, second = Image.fromarray(COLOURS), Image.new("RGB", (64, 8))
    return saved(first, form, save_all=True, append_images=[second], **options)


def turned(orientation):
    tag = Image.Exif()
    tag[ORIENTATION] = orientation
    return saved(Image.fromarray(COLOURS), "PNG", exif=tag)


INK = np.stack([255 - GREY] * 3 + [np.zeros_like(GREY)], axis=-1)
KINDS = {  # what a file holds -> what is seen
    "16 bits, PNG": (lambda: saved(grey(GREY.astype(np.uint16) * 257), "PNG"), SHOWN),
    "16 bits, TIFF": (lambda: saved(grey(GREY.astype(np.uint16) * 257), "TIFF"), SHOWN),
    "16 bits, the high byte first": (lambda: saved(grey((GREY.astype(np.uint16) * 257).astype(">u2")), "TIFF"), SHOWN),
    "32 bits of 16": (lambda: saved(grey(GREY.astype(np.int32) * 257), "TIFF"), SHOWN),
    "32 bits of 8": (lambda: saved(grey(GREY.astype(np.int32)), "TIFF"), SHOWN),
    "32 bits": (lambda: saved(grey((GREY.astype(np.int64) * 8_421_504).astype(np.int32)), "TIFF"), SHOWN),
    "float to 1": (lambda: saved(grey(GREY.astype(np.float32) / 255), "TIFF"), SHOWN),
    "float to 255": (lambda: saved(grey(GREY.astype(np.float32)), "TIFF"), SHOWN),
    "float to 65,535": (lambda: saved(grey(GREY.astype(np.float32) * 257), "TIFF"), SHOWN),
    "float from -1 to 1": (lambda: saved(grey(GREY.astype(np.float32) / 127.5 - 1), "TIFF"), SHOWN),
    "float with infinity": (lambda: grey(np.where(GREY == 255, np.inf, GREY).astype(np.float32)),
                            np.where(SHOWN == 255, SHOWN[0, -2], SHOWN)),
    "float with nothing": (lambda: grey(np.where(GREY == 255, np.nan, GREY).astype(np.float32)),
                           np.where(SHOWN == 255, 0, SHOWN)),
    "float of nothing": (lambda: grey(np.full((8, 64), np.nan, np.float32)), np.zeros_like(SHOWN)),
    "float, a mark for no data": (lambda: grey(np.where(GREY == 0, -9999, GREY / 255).astype(np.float32)), SHOWN),
    "1 bit": (lambda: saved(grey(GREY > 127), "PNG"), np.where(SHOWN > 127, 255, 0)),
    "grey, opaque": (lambda: saved(with_alpha(255), "PNG"), SHOWN),
    "grey, transparent": (lambda: saved(with_alpha(0), "PNG"), np.full_like(SHOWN, 255)),
    "grey, half": (lambda: saved(with_alpha(128), "PNG"), np.round(SHOWN * (128 / 255) + 127)),
    "grey, one level transparent": (lambda: saved(grey(GREY), "PNG", transparency=0), np.where(SHOWN == 0, 255, SHOWN)),
    "palette": (lambda: saved(with_palette(), "PNG"), PALETTE[GREY // 64]),
    "palette, one colour transparent": (lambda: saved(with_palette(), "PNG", transparency=0), OVER_WHITE[GREY // 64]),
    "palette with an alpha": (lambda: saved(with_palette(), "PNG", transparency=b"\0\xff\xff\xff"), OVER_WHITE[GREY // 64]),
    "GIF, one colour transparent": (lambda: saved(with_palette(), "GIF", transparency=0), OVER_WHITE[GREY // 64]),
    "CMYK, JPEG": (lambda: saved(Image.fromarray(INK, "CMYK"), "JPEG", quality=100, subsampling=0), SHOWN),
    "CMYK, TIFF": (lambda: saved(Image.fromarray(INK, "CMYK"), "TIFF"), SHOWN),
    "animated GIF": (lambda: saved(with_palette(), "GIF", save_all=True, append_images=[Image.new("P", (64, 8))]),
                     PALETTE[GREY // 64]),
    "animated WebP": (lambda: animated("WEBP", lossless=True), COLOURS),
    "animated PNG": (lambda: animated("PNG"), COLOURS),
    "premultiplied": (lambda: Image.fromarray(np.dstack([COLOURS, np.full_like(GREY, 255)])).convert("RGBa"), COLOURS),
    "orientation 1": (lambda: turned(1), COLOURS),
    "orientation 2": (lambda: turned(2), COLOURS[:, ::-1]),
    "orientation 3": (lambda: turned(3), COLOURS[::-1, ::-1]),
    "orientation 4": (lambda: turned(4), COLOURS[::-1]),
    "orientation 5": (lambda: turned(5), COLOURS.swapaxes(0, 1)),
    "orientation 6": (lambda: turned(6), np.rot90(COLOURS, -1)),
    "orientation 7": (lambda: turned(7), COLOURS[::-1, ::-1].swapaxes(0, 1)),
    "orientation 8": (lambda: turned(8), np.rot90(COLOURS)),
    "an orientation that does not exist": (lambda: turned(99), COLOURS),
    "broken EXIF": (lambda: saved(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0garbage"), COLOURS),
    "one pixel": (lambda: Image.new("RGB", (1, 1), (9, 8, 7)), np.array([[[9, 8, 7]]])),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_read_as_it_is_shown(kind):
    make, shown = KINDS[kind]
    found = as_rgb(make())
    assert found.mode == "RGB" and found.size == shown.shape[1::-1]
    assert np.abs(np.asarray(found).astype(int) - shown).max() <= 2
    assert np.array_equal(np.asarray(as_rgb(found)), np.asarray(found)), "reading twice changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_the_picture_in_it(kind, tmp_path):
    picture = KINDS[kind][0]()
    if picture.format is None:
        pytest.skip("made in memory")
    path = tmp_path / f"odd 'name' \n\u202e ünïcödé.{picture.format.lower()}"
    path.write_bytes(picture.fp.getvalue())
    assert np.array_equal(np.asarray(as_rgb(path)), np.asarray(as_rgb(picture)))


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (3, 400), (1, 200_000)])
@pytest.mark.parametrize("make", [
    lambda: CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    lambda: ViTImageProcessorPil(size={"height": 32, "width": 32}),
], ids=["clip", "vit"])  # fmt: skip
def test_a_strip_is_widened_and_not_made_gigabytes_of(size, make):
    picture = as_rgb(Image.new("RGB", size, (9, 80, 7)))
    assert max(picture.size) <= SLIMMEST * min(picture.size) and max(picture.size) <= 10_000
    assert np.argmax(picture.size) == np.argmax(size)
    pixels = read_pictures([Image.new("RGB", size, (9, 80, 7))], make())["pixel_values"]
    flat = read_pictures([Image.new("RGB", (32, 32), (9, 80, 7))], make())["pixel_values"]
    torch.testing.assert_close(pixels, flat)


BROKEN = {
    "empty": b"",
    "a signature alone": b"\x89PNG\r\n\x1a\n",
    "something else": b"<html>not found</html>",
    "cut in the middle": saved(Image.effect_noise((200, 200), 90), "JPEG").fp.getvalue()[:5000],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_whole_picture_is_an_error_and_never_grey(kind, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(BROKEN[kind])
    with pytest.raises(OSError):
        as_rgb(tmp_path / "broken.jpg")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (2000, 2000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(Image.DecompressionBombError):
        as_rgb(tmp_path / "bomb.png")
