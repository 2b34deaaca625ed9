"""Recipes of the originals: their settings, their corpora, and that each starts, on towers and corpora made here."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import run_dsi
import run_image_indexing
import run_retrieval
from imagedex.corpora.arguments import CorpusArguments
from imagedex.corpora.load import load_splits
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.tokenizer import train_tokenizer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
COLOURS = ["red", "green", "blue", "black", "white", "grey"]
PLACES = ["beach", "street", "meadow", "kitchen", "stage"]
SENTENCES = [
    "a {} dog at the {}",
    "Someone in {}, at the {}.",
    "a {} car near the {}",
    "two {} birds: {}",
    "{} on a {}",
]
WIDTH = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}

# What train.py of DSI-transformers (and its fork for Flickr30k) says; 16 rows a batch in the fork's main_i2t.
TRAINING = {
    "learning_rate": 5e-4, "warmup_steps": 10_000, "max_steps": 1_000_000, "weight_decay": 0.0, "num_beams": 10,
    "lr_scheduler_type": "linear", "eval_steps": 1000, "logging_steps": 50,
}  # fmt: skip
READING = {"max_text_length": 32, "caption_prompt": "question: "}
LARGE = {"text_model_name_or_path": "google-t5/t5-large"}
ORIGINAL = {
    "nq10k/dsi": TRAINING | READING | LARGE
    | {"document_prompt": "document: ", "clean_captions": False, "per_device_train_batch_size": 128},
    "flickr30k/codebook_t5": TRAINING | READING | LARGE
    | {"vision_model_name_or_path": "google/vit-large-patch16-224-in21k", "per_device_train_batch_size": 128,
       "num_visual_tokens": 32, "visual_token_selection": "random", "quantization": "fixed", "clean_captions": True},
    "flickr30k/vision_grounded_t5_indexing": TRAINING
    | {"text_model_name_or_path": "google-t5/t5-base", "per_device_train_batch_size": 16,
       "vision_model_name_or_path": "google/vit-base-patch16-224-in21k"},
    "flickr30k/vision_grounded_t5_retrieval": TRAINING | READING
    | {"clean_captions": True, "per_device_train_batch_size": 128, "indexing_ratio": 0.0},
}  # fmt: skip


def recipe(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ORIGINAL)
def test_each_setting_is_the_original_s(name):
    values = recipe(name)
    assert {key: values[key] for key in ORIGINAL[name]} == ORIGINAL[name]


def test_pseudo_queries_are_all_that_tells_the_two_recipes_of_nq10k_apart():
    plain, more = recipe("nq10k/dsi"), recipe("nq10k/dsi_pseudo_queries")
    assert more.pop("pseudo_queries_file") and more == plain


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A T5 with its tokenizer and a ViT of the same width, saved, as flags."""
    folder = tmp_path_factory.mktemp("towers")
    texts = [sentence.format(colour, place) for sentence in SENTENCES for colour in COLOURS for place in PLACES]
    tokenizer = train_tokenizer([*texts, "question: document: who what where"], 300)
    tokenizer.save_pretrained(folder / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder / "t5")
    ViTModel(ViTConfig(**WIDTH, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    t5 = ["--text_model_name_or_path", folder / "t5"]
    return {"t5": t5, "both": [*t5, "--vision_model_name_or_path", folder / "vit"]}


@pytest.fixture(scope="module")
def flickr30k(tmp_path_factory):
    """30 pictures with five captions each, laid out as Flickr30k is and written as BLIP's train file; flags, and its rows."""
    root = tmp_path_factory.mktemp("flickr30k")
    images, small = root / "flickr30k" / "flickr30k_images", root / "flickr30k_10k"
    images.mkdir(parents=True)
    small.mkdir()
    draw, rows = random.Random(1), []
    for number, (colour, place) in enumerate((colour, place) for colour in COLOURS for place in PLACES):
        name = f"{1000 + number}.jpg"
        Image.new("RGB", (40, 30), tuple(draw.randrange(256) for _ in range(3))).save(images / name)
        captions = [text.format(colour, place) for text in SENTENCES]
        rows += [{"image": f"flickr30k-images/{name}", "caption": caption, "image_id": name} for caption in captions]
    (small / "flickr30k_train.json").write_text(json.dumps(rows))
    return ["--dataset_name", small / "flickr30k_train.json", "--image_dir", images, "--max_images", 20], rows


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Flags that shrink a recipe to one step of a few rows, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return [
        "--output_dir", tmp_path / "out", "--max_steps", 1, "--per_device_train_batch_size", 4, "--use_cpu",
        "--per_device_eval_batch_size", 8, "--dataloader_num_workers", 0, "--report_to", "none", "--disable_tqdm", "true",
        "--num_beams", 3,
    ]  # fmt: skip


def run(script, name, *flags):
    script.main([str(RECIPES / f"{name}.yaml"), *map(str, flags)])


def results_of(folder):
    return json.loads((folder / "eval_results.json").read_text())


@pytest.mark.parametrize("name", [name for name in ORIGINAL if name.startswith("flickr30k")])
def test_pictures_and_captions_are_those_of_the_original(flickr30k, name):
    """Against the loop of its create_flickr_data.py: rows shuffled with seed 313, of each new picture the caption met first."""
    flags, rows = flickr30k
    values, fields = recipe(name), {field.name for field in dataclasses.fields(CorpusArguments)}
    given = {key.lstrip("-"): str(value) if isinstance(value, Path) else value
             for key, value in zip(flags[::2], flags[1::2], strict=True)}  # fmt: skip
    assert values["max_images"] == 10_000
    splits = load_splits(CorpusArguments(**{key: values[key] for key in values.keys() & fields} | given))
    random.seed(313)
    order, chosen = list(range(len(rows))), {}
    random.shuffle(order)
    for place in order:
        image = Path(rows[place]["image"]).name
        if image not in chosen:
            chosen[image] = rows[place]["caption"]
            if len(chosen) == 20:
                break
    assert splits.gallery["image_id"][:] == list(chosen)
    for part in (splits.train, splits.evaluation):
        assert {(row["image_id"], *row["captions"]) for row in part.remove_columns("image")} <= set(chosen.items())
    assert len(splits.train) + len(splits.evaluation) == 20


def test_codebook_t5_starts(towers, flickr30k, quick, tmp_path):
    run(run_dsi, "flickr30k/codebook_t5", *towers["both"], *flickr30k[0], *quick)
    results, identifiers = results_of(tmp_path / "out"), Identifiers.from_pretrained(tmp_path / "out")
    assert results["eval_gallery_size"] == results["eval_memorised_samples"] == 20, "all are indexed"
    assert 0 < results["eval_queries"] < 10, "one caption of each picture held out"
    assert identifiers.scheme == "naive"
    processor = RetrievalProcessor.from_pretrained(tmp_path / "out")
    assert (processor.prompt, processor.clean_text, processor.max_text_length) == ("question: ", True, 32)


def test_vision_grounded_t5_starts_in_two_steps(towers, flickr30k, quick, tmp_path):
    step_1, captions = "flickr30k/vision_grounded_t5_indexing", flickr30k[0]
    run(run_image_indexing, step_1, *towers["both"], *captions, *quick, "--output_dir", tmp_path / "indexed")
    assert results_of(tmp_path / "indexed")["eval_memorised_samples"] == 20
    run(
        run_dsi,
        "flickr30k/vision_grounded_t5_retrieval",
        *captions,
        *quick,
        "--model_name_or_path",
        tmp_path / "indexed",
    )
    results = results_of(tmp_path / "out")
    assert {"eval_hits@1", "eval_memorised"} <= set(results) and results["eval_gallery_size"] == 20


@pytest.mark.parametrize("name", ["dsi", "dsi_pseudo_queries"])
def test_nq10k_starts(towers, quick, tmp_path, name, capfd):
    """On the two files that the original's script writes: 12 documents, the questions of 8 trained and of 4 asked."""
    folder, told = tmp_path / "NQ", {"NQ_10k_multi_task_train.json": [], "NQ_10k_valid.json": []}
    train, valid = told.values()
    for number in range(12):
        document, question = f"document: the {COLOURS[number % 6]} {PLACES[number % 5]}", f"question: where is {number}"
        train.append({"text_id": str(number), "text": document})
        (train if number < 8 else valid).append({"text_id": str(number), "text": question})
    folder.mkdir()
    for file, rows in told.items():
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = []
    if name == "dsi_pseudo_queries":
        written = [{"document_id": str(number), "question": f"what is {number}"} for number in range(12)]
        (tmp_path / "pseudo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        flags = ["--pseudo_queries_file", tmp_path / "pseudo.jsonl"]
    run(run_dsi, f"nq10k/{name}", *towers["t5"], *quick, "--dataset_name", folder, *flags)
    results = results_of(tmp_path / "out")
    assert (results["eval_gallery_size"], results["eval_queries"], results["eval_memorised_samples"]) == (12, 4, 12)
    rows = 12 + 8 + (12 if flags else 0)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(4 / rows), "an epoch is each document, question and pseudo-query once"


def test_pictures_for_every_utterance(flickr30k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["a red dog at the beach", "two birds"], 100)
    text = WIDTH | {"model_type": "bert", "vocab_size": len(tokenizer)}
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    model = XMatchingModel.from_text_vision_pretrained(
        text_config=AutoConfig.for_model(**text), vision_config=AutoConfig.for_model(**vision), text_pooling_layers=1
    )
    model.save_pretrained("model")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    RetrievalProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained("model")
    (tmp_path / "train.txt").write_text("a dog on the beach\nwho is there\ntwo birds\n")
    flags = [
        "--model_name_or_path",
        "model",
        "--queries",
        "train.txt",
        "--image_dir",
        flickr30k[0][3],
        "--num_workers",
        0,
    ]
    run(run_retrieval, "reddit_openimages/retrieval", *flags, "--output_dir", "out", "--device", "cpu")
    lines = [line.split("\t") for line in (tmp_path / "out" / "rankings.tsv").read_text().splitlines()]
    assert len(lines) == 3, "a line for every utterance"
    there = {path.name for path in Path(flickr30k[0][3]).glob("*.jpg")}
    assert all(len(line) == len(set(line)) == 5 and set(line) <= there for line in lines)
