"""Every recipe that was run, but for sizes: few pictures, narrow towers, few steps; and the tiny parts that they start from."""

import json

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
