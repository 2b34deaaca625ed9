"""A model asked in plain sentences finds what belongs to its weights: the same commit, subfolder and token, from any folder."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from transformers import ViTImageProcessorPil

from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.tokenizer import train_tokenizer

SENTENCES = ["A dog: in the snow!", "two birds on a wire"]

SCRIPT = """
import json, os, sys
from transformers import AutoModelForSeq2SeqLM
import imagedex.modeling
name, revision, elsewhere = sys.argv[1:]
options = {"revision": revision, "subfolder": "inner", "token": os.environ.pop("GIVEN_TOKEN")}
model = AutoModelForSeq2SeqLM.from_pretrained(name, **options).eval()
os.chdir(elsewhere)
print(json.dumps([[image_id for image_id, _ in found] for found in model.retrieve(json.loads(sys.stdin.read()))]))
"""


@pytest.fixture
def saved(tiny_picture_t5, tmp_path):
    """save(folder, prefix): a model whose pictures' names begin with the prefix, and how it reads."""
    tokenizer = train_tokenizer([*SENTENCES, "question: "] * 3, 80)
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor = RetrievalProcessor(image_processor, tokenizer, "question: ", clean_text=True, max_text_length=12)
    model = tiny_picture_t5("vision_grounded_t5", t5={"vocab_size": len(tokenizer)}).eval()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))

    def save(folder, prefix):
        sequences = [[digits[i], digits[(3 * i) % 10]] for i in range(7)]
        identifiers = Identifiers.from_sequences("naive", [f"{prefix}{i}.jpg" for i in range(7)], sequences, 1)
        for part in (model, processor, identifiers):
            part.save_pretrained(folder)
        return model, processor, identifiers

    return save


def test_sentences_and_pictures_are_what_the_processor_makes_of_them(saved, tmp_path, monkeypatch):
    _, processor, identifiers = saved(tmp_path / "model", "")
    model = VisionGroundedT5.from_pretrained(tmp_path / "model").eval()
    tokens = processor.tokenizer(
        ["question: a dog in the snow", "question: two birds on a wire"], padding=True, return_tensors="pt"
    )
    scores, rows = rank_identifiers(model, identifiers, dict(tokens), 3)
    for k in (None, 2):
        found = model.retrieve(SENTENCES, num_beams=3, k=k)
        for own, own_rows, own_scores in zip(found, rows.tolist(), scores.tolist(), strict=True):
            assert [image_id for image_id, _ in own] == [f"{row}.jpg" for row in own_rows[:k]]
            assert [score for _, score in own] == pytest.approx(own_scores[:k], abs=1e-5)
    monkeypatch.setattr("imagedex.modeling.retrieving.ROWS_AT_ONCE", 1)
    by_one = model.retrieve(SENTENCES * 2, num_beams=3)
    assert [[name for name, _ in own] for own in by_one] == [[f"{row}.jpg" for row in own] for own in rows.tolist()] * 2
    fewer = Identifiers.from_sequences("naive", ["2.jpg"], [identifiers.sequence("2.jpg")], 1)
    assert [name for name, _ in model.retrieve(SENTENCES[0], identifiers=fewer)[0]] == ["2.jpg"]
    (every,) = model.retrieve(SENTENCES[0], num_beams=len(identifiers))
    (among,) = model.retrieve(SENTENCES[0], image_ids=["3.jpg", "2.jpg", "3.jpg"])
    assert [name for name, _ in among] == [name for name, _ in every if name in ("2.jpg", "3.jpg")]
    assert dict(among) == pytest.approx({name: score for name, score in every if name in dict(among)}, abs=1e-4)
    with pytest.raises(KeyError, match="'9.gif' has no identifier"):
        model.retrieve(SENTENCES[0], image_ids=["9.gif"])
    with pytest.raises(ValueError, match="no pictures"):
        model.retrieve(SENTENCES[0], image_ids=[])
    (over,) = model.retrieve(SENTENCES[0], num_beams=len(identifiers), over="children")
    assert sum(math.exp(score) for _, score in over) == pytest.approx(1, abs=1e-4)


def test_what_it_cannot_do_is_said(saved, tmp_path):
    made, _, identifiers = saved(tmp_path / "model", "")
    for wrong in ({}, {"sentences": "a", "images": ["b.jpg"]}):
        with pytest.raises(ValueError, match="give sentences, or images"):
            made.retrieve(**wrong)
    with pytest.raises(ValueError, match="was not loaded from anywhere, so it has no processor"):
        type(made)(made.config).retrieve("a dog", identifiers=identifiers)


def test_the_same_commit_subfolder_and_token(saved, tmp_path):
    commits = {}
    with HubServer() as hub:
        repository = hub.add("someone/private", {"README.md": b"empty"}, private=True)
        for prefix in ("first-", "second-"):
            saved(tmp_path / prefix / "inner", prefix)
            files = {f"inner/{path.name}": path.read_bytes() for path in (tmp_path / prefix / "inner").iterdir()}
            commits[prefix] = repository.commit(files, prefix)
        environment = (
            os.environ | hub.environment(tmp_path / "home") | {"GIVEN_TOKEN": hub.token, "OMP_NUM_THREADS": "1"}
        )
        environment.pop("HF_TOKEN", None)
        for revision, prefix in ((commits["first-"], "first-"), ("main", "second-")):
            command = [sys.executable, "-c", SCRIPT, "someone/private", revision, str(tmp_path)]
            done = subprocess.run(
                command, env=environment, input=json.dumps(SENTENCES), capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-2000:]
            found = json.loads(done.stdout.splitlines()[-1])
            assert len(found) == 2 and all(name.startswith(prefix) for own in found for name in own)


def test_a_folder_named_from_where_one_was_then(saved, tmp_path, monkeypatch):
    saved(tmp_path / "model", "")
    monkeypatch.chdir(tmp_path)
    model = VisionGroundedT5.from_pretrained("model").eval()
    monkeypatch.chdir("/")
    assert len(model.retrieve("a dog", num_beams=2)[0]) == 2
    assert model.source == (str(tmp_path / "model"), {})
    assert torch.is_tensor(model.shared.weight)
