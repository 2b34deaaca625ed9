"""The snippets of each card run as printed, in a fresh process, and a saved model names no folder of the machine it came from."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

import run_dsi
import run_image_indexing
import run_xmatching
from imagedex.training.publishing import PRIVATE
from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A folder with pretrained towers: bert, vit and t5."""
    folder = tmp_path_factory.mktemp("towers")
    tokenizer = train_tokenizer(["two dogs play in the snow", "red and green on the left"], 100)
    torch.manual_seed(0)
    BertModel(BertConfig(**TOWER, vocab_size=len(tokenizer))).save_pretrained(folder / "bert")
    ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    t5 = T5Config(
        d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=1, vocab_size=len(tokenizer), decoder_start_token_id=0
    )
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    for name in ("bert", "t5"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def saved(towers, flickr_folder, tmp_path_factory):
    """name -> a model's output folder, one for each kind of card, all from the towers' folders."""
    runs = tmp_path_factory.mktemp("runs")
    text, vision = ["--text_model_name_or_path"], ["--vision_model_name_or_path", towers / "vit"]
    common = ["--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--do_train", "--use_cpu", "--max_steps", 1,
              "--save_strategy", "no", "--report_to", "none", "--per_device_train_batch_size", 6]  # fmt: skip
    t5 = [*text, towers / "t5"]
    grounded = ["--model_type", "vision_grounded_t5", *t5, *vision]
    made = {
        "xmatching": (run_xmatching, [*text, towers / "bert", *vision, "--projection_dim", 16]),
        "codebook_t5": (run_dsi, ["--model_type", "codebook_t5", *t5, *vision, "--num_visual_tokens", 4, "--num_beams", 4]),
        "codebook_t5_indexing": (run_image_indexing, ["--model_type", "codebook_t5", *t5, *vision, "--num_visual_tokens", 4]),
        "vision_grounded_t5_indexing": (run_image_indexing, grounded),
        "vision_grounded_t5": (run_dsi, ["--model_name_or_path", runs / "vision_grounded_t5_indexing"]),
        "t5": (run_dsi, ["--model_type", "t5", *t5, "--caption_prompt", "ask: "]),
    }  # fmt: skip
    for name, (script, flags) in made.items():
        script.main(list(map(str, [*flags, *common, "--output_dir", runs / name])))
    return {name: runs / name for name in made}


INDEXING = ("codebook_t5_indexing", "vision_grounded_t5_indexing")
KINDS = ["xmatching", "codebook_t5", "codebook_t5_indexing", "vision_grounded_t5_indexing", "vision_grounded_t5", "t5"]


@pytest.mark.parametrize("name", KINDS)
def test_the_snippets_of_a_card_run_as_printed(saved, tmp_path, name):
    """Beside the model's folder, as the card names it; a plain T5 has no code of its own and needs imagedex."""
    card = (saved[name] / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (3 if name == "xmatching" else 1 if name in ("t5", *INDEXING) else 2)
    assert 'revision="' in card
    (tmp_path / name).symlink_to(saved[name])
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    if name == "t5":
        environment["PYTHONPATH"] = str(ROOT)
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if "pipeline(" in snippet:
            found = ast.literal_eval(done.stdout.splitlines()[-1])
            assert 1 <= len(found) <= 5
            assert all((one.get("image") or one["image_id"]).endswith(".jpg") and "score" in one for one in found)
        elif name == "xmatching":
            assert -1.001 <= float(re.search(r"\[\[(.*?)\]\]", done.stdout)[1]) <= 1.001
        else:
            lines = done.stdout.splitlines()
            assert 1 <= len(lines) <= 5, lines
            scores = [float(line.split()[0]) for line in lines]
            assert scores == sorted(scores, reverse=True) and all(line.endswith(".jpg") for line in lines)


@pytest.mark.parametrize("name", KINDS)
def test_no_folder_of_this_machine_is_kept(saved, towers, name):
    """In what is pushed: the arguments of the run stay in its folder, and are what another run is compared with."""
    files = [path for path in saved[name].rglob("*") if path.suffix in (".json", ".md") and path.name not in PRIVATE]
    assert {"config.json", "tokenizer_config.json", "README.md"} <= {path.name for path in files}
    for path in files:
        for folder in (towers, saved[name].parent):
            assert str(folder) not in path.read_text(), path
    config = json.loads((saved[name] / "config.json").read_text())
    if "vision_config" in config:
        assert config["vision_config"].get("_name_or_path", "vit") == "vit"
