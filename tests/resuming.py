"""Runs that are stopped and go on, compared with those that are not."""

import json

import pytest
from safetensors.torch import load_file

from imagedex.modeling.caption_bank import CONFIDENCES

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
       "patch_size": 8}  # fmt: skip
ANIMALS = ["otter", "heron", "badger", "lynx"]
BESIDE = {"config.json", "identifiers.json", "tokenizer.json", "head_start.json", "README.md"}  # the model


def run(script, arguments):
    script.main(list(map(str, arguments)))


def write_documents(folder):
    """Documents and questions, as JSON lines."""
    rows = {
        "documents": [{"id": f"d{i}", "text": f"The {name} lives by the water."} for i, name in enumerate(ANIMALS)],
        "train": [{"document_id": f"d{i}", "question": f"{ask} the {name}"}
                  for i, name in enumerate(ANIMALS) for ask in ("where lives", "what is")],
        "validation": [{"document_id": f"d{i}", "question": f"who saw the {name}"} for i, name in enumerate(ANIMALS)],
    }  # fmt: skip
    folder.mkdir()
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def figures(folder):
    """What was measured, without times."""
    found = json.loads((folder / "eval_results.json").read_text())
    return {
        name: value for name, value in found.items() if not name.endswith(("runtime", "per_second", "ms_per_query"))
    }


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def check_same(found, expected, beside=BESIDE):
    """Both runs ended alike."""
    assert losses(found) == losses(expected)
    assert figures(found) == figures(expected)
    names = {path.name for path in expected.glob("*.safetensors")} - {CONFIDENCES} | beside
    for name in sorted(name for name in names if (expected / name).exists()):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    if (
        expected / CONFIDENCES
    ).exists():  # of an evaluation, with or without adapters that are merged: alike but for last bits
        one, other = (load_file(folder / CONFIDENCES)["confidences"] for folder in (found, expected))
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-5)
