"""The same picture gives the same vector, whichever way it comes in; and it is the vector of what a viewer shows."""

import csv

import numpy as np
import pytest
import torch
from odd_pictures import write_odd_pictures
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.corpora import load_corpus
from imagedex.corpora.forms.shards import open_stream
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.index import encode_gallery, open_index
from imagedex.encoding.vectors import encode_images
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.picture_reading import as_rgb
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.retrieval.gallery import read_gallery
from imagedex.training.dual_encoder.data import Collator
from imagedex.training.dual_encoder.streaming import CaptionStream
from imagedex.training.pictures import Pictures
from imagedex.training.tokenizer import train_tokenizer

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = TINY | {"image_size": 32, "patch_size": 8}
FAMILIES = {
    "vit": ({"model_type": "vit", **PATCHES}, lambda: ViTImageProcessorPil(size={"height": 32, "width": 32})),
    "clip": (
        {"model_type": "clip_vision_model", **PATCHES},
        lambda: CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    ),
    "convnext": (
        {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        lambda: ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    ),
    "siglip": (
        {"model_type": "siglip_vision_model", **PATCHES},
        lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    ),
    "siglip2": (
        {"model_type": "siglip2_vision_model", **TINY, "patch_size": 8, "num_patches": 16},
        lambda: Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    ),
    "dinov2": (
        {"model_type": "dinov2", **PATCHES},
        lambda: BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    ),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(folder in Flickr8k's form, file name -> what a viewer shows)."""
    folder = tmp_path_factory.mktemp("odd")
    seen = write_odd_pictures(folder / "images")
    with open(folder / "captions.txt", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((name, f"picture {name}") for name in sorted(seen))])
    return folder, seen


def save_model(folder, vision_config, image_processor):
    tokenizer = train_tokenizer(["picture of a scene"], 60)
    text = TINY | {"model_type": "bert", "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = XMatchingConfig(
        text_config=text, vision_config=vision_config, text_pooling_layers=1, vision_head="linear", text_head="linear",
        projection_dim=8, vision_pooling="mean",
    )  # fmt: skip
    model = XMatchingModel(config).eval()
    with torch.no_grad():  # random towers map all pictures to nearly one vector; spread them
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    RetrievalProcessor(image_processor, tokenizer, max_text_length=20).save_pretrained(folder)
    return folder


def ways_in(folder, model_folder):
    """Way -> (N, D) vectors of the pictures, by name."""
    encoder = load_dual_encoder(str(model_folder))
    model, image_processor = encoder.model, encoder.image_processor
    processor = RetrievalProcessor.from_pretrained(model_folder)
    corpus, gallery = load_corpus(str(folder)).splits["train"], read_gallery(str(folder / "images"))
    names = sorted(corpus["image_id"])
    assert names == gallery["image_id"][:] == sorted(path.name for path in (folder / "images").iterdir())
    paths = [folder / "images" / name for name in names]
    collate = Collator(processor.tokenizer)

    def embedded(inputs):
        with torch.no_grad():
            return model.get_image_features(**inputs).pooler_output

    def trained(pictures):
        order = sorted(range(len(names)), key=lambda row: corpus["image_id"][row])
        return embedded(collate([pictures[row] for row in order]))

    ways = {
        "training": trained(Pictures(corpus, image_processor)),
        "training, kept": trained(Pictures(corpus, image_processor, keep=True)),
        "search": encode_images(model, image_processor, gallery, batch_size=5),
        "search, in workers": encode_images(model, image_processor, gallery, num_workers=2),
        "index": encode_gallery(
            open_index(model_folder / "index", model, image_processor), model, image_processor, gallery
        )[0],
        "Python, paths": embedded(processor(images=[str(path) for path in paths], return_tensors="pt")),
        "Python, pictures": embedded(processor(images=[Image.open(path) for path in paths], return_tensors="pt")),
        "Python, one at a time": torch.cat([embedded(processor(images=path, return_tensors="pt")) for path in paths]),
    }
    opened = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    ways["sentence-transformers"] = opened.encode([Image.open(path) for path in paths], convert_to_tensor=True)
    return names, ways, embedded, processor


def check_ways(folder, seen, model_folder):
    """All ways agree with each other, and with the plain RGB picture that a viewer shows."""
    names, ways, embedded, processor = ways_in(folder, model_folder)
    shown = embedded(processor(images=[Image.fromarray(seen[name]) for name in names], return_tensors="pt"))
    assert torch.pdist(shown[[names.index("plain.png"), names.index("grey.png")]]) > 1e-3, "nothing to tell apart"
    for way, vectors in ways.items():
        torch.testing.assert_close(vectors, ways["search"], atol=1e-5, rtol=0, msg=lambda m, way=way: f"{way}: {m}")
        for row, name in enumerate(names):
            distance = (vectors[row] - shown[row]).norm().item()
            assert distance < 1e-3, f"{way}: {name} is not read as it is shown ({distance:.4f})"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_in_gives_the_same_vector(odd, tmp_path, family):
    vision_config, make = FAMILIES[family]
    check_ways(*odd, save_model(tmp_path / "model", AutoConfig.for_model(**vision_config), make()))


def test_a_stream_reads_as_the_processor_does(odd, tmp_path, write_shard):
    folder, seen = odd
    names, parts = sorted(name for name in seen if name.endswith(".png")), []
    for number, name in enumerate(names):
        parts += [(f"{number}.png", (folder / "images" / name).read_bytes()), (f"{number}.txt", f"picture {name}")]
    write_shard(tmp_path / "0.tar", parts)
    image_processor = FAMILIES["clip"][1]()
    processor = RetrievalProcessor(image_processor, train_tokenizer(["picture of a scene"], 60))
    found = [
        row["pixel_values"] for row in CaptionStream(open_stream(str(tmp_path)), processor, passes=1, buffer_size=0)
    ]
    expected = processor(images=[folder / "images" / name for name in names], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(found), expected)


@pytest.mark.parametrize(
    "name", ["turned.jpg", "transparent.png", "hidden.png", "grey16.png", "float.tif", "palette.png"]
)
def test_a_picture_is_read_as_a_viewer_shows_it(odd, name):
    folder, seen = odd
    found = np.asarray(as_rgb(folder / "images" / name)).astype(int)
    assert np.abs(found - seen[name]).max() <= 1
    again = np.asarray(as_rgb(as_rgb(Image.open(folder / "images" / name)))).astype(int)
    assert np.array_equal(found, again), "reading twice changes nothing"


def test_deep_pictures_are_scaled_by_what_is_in_them():
    def read(values, mode=None):
        return np.asarray(as_rgb(Image.fromarray(np.array([values]), mode)))[0, :, 0].tolist()

    assert read(np.array([0, 65535, 257], dtype=np.uint16)) == [0, 255, 1]
    assert read(np.array([0.0, 1.0, 0.5], dtype=np.float32)) == [0, 255, 128]
    assert read(np.array([0.0, 255.0, 20.0], dtype=np.float32)) == [0, 255, 20]
    assert read(np.array([0, 255, 20], dtype=np.int32)) == [0, 255, 20]
    assert read(np.array([0, 65535, 257], dtype=np.int32)) == [0, 255, 1]
    assert read(np.array([0.0, np.nan, 1.0], dtype=np.float32)) == [0, 0, 255]


def test_what_is_no_picture_comes_back_as_it_is():
    array = np.zeros((2, 2, 3), dtype=np.uint8)
    assert as_rgb(array) is array
