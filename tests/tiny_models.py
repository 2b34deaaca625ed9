"""Tiny dual encoders with random weights, made offline and saved as their real counterparts are on the Hub."""

import logging

import datasets
import numpy as np
import pytest
import torch
import transformers
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
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from imagedex.identifiers.schemes import assign_identifiers
from imagedex.modeling import GENERATIVE
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.training.tokenizer import train_tokenizer

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
    """What `datasets`, --keep_states and models with code of their own write while these tests run is thrown away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # once: Python looks for this code where it first was
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("IMAGEDEX_KEEP_DIR", str(tmp_path_factory.mktemp("kept")))
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
    RetrievalProcessor(image_processor, tokenizer, max_text_length=24).save_pretrained(folder)
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


@pytest.fixture(scope="session")
def gallery_ids(picture_folder):
    """The image_ids of `picture_folder`, as a gallery has them."""
    pictures = [path for path in picture_folder.rglob("*") if path.suffix in (".png", ".jpg")]
    return sorted(path.relative_to(picture_folder).as_posix() for path in pictures)


@pytest.fixture(scope="session")
def save_generative():
    """save_generative(folder, model_type, scheme, image_ids, vectors=None, vectors_are=None, style=None): a model with random
    weights that writes identifiers, saved as run_dsi.py saves one; `style` is how its sentences are written."""

    def save(folder, model_type, scheme, image_ids, vectors=None, vectors_are=None, style=None):
        tokenizer = train_tokenizer([" ".join(WORDS), "question: who is on the left?"], 200)
        words = len(tokenizer)
        source = {} if vectors_are is None else {"vectors": vectors_are}
        options = {"branches": 2, "leaf_size": 3, "levels": 2, "codes": 4, "source": source}
        identifiers = assign_identifiers(scheme, image_ids, tokenizer, vectors, **options)
        t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
        t5 |= {"decoder_start_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
        torch.manual_seed(0)
        if model_type == "t5":
            model = T5ForConditionalGeneration(T5Config(**t5, eos_token_id=tokenizer.eos_token_id))
        else:
            vision = ViTConfig(**TOWER, image_size=32, patch_size=8, initializer_range=0.2)
            fields = {"num_visual_tokens": 4, "num_codebook_words": words} if model_type == "codebook_t5" else {}
            model = GENERATIVE[model_type].from_t5_vision_pretrained(t5_config=t5, vision_config=vision, **fields)
        for parameter in model.shared.parameters():  # random models give every identifier nearly one score; spread them
            parameter.data.mul_(3)
        model.save_pretrained(folder)
        image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        parts = (tokenizer,) if model_type == "t5" else (image_processor, tokenizer)
        style = style or {"prompt": "question: ", "clean_text": True, "max_text_length": 20}
        (SentenceProcessor if model_type == "t5" else RetrievalProcessor)(*parts, **style).save_pretrained(folder)
        identifiers.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def logging_put_back():
    """The script sets up logging for its process; here that process is ours."""
    verbosity, handlers, level = transformers.logging.get_verbosity(), logging.root.handlers[:], logging.root.level
    yield
    transformers.logging.set_verbosity(verbosity)
    logging.root.handlers[:], logging.root.level = handlers, level
