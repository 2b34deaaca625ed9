"""Two ranks with half the batch each against one process with the whole batch: loss and every gradient, for each loss.

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
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.dual_encoder.gradient_cache import cached_step

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ["paired_hinge", "hinge", "hardest_hinge", "info_nce", "sigmoid"]
ROWS = 12
TEXT = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
VISION = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 32, "image_size": 16, "patch_size": 8}  # fmt: skip


def tiny(loss_type, negatives, reduction):
    torch.manual_seed(0)
    fields = {"projection_dim": 12, "head_hidden_sizes": [20], "head_dropout": 0.0, "text_pooling_layers": 1}
    fields |= {"text_pooling": "first", "text_head": "mlp", "vision_head": "mlp", "loss_margin": 0.5}
    frozen = {"freeze_text_tower": False, "freeze_vision_tower": False}
    loss = {"loss_type": loss_type, "negatives": negatives, "loss_reduction": reduction}
    model = XMatchingModel(XMatchingConfig(text_config=TEXT, vision_config=VISION, **fields, **frozen, **loss)).train()
    model.hardness = 0.7
    return model


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 40, (ROWS, 6), generator=generator),
        "attention_mask": torch.ones(ROWS, 6, dtype=torch.long),
        "pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator),
        # rows of one picture within a half (1 and 3), across the halves (0 and 8), and as partners across them (2 and 8)
        "image_ids": torch.tensor([0, 1, 0, 1, 2, 3, 4, 5, 0, 6, 7, 8]),
    }


def half(inputs, rank):
    return {name: value.chunk(2)[rank] for name, value in inputs.items()}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_step(model, inputs):
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    return loss.detach()


def cached(model, inputs, chunk_size=4):
    return cached_step(model, inputs, chunk_size, core=model.module, no_sync=model.no_sync)


def accumulated(step):
    """Two batches, their gradients averaged over ranks once."""

    def two_steps(model, inputs):
        with model.no_sync():
            first = step(model, inputs)
        return first + step(model, half(batch(seed=2), distributed.get_rank()))

    return two_steps


CASES = {  # name -> (loss, negatives, reduction), step, DDP's find_unused_parameters (the Trainer's default is True)
    f"{loss} {negatives} {name}": ((loss, negatives, "mean"), step, unused)
    for loss in LOSSES
    for negatives in ("gathered", "local")
    for name, step, unused in (("plain", plain_step, True), ("cached", cached, True))
}
CASES |= {
    f"{loss} gathered sum": ((loss, "gathered", "sum"), plain_step, False)
    for loss in ("paired_hinge", "hinge", "hardest_hinge")
}
CASES |= {
    "sigmoid gathered cached, nothing searched": (("sigmoid", "gathered", "mean"), cached, False),
    "sigmoid gathered accumulated": (("sigmoid", "gathered", "mean"), accumulated(plain_step), True),
    "sigmoid gathered cached accumulated": (("sigmoid", "gathered", "mean"), accumulated(cached), True),
    "hinge local cached accumulated": (("hinge", "local", "mean"), accumulated(cached), True),
}
SHARDED = {f"{loss} sharded": (loss, "gathered", "mean") for loss in ("info_nce", "sigmoid")}  # by FSDP2


def loss_of_given_embeddings(model):
    """As the evaluation computes it: outside of `forward`, where FSDP2 has parameters in parts."""
    sides = (torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    with torch.no_grad():
        return model.compute_loss(*(F.normalize(side, dim=-1) for side in sides))


def sharded_step(fields, inputs):
    model = fully_shard(tiny(*fields), mesh=init_device_mesh("cpu", (2,)))
    outside = loss_of_given_embeddings(model)
    loss = plain_step(model, inputs)
    return loss, {name: p.grad.full_tensor() for name, p in model.named_parameters()}, outside


def work(folder):
    """What each rank does: every case through DDP on its half of the batch, two of them sharded as well."""
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for name, fields in SHARDED.items():
        found[name] = sharded_step(fields, half(batch(), rank))
    for name, (fields, step, unused) in CASES.items():
        core = tiny(*fields)
        model = DistributedDataParallel(core, find_unused_parameters=unused)
        found[name] = step(model, half(batch(), rank)), gradients(core)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks found: [rank][case] -> (loss, gradients)."""
    folder = tmp_path_factory.mktemp("ranks")
    config = ROOT / "accelerate_configs" / "cpu_two_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    command += ["--num_cpu_threads_per_process", "1", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def one_process(fields, inputs):
    model = tiny(*fields)
    return plain_step(model, inputs), gradients(model)


def mean(first, second):
    return (first[0] + second[0]) / 2, {name: (first[1][name] + second[1][name]) / 2 for name in first[1]}


def expected_of(fields, seed=1):
    """Gathered: the whole batch; local: the mean of the two halves."""
    if fields[1] == "gathered":
        return one_process(fields, batch(seed))
    return mean(*(one_process(fields, half(batch(seed), rank)) for rank in (0, 1)))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(ranks, name):
    fields = CASES[name][0]
    loss, grads = expected_of(fields)
    if "accumulated" in name:
        second = expected_of(fields, seed=2)
        loss, grads = loss + second[0], {key: value + second[1][key] for key, value in grads.items()}
    found = [rank[name] for rank in ranks]
    if fields[1] == "gathered":  # each rank knows the loss of the whole batch
        assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss, atol=1e-5, rtol=1e-5)
    for _, there in found:
        assert there.keys() == grads.keys()
        for parameter, gradient in grads.items():
            torch.testing.assert_close(there[parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", SHARDED)
def test_with_sharded_parameters(ranks, name):
    loss, grads = expected_of(SHARDED[name])
    for rank in ranks:
        found, there, outside = rank[name]
        torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outside, loss_of_given_embeddings(tiny(*SHARDED[name])))
        for parameter, gradient in grads.items():
            torch.testing.assert_close(there[parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gathered_and_local_negatives_differ(loss_type):
    """Or the tests above would prove nothing."""
    gathered, local = (expected_of((loss_type, negatives, "mean"))[1] for negatives in ("gathered", "local"))
    largest = max((gathered[name] - local[name]).abs().max().item() for name in gathered)
    assert largest > 1e-3


if __name__ == "__main__":
    work(sys.argv[1])
