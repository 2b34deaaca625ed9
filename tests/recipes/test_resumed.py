"""Every recipe that was run: killed in the middle and started again, it ends, bit for bit, where an unbroken run does.

The recipes are as they are but for sizes: few pictures, narrow towers, few steps. tests/test_run_resumed.py has the same in
small, within one process, with stops between and within epochs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import (
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = ["otter", "heron", "badger", "lynx", "salmon", "falcon"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
VIT = {"model_type": "vit", **SMALL, "patch_size": 8}


@pytest.fixture
def parts(tmp_path):
    """Pretrained parts in folders, tiny, and a corpus of documents."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(24)
    tokenizer.save_pretrained(tmp_path / "text")
    BertModel(BertConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=24)).save_pretrained(
        tmp_path / "text"
    )
    ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    fields = {name: value for name, value in T5.items() if name != "model_type"}
    tokenizer.save_pretrained(tmp_path / "t5")
    T5ForConditionalGeneration(
        T5Config(**fields, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id)
    ).save_pretrained(tmp_path / "t5")
    rows = {
        "documents": [{"id": f"d{i}", "text": f"The {name} lives by the water."} for i, name in enumerate(ANIMALS)],
        "train": [{"document_id": f"d{i}", "question": f"{ask} the {name}"}
                  for i, name in enumerate(ANIMALS) for ask in ("where lives", "what is")],
        "validation": [{"document_id": f"d{i}", "question": f"who saw the {name}"} for i, name in enumerate(ANIMALS)],
    }  # fmt: skip
    (tmp_path / "documents").mkdir()
    for name, content in rows.items():
        (tmp_path / "documents" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def commands(flickr_folder):
    """name -> (script, arguments), to be run in the folder of `parts`."""
    scenes = ["--dataset_config_name", 60, "--num_train_epochs", 8, "--per_device_train_batch_size", 32]
    photos = ["--dataset_name", flickr_folder, "--num_train_epochs", 16, "--per_device_train_batch_size", 12]
    t5, vit = ["--t5_config", json.dumps(T5)], ["--vision_config", json.dumps(VIT)]
    towers = ["--vision_model_name_or_path", "vision", "--text_model_name_or_path", "text", "--max_text_length", 24]
    step1 = ["--model_name_or_path", "step1"]
    scratch = [*t5, *vit, "--image_size", 16]
    fine = ["--save_strategy", "steps", "--save_steps", 7, "--eval_strategy", "steps", "--eval_steps", 7]
    nq10k = ["--dataset_name", "documents", "--text_model_name_or_path", "t5", "--max_steps", 40, "--save_steps", 7,
             "--per_device_train_batch_size", 4, "--dataloader_num_workers", 2, "--warmup_steps", 4]  # fmt: skip
    return {
        "quickstart/codebook_t5": ("run_dsi.py", scenes),
        "quickstart/vision_grounded_t5_indexing": ("run_image_indexing.py", scenes),
        "quickstart/vision_grounded_t5_retrieval": ("run_dsi.py", [*step1, *scenes]),
        "quickstart/xmatching": ("run_xmatching.py", scenes),
        "photos/codebook_t5": ("run_dsi.py", [*scratch, *photos]),
        "photos/vision_grounded_t5_indexing": ("run_image_indexing.py", [*scratch, *photos, "--max_steps", 30, *fine]),
        "photos/vision_grounded_t5_retrieval": ("run_dsi.py", [*step1, *photos]),
        "photos/xmatching": ("run_xmatching.py", ["--text_model_name_or_path", "text", *photos, "--max_text_length", 24]),
        "photos/xmatching_pretrained": ("run_xmatching.py", [*towers, *photos, "--held_out_captions_per_image", 1]),
        "photos/xmatching_lora": ("run_xmatching.py", [*towers, *photos, "--projection_dim", 32]),
        "nq10k/dsi": ("run_dsi.py", nq10k),
    }  # fmt: skip


def started(folder, name, script, arguments, out):
    command = [sys.executable, ROOT / script, ROOT / "recipes" / f"{name}.yaml", *arguments]
    command += ["--use_cpu", "--report_to", "none", "--keep_dir", "kept", "--output_dir", out]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    with open(folder / "said.txt", "w") as said:
        return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=said, stderr=said)


def finished(folder, *command):
    assert started(folder, *command).wait() == 0, (folder / "said.txt").read_text()[-3000:]


def figures(folder):
    found = json.loads((folder / "eval_results.json").read_text())
    return {
        name: value for name, value in found.items() if not name.endswith(("runtime", "per_second", "ms_per_query"))
    }


def is_whole(state):
    """Whether a checkpoint's state, which is written last, is all there."""
    try:
        return bool(json.loads(state.read_text()))
    except (ValueError, FileNotFoundError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("name", commands(""))
def test_killed_and_started_again_it_ends_where_an_unbroken_run_does(parts, flickr_folder, tmp_path, name):
    script, arguments = commands(flickr_folder)[name]
    if name.endswith("retrieval"):
        first = name.replace("retrieval", "indexing")
        finished(tmp_path, first, *commands(flickr_folder)[first], "step1")
    finished(tmp_path, name, script, arguments, "whole/run")

    out = tmp_path / "killed" / "run"
    process = started(tmp_path, name, script, arguments, "killed/run")
    while not any(map(is_whole, out.glob("checkpoint-*/trainer_state.json"))):
        assert process.poll() is None, (tmp_path / "said.txt").read_text()[-3000:]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (out / "model.safetensors").exists()
    finished(tmp_path, name, script, arguments, "killed/run")
    assert "going on from" in (tmp_path / "said.txt").read_text()

    whole = tmp_path / "whole" / "run"
    for file in sorted(path.name for path in whole.glob("*.safetensors")):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file
    assert figures(out) == figures(whole)
