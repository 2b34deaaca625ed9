"""Encoding against the model called by hand, one row at a time."""

import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import (
    count_unknown,
    encode_images,
    encode_texts,
    image_vector_batches,
    read_ahead,
    text_length_limit,
    unit_vectors,
)
from imagedex.errors import UserError
from imagedex.retrieval.gallery import read_gallery
from imagedex.training.tokenizer import train_tokenizer

SENTENCES = [
    "a red dog",
    "the blue half is on the left side , next to the green half",
    "a",
    "dog runs in the grass",
    "a",
]


@pytest.fixture(scope="module", params=["tiny_clip", "tiny_siglip"])
def encoder(request):
    return load_dual_encoder(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def gallery(picture_folder):
    return read_gallery(str(picture_folder))


def by_hand(embedding):
    embedding = embedding.pooler_output[0]
    return embedding / embedding.square().sum().sqrt()


@torch.no_grad()
def text_by_hand(encoder, sentence):
    """As the model cards say: SigLIP padded to its full length, CLIP not padded at all."""
    padding = {"padding": "max_length", "max_length": 16} if encoder.model.config.model_type == "siglip" else {}
    return by_hand(encoder.model.get_text_features(**encoder.tokenizer([sentence], return_tensors="pt", **padding)))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_texts_equal_the_model_called_one_by_one(encoder, batch_size):
    vectors = encode_texts(encoder.model, encoder.tokenizer, SENTENCES, batch_size=batch_size)
    expected = torch.stack([text_by_hand(encoder, sentence) for sentence in SENTENCES])
    torch.testing.assert_close(vectors, expected, atol=2e-6, rtol=0)
    assert vectors.dtype == torch.float32
    assert (vectors[0] - vectors[1]).abs().max() > 0.05  # the order could not be told from equal vectors


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (5, 2), (100, 0)])
def test_pictures_equal_the_model_called_one_by_one(encoder, gallery, batch_size, num_workers):
    vectors = encode_images(encoder.model, encoder.image_processor, gallery, batch_size, num_workers=num_workers)
    with torch.no_grad():
        expected = []
        for row in gallery:
            pixels = encoder.image_processor(images=row["image"].convert("RGB"), return_tensors="pt")
            expected.append(by_hand(encoder.model.get_image_features(**pixels)))
    torch.testing.assert_close(vectors, torch.stack(expected), atol=2e-6, rtol=0)
    assert (vectors[0] - vectors[1]).abs().max() > 0.01


def test_the_model_is_put_back_into_its_mode_without_gradients(encoder):
    encoder.model.train()
    encode_texts(encoder.model, encoder.tokenizer, ["a dog"])
    assert encoder.model.training
    encoder.model.eval()
    assert not encode_texts(encoder.model, encoder.tokenizer, ["a dog"]).requires_grad


def test_who_asks_for_batches_of_vectors_may_train_between_them(encoder, gallery):
    batches = image_vector_batches(encoder.model, encoder.image_processor, gallery, [[0], [1]])
    encoder.model.train()
    assert not next(batches).requires_grad and torch.is_grad_enabled() and encoder.model.training
    encoder.model.eval()


def test_dropout_is_off_while_encoding(tiny_clip):
    encoder = load_dual_encoder(str(tiny_clip))
    encoder.model.text_model.config.attention_dropout = 0.9
    for module in encoder.model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.9
    encoder.model.train()
    first, second = (encode_texts(encoder.model, encoder.tokenizer, SENTENCES) for _ in range(2))
    assert torch.equal(first, second)


def test_a_long_sentence_is_cut_to_the_length_the_model_can_take(encoder):
    long = "red " * 500
    limit = text_length_limit(encoder.model, encoder.tokenizer)
    assert limit == (24 if encoder.model.config.model_type == "clip" else 16)
    vectors = encode_texts(encoder.model, encoder.tokenizer, [long, "red " * (limit - 2)])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_normalised_in_float32_whatever_the_precision():
    embeds = torch.full((1, 1000), 0.1, dtype=torch.bfloat16)
    assert unit_vectors(embeds).dtype == torch.float32
    assert unit_vectors(embeds).norm().item() == pytest.approx(1, abs=1e-6)
    assert unit_vectors(torch.full((1, 4), 60_000.0, dtype=torch.float16)).tolist() == [[0.5] * 4]  # overflows in half


def test_vectors_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinity"):
        unit_vectors(torch.tensor([[1.0, float("nan")]]))


def test_a_model_without_token_types_is_not_given_them(tmp_path):
    """BERT tokenizers give token_type_ids; only what get_text_features names is passed on."""
    seen = {}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))

        def get_text_features(self, input_ids, attention_mask=None):
            seen["shape"] = input_ids.shape
            return self.bert(input_ids, attention_mask).last_hidden_state[:, 0]  # a plain tensor is taken too

    def tokenizer(sentences, **options):
        ids = torch.ones(len(sentences), 3, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}

    assert encode_texts(Model(), tokenizer, ["a", "b"]).shape == (2, 8)
    assert seen["shape"] == (2, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_cannot_be_read_is_named(encoder, tmp_path, num_workers):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    rows = {"image_id": ["good.png", "bad.png"], "image": [str(tmp_path / name) for name in ("good.png", "bad.png")]}
    features = datasets.Features({"image_id": datasets.Value("string"), "image": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(UserError, match="bad.png"):
        encode_images(encoder.model, encoder.image_processor, dataset, num_workers=num_workers)


def test_a_batch_is_read_while_the_one_before_it_is_used():
    begun = [threading.Event() for _ in range(4)]

    def batches():
        for number in range(3):
            begun[number].set()
            yield number
        begun[3].set()
        raise ValueError("the fourth")

    used = []
    with pytest.raises(ValueError, match="the fourth"):
        for number in read_ahead(batches()):
            assert begun[number + 1].wait(10), "the next one was not begun"
            used.append(number)
    assert used == [0, 1, 2]


def test_nothing_to_encode(encoder, gallery):
    assert len(encode_texts(encoder.model, encoder.tokenizer, [])) == 0
    assert len(encode_images(encoder.model, encoder.image_processor, gallery.select([]))) == 0


def test_texts_that_a_tokenizer_does_not_know_are_counted():
    tokenizer = train_tokenizer(["a red dog", "two cats"] * 3, 60)
    asked = ["a red cat", "una кошка", "红 dog", "a dog 🐶"]
    assert count_unknown(tokenizer, tokenizer(asked)["input_ids"]) == 3
    tokenizer.unk_token = tokenizer.eos_token  # as CLIP's: then nobody knows
    assert count_unknown(tokenizer, tokenizer(asked)["input_ids"]) == 0
