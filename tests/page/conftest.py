"""A gallery of a few pictures with odd names, of a model that knows when nothing matches."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imagedex.gallery.gallery import Gallery
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.page import answers

HOSTILE = "${document.body.setAttribute('p',1)}`\\ {{value}}.png"


def paint_noise(path, number, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="session")
def paint():
    """paint(path, number, size): a picture of noise."""
    return paint_noise


@pytest.fixture(scope="session", autouse=True)
def only_copies_are_near():
    """All noise looks alike to a model that was never trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "NEAR_DUPLICATE", 1 - 1e-6)
        yield


@pytest.fixture(scope="session")
def hostile():
    """An image_id that would be a program in a page that is not careful."""
    return f"wood/{HOSTILE}"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        paint_noise(folder / ("sea" if number % 2 else "wood") / f"{number}.png", number)
    (folder / "sea" / "copy.png").write_bytes((folder / "sea" / "1.png").read_bytes())
    paint_noise(folder / "wood" / '<b>"x.png', 50)
    paint_noise(folder / "wood" / HOSTILE, 51)
    (folder.parent / "secret.png").write_bytes((folder / "sea" / "1.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def gallery(tiny_xmatching, photos, tmp_path_factory):
    """Its model has no bank of captions."""
    gallery = Gallery.open(tmp_path_factory.mktemp("galleries") / "g", str(tiny_xmatching), device="cpu")
    gallery.add(photos)
    return gallery


@pytest.fixture(scope="session")
def knowing(tiny_xmatching, gallery, photos, tmp_path_factory):
    """A gallery of the same pictures; its model has a cut-off, calibrated so that at 0.5 "a dog" keeps some of them."""
    folder = tmp_path_factory.mktemp("knowing")
    shutil.copytree(tiny_xmatching, folder / "model")
    model = XMatchingModel.from_pretrained(folder / "model")
    torch.manual_seed(0)
    bank = CaptionBank(torch.nn.functional.normalize(torch.randn(40, 16), dim=1))
    sentence = torch.from_numpy(gallery.query_vector(["a dog"]))[None]
    bank.calibrate(sentence, sentence)
    model.caption_bank = bank
    model.save_pretrained(folder / "model")
    knowing = Gallery.open(folder / "g", str(folder / "model"), device="cpu")
    knowing.add(photos)
    scores = [found.score for found in knowing.search("a dog", top_k=99)]
    confidences = torch.tensor(scores) - bank.bias(sentence)
    middle = float(confidences[3] + confidences[4]) / 2
    bank.right_confidences = torch.tensor([middle - 1, middle, middle + 1])
    bank.save_confidences(folder / "model")
    return Gallery.open(folder / "g", device="cpu")
