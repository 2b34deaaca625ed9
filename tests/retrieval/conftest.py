"""Tiny dual encoders with random weights, made offline and saved as their real counterparts are on the Hub."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling.modeling_xmatching import XMatchingModel
from modeling.processing_xmatching import XMatchingProcessor

WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "yellow",
    "left",
    "right",
    "half",
    "side",
    "is",
    "on",
    "of",
    "and",
    "beside",
    "next",
    "to",
    ",",
    "dog",
    "runs",
    "in",
    "grass",
]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_tokenizer(max_length):
    """Words of a small vocabulary between <s> and </s>."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tiny(folder, config_class, model_class, processor_class, image_processor_type, max_length):
    tokenizer = tiny_tokenizer(max_length)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": max_length, "projection_size": 32}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = model_class(config_class(text_config=text, vision_config=vision))
    for parameter in model.parameters():  # random towers map everything to nearly one vector; spread them
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model.save_pretrained(folder)
    size = {"shortest_edge": 32} if config_class is CLIPConfig else {"height": 32, "width": 32}
    (folder / "preprocessor_config.json").write_text(f'{{"image_processor_type": "{image_processor_type}"}}')
    options = {"crop_size": {"height": 32, "width": 32}} if config_class is CLIPConfig else {}
    image_processor = AutoImageProcessor.from_pretrained(folder, size=size, **options)
    processor_class(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    """What `datasets` writes while these tests run is thrown away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def tiny_xmatching(tmp_path_factory):
    """Our own model, saved with its processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny_xmatching"
    tokenizer = tiny_tokenizer(max_length=24)
    tower = TOWER | {"model_type": "bert", "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    torch.manual_seed(0)
    model = XMatchingModel.from_text_vision_pretrained(
        text_config=AutoConfig.for_model(**tower),
        vision_config=AutoConfig.for_model(**vision),
        text_pooling="mean",
        text_pooling_layers=1,
        head_hidden_sizes=[32],
        projection_dim=16,
    )
    model.save_pretrained(folder)
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    XMatchingProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny_clip"
    return save_tiny(folder, CLIPConfig, CLIPModel, CLIPProcessor, "CLIPImageProcessor", 24)


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny_siglip"
    return save_tiny(folder, SiglipConfig, SiglipModel, SiglipProcessor, "SiglipImageProcessor", 16)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Twenty-three pictures of different shapes in nested folders, two of them the same, beside a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(22):
        below = folder / ("", "dogs", "dogs/running")[number % 3]
        below.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        size = (48, 32) if number % 2 else (32, 56)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(below / f"picture {number}.{'png' if number % 5 == 0 else 'jpg'}")
    (folder / "copy.png").write_bytes((folder / "picture 0.png").read_bytes())
    (folder / "notes.txt").write_text("not a picture")
    return folder
