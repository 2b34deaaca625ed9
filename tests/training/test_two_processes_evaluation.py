"""Two ranks judge as one does, whatever is left for the last batch: fewer rows than ranks, one row too many, batches of one.

The ranks run this file as a script, all cases in one launch; the tests compare what they wrote with one process here.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.data import Collator, RetrievalEvaluation
from imagedex.training.dual_encoder.trainer import XMatchingTrainer
from imagedex.training.generative.arguments import DSITrainingArguments
from imagedex.training.generative.data import DSICollator, GenerativeEvaluation
from imagedex.training.generative.trainer import DSITrainer
from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
TEXT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
       "image_size": 16, "patch_size": 8}  # fmt: skip
CASES = [(model, queries, pictures, size) for model in ("xmatching", "t5", "vision_grounded_t5") for queries, pictures, size in
         ((1, 2, 4), (2, 1, 1), (3, 5, 1), (7, 4, 3), (8, 8, 4), (9, 5, 4), (11, 3, 64))]  # fmt: skip


def sentences(count):
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(count):
        tokens = torch.randint(
            3, 40, (int(torch.randint(2, 7, (), generator=generator)),), generator=generator
        ).tolist()
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens)})
    return rows


def pictures(count):
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(count)]


def targets_of(queries, count):
    return np.array([(5 * query) % count for query in range(queries)])


def xmatching(folder, queries, count, size):
    torch.manual_seed(0)
    model = XMatchingModel(
        XMatchingConfig(text_config=TEXT, vision_config=VIT, projection_dim=8, text_pooling_layers=1)
    )
    args = {"output_dir": str(folder), "per_device_eval_batch_size": size, "use_cpu": True, "disable_tqdm": True}
    evaluation = RetrievalEvaluation(sentences(queries), pictures(count), targets_of(queries, count))
    collator = Collator(train_tokenizer(["a b c"], 40))
    return XMatchingTrainer(
        model=model, args=XMatchingTrainingArguments(**args), eval_dataset=evaluation, data_collator=collator
    ).evaluate()


def generative(kind, folder, queries, count, size):
    """Identifiers of 1 to 4 tokens, so that batches end at different steps."""
    torch.manual_seed(0)
    if kind == "t5":
        model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    else:
        model = VisionGroundedT5.from_t5_vision_pretrained(t5_config=T5, vision_config=VIT)
    sequences = [[5 + row] * (1 + row % 4) for row in range(count)]
    identifiers = Identifiers.from_sequences("naive", [str(row) for row in range(count)], sequences, 1)
    targets = targets_of(queries, count)
    asked = [
        row | {"labels": identifiers.labels(str(target))}
        for row, target in zip(sentences(queries), targets, strict=True)
    ]
    parts = {"sentences": asked, "targets": targets}
    if kind != "t5":
        items = [row | {"labels": identifiers.labels(str(at))} for at, row in enumerate(pictures(count))]
        parts |= {"items": items, "item_targets": np.arange(count)}
    args = {"output_dir": str(folder), "per_device_eval_batch_size": size, "use_cpu": True, "disable_tqdm": True}
    return DSITrainer(
        model=model, args=DSITrainingArguments(**args, num_beams=3), eval_dataset=GenerativeEvaluation(**parts),
        data_collator=DSICollator(train_tokenizer(["a b c"], 40)), identifiers=identifiers,
    ).evaluate()  # fmt: skip


def figures(folder, model, *counts):
    found = xmatching(folder, *counts) if model == "xmatching" else generative(model, folder, *counts)
    return {name: value for name, value in found.items() if not name.endswith(("runtime", "per_second", "per_query"))}


def work(folder):
    found = {"/".join(map(str, case)): figures(folder, *case) for case in CASES}
    torch.save(found, Path(folder) / f"rank{PartialState().process_index}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks found: [rank][case]."""
    folder = tmp_path_factory.mktemp("ranks")
    config = ROOT / "accelerate_configs" / "cpu_two_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    command += ["--num_cpu_threads_per_process", "1", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "/".join(map(str, case)))
def test_figures(ranks, tmp_path, case):
    alone = figures(tmp_path, *case)
    assert alone["eval_queries"] == case[1] and alone["eval_gallery_size"] == case[2]
    for rank in ranks:
        assert rank["/".join(map(str, case))] == pytest.approx(alone, abs=1e-5)


if __name__ == "__main__":
    work(sys.argv[1])
