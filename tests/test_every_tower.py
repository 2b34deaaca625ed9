"""Every kind of pretrained tower, with its own processor, trains from the command line and is asked afterwards."""

import csv
import json

import pytest
import torch
from test_one_way_to_read import FAMILIES
from tiny_models import TOWER, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoProcessor

import imagedex.modeling  # noqa: F401  so that the Auto classes know the model without its copied code
import run_retrieval
import run_xmatching

SENTENCES = {"bert": {"max_position_embeddings": 48}, "mpnet": {"max_position_embeddings": 50}}


def save_text_tower(folder, model_type):
    tokenizer = tiny_tokenizer(max_length=48)
    config = AutoConfig.for_model(model_type, **TOWER, vocab_size=len(tokenizer), **SENTENCES[model_type])
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_vision_tower(folder, family):
    config, image_processor = FAMILIES[family]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **fields))
    model.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("text", "vision"),
    [("bert", "vit"), ("mpnet", "dinov2"), ("bert", "convnext"), ("mpnet", "clip"), ("bert", "siglip2")],
)
def test_two_pretrained_towers_train_and_are_asked(text, vision, flickr_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_text_tower(tmp_path / "text", text)
    original = save_vision_tower(tmp_path / "vision", vision).state_dict()
    flags = [
        "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--do_train", "--do_eval", "--max_steps", 2,
        "--text_model_name_or_path", "text", "--vision_model_name_or_path", "vision", "--freeze_text_tower", "false",
        "--text_learning_rate", 1e-3, "--per_device_train_batch_size", 6, "--use_cpu", "--report_to", "none",
        "--disable_tqdm", "true", "--projection_dim", 16, "--output_dir", "out",
    ]  # fmt: skip
    run_xmatching.main(list(map(str, flags)))
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_queries"] == 12

    model, processor = AutoModel.from_pretrained("out").eval(), AutoProcessor.from_pretrained("out")
    trained = model.vision_model.state_dict()
    assert all(torch.equal(trained[name], original[name]) for name in trained)  # it is frozen
    with open(flickr_folder / "captions.txt", newline="") as file:
        asked = [row["caption"] for row in csv.DictReader(file)][::4]
    (tmp_path / "queries.txt").write_text("\n".join(asked) + "\n")
    flags = ["--model_name_or_path", "out", "--image_dir", flickr_folder / "images", "--queries", "queries.txt",
             "--output_dir", "answers", "--device", "cpu", "--top_k", 12]  # fmt: skip
    run_retrieval.main(list(map(str, flags)))
    names = sorted(path.name for path in (flickr_folder / "images").iterdir())
    images = [str(flickr_folder / "images" / name) for name in names]
    with torch.no_grad():
        sentences = model(**processor(text=asked, images=images, return_tensors="pt")).text_embeds
        pictures = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    expected = model.search_scores(sentences, pictures)
    answers = [json.loads(line) for line in (tmp_path / "answers" / "rankings.jsonl").read_text().splitlines()]
    for row, answer in enumerate(answers):
        found = torch.tensor([expected[row, names.index(name)] for name in answer["images"]])
        torch.testing.assert_close(found, expected[row].sort(descending=True).values, atol=1e-5, rtol=0)
