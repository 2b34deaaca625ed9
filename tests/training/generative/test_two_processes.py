"""Two ranks with models that write identifiers: gradients under DDP and activation checkpointing, evaluation under FSDP2.

The ranks run this file as a script, all cases in one launch; the tests compare what they wrote with one process here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.generative.trainer import encoded

ROOT = Path(__file__).resolve().parents[3]
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "image_size": 16, "patch_size": 8}  # fmt: skip
LEARNED = {"num_visual_tokens": 4, "visual_token_selection": "even", "quantization": "learned"}
MODELS = {
    "codebook_t5": (CodebookT5, LEARNED | {"codebook_entropy_weight": 0.0}),  # entropies of halves have another mean
    "vision_grounded_t5": (VisionGroundedT5, {}),
}
ROWS = {  # what the ranks' batches hold: (sentences, pictures) of either
    "sentences": ((2, 0), (2, 0)),
    "pictures": ((0, 2), (0, 2)),
    "both": ((1, 2), (2, 1)),
    "one has sentences, one pictures": ((2, 0), (0, 2)),
}
CASES = [(model, rows) for model in MODELS for rows in ROWS]
WRITING = ["t5", *MODELS]  # models that are evaluated, sharded
LENGTHS = Identifiers.from_sequences("naive", list("abcd"), [[5], [6, 7], [6, 8, 9], [6, 8, 10, 11, 12, 13]], 1)


def tiny(kind):
    torch.manual_seed(0)
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    model_class, fields = MODELS[kind]
    return model_class.from_t5_vision_pretrained(t5_config=T5, vision_config=VIT, freeze_vision_tower=False, **fields)


def batch(sentences, pictures, seed):
    """Each row with two labels, so that the mean over tokens is a mean over rows."""
    generator = torch.Generator().manual_seed(seed)
    found = {"labels": torch.randint(3, 30, (sentences + pictures, 2), generator=generator)}
    if sentences:
        found["input_ids"] = torch.randint(3, 30, (sentences, 5), generator=generator)
        found["attention_mask"] = torch.ones(sentences, 5, dtype=torch.long)
    if pictures:
        found["pixel_values"] = torch.randn(pictures, 3, 16, 16, generator=generator)
    return found


def batches(rows, rank):
    """Two steps: DDP finds at the second that a parameter of the first had no gradient."""
    return [batch(*ROWS[rows][rank], seed=10 * step + rank) for step in range(2)]


def trained(model, inputs):
    """Sums of losses and gradients over the batches."""
    losses = [model(**one).loss for one in inputs]
    torch.stack(losses).sum().backward()
    return torch.stack(losses).sum().detach(), {name: p.grad for name, p in model.named_parameters()}


def ddp_step(kind, rows, rank):
    core = tiny(kind).train()
    core.activation_checkpointing_enable()
    model = DistributedDataParallel(core, find_unused_parameters=False)  # as the Trainer under activation checkpointing
    total = 0
    for inputs in batches(rows, rank):
        loss = model(**inputs).loss
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad for name, p in core.named_parameters()}


def writer(kind):
    """Weights far from uniform, so that it depends on the query which identifier is written, and how long."""
    model = tiny(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def asked(kind, rank):
    """The ranks ask different queries, whose search ends at different steps."""
    return batch(2, 0 if kind == "t5" else 2, seed=20 + 5 * rank)


def sharded_answers(kind, rank):
    model = fully_shard(writer(kind), mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    inputs = asked(kind, rank)
    with torch.no_grad():
        return rank_identifiers(model, LENGTHS, encoded(model(**inputs), inputs) | {"synced_gpus": True}, 2)


def work(folder):
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for kind, rows in CASES:
        found[f"{kind} {rows}"] = ddp_step(kind, rows, rank)
    for kind in WRITING:
        found[kind] = sharded_answers(kind, rank)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rows"), CASES)
def test_batches_of_one_kind_train_under_activation_checkpointing(ranks, kind, rows):
    """Gradients are the mean of what one process finds for either rank's batches; 0 where a parameter had no part."""
    alone = [trained(tiny(kind).train(), batches(rows, rank)) for rank in (0, 1)]
    for rank in (0, 1):
        loss, gradients = ranks[rank][f"{kind} {rows}"]
        torch.testing.assert_close(loss, alone[rank][0], atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            both = [own[name] for _, own in alone]
            mean = sum(torch.zeros_like(gradient) if own is None else own for own in both) / 2
            torch.testing.assert_close(gradient, mean, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITING)
def test_evaluation_with_sharded_parameters(ranks, kind, monkeypatch):
    passes = []
    for rank in (0, 1):
        model, calls = writer(kind), []
        scores, rows = rank_identifiers(model, LENGTHS, asked(kind, rank), 2)
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        monkeypatch.setattr(
            "imagedex.modeling.constrained_decoding.searchable", lambda *_: False
        )  # as where it is sharded
        rank_identifiers(model, LENGTHS, asked(kind, rank), 2)
        monkeypatch.undo()
        assert torch.equal(ranks[rank][kind][1], rows)
        torch.testing.assert_close(ranks[rank][kind][0], scores, atol=1e-4, rtol=1e-4)
        passes.append(len(calls))
    assert passes[0] != passes[1], "or it would not matter that ranks wait for each other"


if __name__ == "__main__":
    work(sys.argv[1])
