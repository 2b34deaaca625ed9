"""The Flickr30k recipes from end to end on parts of the true vocabulary, widths and file layout, but few layers.

T5 as google-t5/t5-base is saved (768 wide, 32,128 rows, 32,000 pieces and 100 sentinels), ViT as vit-base-patch16-224-in21k, and
a train file of BLIP's. What the recipes say holds, but for the number of steps and of pictures.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

import run_dsi
import run_image_indexing
import run_retrieval
from imagedex.modeling.modeling_codebook_t5 import CodebookT5

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "flickr30k"
PICTURES, WIDTH = 60, 768
SYLLABLES = ["ba", "do", "gi", "ku", "le", "mo", "na", "pi", "ro", "su", "ta", "ve"]


def pieces():
    """32,000 of them: T5's three special ones, the space, digits, letters, signs, then made-up words."""
    draw = random.Random(0)
    found = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}
    for sign in [*"0123456789abcdefghijklmnopqrstuvwxyz.,:'-/", *(f"▁{digit}" for digit in "0123456789")]:
        found[sign] = -8.0
    while len(found) < 32_000:
        word = "".join(draw.choice(SYLLABLES) for _ in range(draw.randint(2, 5)))
        found.setdefault(f"▁{word}", -9.0 - len(found) / 32_000)
    return list(found.items())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Towers and corpus, as flags; and some captions."""
    folder, draw = tmp_path_factory.mktemp("true"), random.Random(1)
    vocabulary = pieces()
    tokenizer = T5Tokenizer(vocabulary + [(f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1)], model_max_length=512)
    assert len(tokenizer) == 32_100
    tokenizer.save_pretrained(folder / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 1, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=32_128)).save_pretrained(folder / "t5")
    vit = ViTConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=12, intermediate_size=3072)
    ViTModel(vit).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder / "vit")
    words = [piece[1:] for piece, _ in vocabulary if len(piece) > 3 and piece.startswith("▁")]
    (folder / "flickr30k-images").mkdir()
    rows = []
    for number in range(PICTURES):
        name = f"flickr30k-images/{1000 + number}.jpg"
        noise = bytes(draw.randrange(256) for _ in range(3 * 10 * 8))
        Image.frombytes("RGB", (10, 8), noise).resize((500, 375)).save(folder / name)
        captions = [" ".join(draw.choice(words) for _ in range(12)) + " ." for _ in range(5)]
        rows += [{"image": name, "caption": caption, "image_id": str(number)} for caption in captions]
    (folder / "flickr30k_train.json").write_text(json.dumps(rows))
    towers = ["--text_model_name_or_path", folder / "t5", "--vision_model_name_or_path", folder / "vit"]
    corpus = ["--dataset_name", folder / "flickr30k_train.json", "--image_dir", folder, "--max_images", PICTURES]
    return towers, corpus, [rows[place]["caption"] for place in (0, 5, 10)], folder


@pytest.fixture
def go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(script, recipe, *flags):
        rest = [
            "--max_steps",
            2,
            "--dataloader_num_workers",
            0,
            "--use_cpu",
            "--report_to",
            "none",
            "--disable_tqdm",
            "true",
        ]
        script.main([str(RECIPES / recipe), *map(str, [*flags, *rest, "--keep_dir", "kept"])])

    return run


def results_of(folder):
    return json.loads((Path(folder) / "eval_results.json").read_text())


def ask(model, captions, folder):
    Path("queries.txt").write_text("\n".join(captions) + "\n")
    flags = [
        "--model_name_or_path",
        model,
        "--image_dir",
        folder,
        "--queries",
        "queries.txt",
        "--output_dir",
        "answers",
    ]
    run_retrieval.main([*map(str, flags), "--device", "cpu", "--num_workers", "0", "--num_beams", "10"])
    answers = [json.loads(line) for line in Path("answers/rankings.jsonl").read_text().splitlines()]
    return [answer["images"] for answer in answers]


@pytest.mark.slow
def test_codebook_t5(go, parts):
    towers, corpus, captions, folder = parts
    go(run_dsi, "codebook_t5.yaml", *towers, *corpus, "--output_dir", "out")
    results = results_of("out")
    assert results["eval_gallery_size"] == results["eval_memorised_samples"] == PICTURES, (
        "all are indexed, and all asked"
    )
    assert 0 < results["eval_queries"] < 30
    model = CodebookT5.from_pretrained("out")
    assert model.codebook.words.shape == (32_000, WIDTH), "no sentinel is a word"
    start = T5ForConditionalGeneration.from_pretrained(towers[1]).shared.weight
    assert torch.equal(model.codebook.words, start[:32_000]) and not torch.equal(
        model.shared.weight[:32_000], start[:32_000]
    )
    kept = sum(path.stat().st_size for path in Path("kept").rglob("*.safetensors"))
    assert PICTURES * 196 * 4 < kept < PICTURES * 196 * 4 + 3000, "four bytes a patch"
    assert all(len(set(images)) == 10 for images in ask("out", captions, folder))


@pytest.mark.slow
def test_vision_grounded_t5_in_two_steps(go, parts):
    towers, corpus, captions, folder = parts
    go(run_image_indexing, "vision_grounded_t5_indexing.yaml", *towers, *corpus, "--output_dir", "indexed")
    assert results_of("indexed")["eval_memorised_samples"] == PICTURES
    step_2 = ["--model_name_or_path", "indexed", "--output_dir", "out"]
    go(run_dsi, "vision_grounded_t5_retrieval.yaml", *corpus, *step_2)
    results = results_of("out")
    assert {"eval_hits@1", "eval_memorised"} <= set(results) and results["eval_gallery_size"] == PICTURES
    assert all(len(set(images)) == 10 for images in ask("out", captions, folder))
