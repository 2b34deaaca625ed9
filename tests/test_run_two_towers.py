"""Both halves of one checkpoint from the command line: judged as it is, trained from there, and read alike ever after."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

import run_xmatching
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_texts
from imagedex.modeling.processing_retrieval import RetrievalProcessor


@pytest.fixture(params=["tiny_clip", "tiny_siglip"])
def folder(request):
    return request.getfixturevalue(request.param)


def run(folder, flickr_folder, out, *flags):
    flags = [
        "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--text_model_name_or_path", folder,
        "--vision_model_name_or_path", folder, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
        "--per_device_train_batch_size", 6, "--per_device_eval_batch_size", 5, "--output_dir", out, *flags,
    ]  # fmt: skip
    run_xmatching.main(list(map(str, flags)))
    return json.loads((out / "eval_results.json").read_text())


def test_evaluated_without_training_it_is_as_good_as_the_checkpoint(
    folder, flickr_folder, tmp_path, monkeypatch, capfd
):
    """Against transformers' own model and processor, sentence by sentence and picture by picture."""
    monkeypatch.chdir(tmp_path)
    found = run(folder, flickr_folder, tmp_path / "out", "--do_eval")
    assert f"both towers are halves of {folder.name}: the model starts as that is" in capfd.readouterr().out
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder, backend="pil")
    with open(tmp_path / "out" / "eval_queries.csv", newline="") as file:
        asked = list(csv.DictReader(file))
    names = sorted({row["image"] for row in asked})
    padding = {"padding": "max_length", "max_length": 16} if folder.name == "tiny_siglip" else {}
    ranks = []
    with torch.no_grad():
        images = [Image.open(flickr_folder / "images" / name) for name in names]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        for row in asked:
            ids = processor.tokenizer([row["caption"]], return_tensors="pt", **padding)["input_ids"]
            scores = model(input_ids=ids, pixel_values=pixels).logits_per_text[0]
            ranks.append(int((scores > scores[names.index(row["image"])]).sum()) + 1)
    assert found["eval_queries"] == len(ranks) == 12
    assert found["eval_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


@pytest.mark.parametrize("keep", [(), ("--keep_states", "true")], ids=["", "kept"])
def test_trained_it_reads_alike_every_way_in(folder, flickr_folder, tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    run(folder, flickr_folder, out, "--do_train", "--do_eval", "--max_steps", 2, *keep)
    sentences = ["red beside green", "a blue half next to a yellow half"]
    encoder = load_dual_encoder(str(out))
    expected = encode_texts(encoder.model, encoder.tokenizer, sentences)
    one_by_one = torch.cat([encode_texts(encoder.model, encoder.tokenizer, [sentence]) for sentence in sentences])
    torch.testing.assert_close(expected, one_by_one, atol=1e-5, rtol=0)
    processor = RetrievalProcessor.from_pretrained(out)
    assert processor.padding == ("max_length" if folder.name == "tiny_siglip" else "longest")
    with torch.no_grad():
        found = encoder.model.get_text_features(**processor(text=sentences, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    theirs = SentenceTransformer(str(out), trust_remote_code=True, device="cpu").encode(sentences)
    np.testing.assert_allclose(theirs, expected.numpy(), atol=1e-5)
