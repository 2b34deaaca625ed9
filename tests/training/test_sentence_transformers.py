"""A saved XMatchingModel opens in sentence-transformers as it is, with our own vectors, and can be judged and trained there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import WORDS
from transformers import AutoModel, AutoProcessor

import run_xmatching
from imagedex.training.dual_encoder.convert_maria import save

sentence_transformers = pytest.importorskip("sentence_transformers")

SENTENCES = ["a red half beside a green half", "Yellow on the left", "blue"]


@pytest.fixture(scope="module")
def saved(flickr_folder, tmp_path_factory):
    """A folder as run_xmatching.py leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    text = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 64}  # fmt: skip
    vision = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 64, "patch_size": 8}  # fmt: skip
    flags = ["--dataset_name", flickr_folder, "--text_config", json.dumps(text), "--vision_config", json.dumps(vision),
             "--image_size", 32, "--projection_dim", 16, "--do_train", "--use_cpu", "--max_steps", 2, "--max_text_length", 12,
             "--save_strategy", "no", "--learning_rate", "1e-2", "--output_dir", folder, "--report_to", "none"]  # fmt: skip
    run_xmatching.main(list(map(str, flags)))
    return folder


@pytest.fixture(scope="module")
def opened(saved):
    return sentence_transformers.SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """The path of a picture that its EXIF orientation turns on its side."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, size=(6, 9, 3), dtype=np.uint8)).resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("turned") / "turned.jpg"
    picture.save(path, exif=exif, quality=95)
    return path


def ours(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def test_sentences_and_pictures_have_our_own_vectors(saved, opened, flickr_folder, turned):
    model, processor = ours(saved)
    long = " ".join(WORDS * 4)  # is cut
    expected = model.get_text_features(**processor(text=[*SENTENCES, long], return_tensors="pt")).pooler_output
    found = opened.encode([*SENTENCES, long])
    assert found.shape == (4, 16) and opened.get_embedding_dimension() == 16
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3, "all sentences are one vector"

    paths = [str(flickr_folder / "images" / "red_blue.jpg"), str(turned)]
    expected = model.get_image_features(**processor(images=paths, return_tensors="pt")).pooler_output
    for pictures in (paths, [Image.open(path) for path in paths], [{"image": path} for path in paths]):
        np.testing.assert_allclose(opened.encode(pictures), expected.numpy(), atol=1e-5)
    unturned = model.get_image_features(
        **processor(images=[np.array(Image.open(turned))], return_tensors="pt")
    ).pooler_output
    assert (unturned - expected[1]).abs().max() > 1e-4, "this picture shows nothing about orientation"


def test_its_evaluator_ranks_as_ours_does(opened, flickr_folder):
    """Mean reciprocal rank over pictures as documents, against ranks counted by hand."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    images = sorted((flickr_folder / "images").iterdir())[:6]
    queries = {path.stem: f"{path.stem.replace('_', ' beside ')}" for path in images}
    corpus = {path.stem: str(path) for path in images}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, {name: {name} for name in queries}, mrr_at_k=[6], accuracy_at_k=[1], show_progress_bar=False
    )
    found = evaluator(opened)
    scores = opened.encode(list(queries.values())) @ opened.encode(list(corpus.values())).T
    ranks = [(scores[row] > scores[row, row]).sum() + 1 for row in range(len(images))]
    assert found["cosine_mrr@6"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["cosine_accuracy@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))


def test_its_trainer_trains_and_saves_what_we_load(saved, flickr_folder, tmp_path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = sentence_transformers.SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")
    before = model.encode(SENTENCES)
    images = sorted((flickr_folder / "images").iterdir())[:4]
    rows = {"anchor": [path.stem.replace("_", " beside ") for path in images], "positive": list(map(str, images))}
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "train"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows), loss=loss).train()
    after = model.encode(SENTENCES)
    assert np.abs(after - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    ours_again, processor = ours(tmp_path / "saved")
    with torch.no_grad():
        found = ours_again.get_text_features(**processor(text=SENTENCES, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(found.numpy(), after, atol=1e-5)


def test_a_converted_model_opens_too(saved, tmp_path):
    model, processor = ours(saved)
    save(model, processor, tmp_path / "converted")
    converted = sentence_transformers.SentenceTransformer(
        str(tmp_path / "converted"), trust_remote_code=True, device="cpu"
    )
    with torch.no_grad():
        expected = model.get_text_features(**processor(text=SENTENCES, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(converted.encode(SENTENCES), expected.numpy(), atol=1e-5)
