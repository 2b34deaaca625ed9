"""Gradient caching gives the loss and the gradients of the plain step."""

import contextlib
import copy
import logging

import pytest
import torch
from torch import nn
from transformers import TrainerState

from imagedex.bounds import check_bounds
from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.errors import UserError
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.gradient_cache import batch_statistics, cached_step
from imagedex.training.dual_encoder.trainer import XMatchingTrainer

LOSSES = ["paired_hinge", "hinge", "hardest_hinge", "info_nce", "sigmoid"]
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
       "image_size": 16, "patch_size": 8}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
ROWS = 10


def tiny(loss_type="info_nce", vision=VIT, dropout=0.0, **fields):
    torch.manual_seed(0)
    text = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}  # fmt: skip
    maria = {"text_pooling": "first", "text_head": "mlp", "vision_head": "mlp", "loss_margin": 0.5}
    fields = maria | {"freeze_text_tower": False, "freeze_vision_tower": False, "text_pooling_layers": 2} | fields
    config = XMatchingConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=12,
        head_hidden_sizes=[20],
        head_dropout=dropout,
        loss_type=loss_type,
        **fields,
    )
    return XMatchingModel(config).train()


def batch(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 7, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(3, 40, (rows, 6), generator=generator),
        "attention_mask": (torch.arange(6) < lengths).long(),
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "image_ids": torch.arange(rows) // 2 * (torch.arange(rows) % 3),  # some rows show the same picture
    }


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def plain_step(model, inputs):
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_every_gradient_are_those_of_the_plain_step(loss_type, chunk_size):
    model = tiny(loss_type)
    model.hardness = 0.4
    expected = plain_step(copy.deepcopy(model), batch())
    loss = cached_step(model, batch(), chunk_size)
    assert expected[0] > 0 and not loss.requires_grad
    assert_same((loss, gradients(model)), expected)


@pytest.mark.parametrize("loss_type", ["info_nce", "hinge"])
def test_with_dropout_one_chunk_is_the_plain_step_and_leaves_the_same_random_state(loss_type):
    model = tiny(loss_type, dropout=0.3)
    torch.manual_seed(7)
    expected = plain_step(copy.deepcopy(model), batch())
    after = torch.get_rng_state()
    torch.manual_seed(7)
    loss = cached_step(model, batch(), ROWS)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same((loss, gradients(model)), expected)
    torch.manual_seed(8)
    assert not torch.allclose(cached_step(model, batch(), ROWS), loss)  # there is dropout


def test_dropout_repeats_in_the_second_pass():
    """With several chunks: the embeddings that got the gradients are those that the loss was computed from."""
    model, seen = tiny(dropout=0.3), []

    def record(module, inputs, output):
        seen.append(output.text_embeds.detach().clone())

    model.register_forward_hook(record)
    cached_step(model, batch(), 4)
    assert [len(embeds) for embeds in seen] == [4, 4, 2] * 2
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


def test_kept_states_of_frozen_towers():
    model = tiny(freeze_text_tower=True, freeze_vision_tower=True)
    inputs = batch()
    with torch.no_grad():
        kept = {
            "text_states": model.pool_text(inputs["input_ids"], inputs["attention_mask"])[1],
            "image_states": model.pool_image(inputs["pixel_values"])[1],
            "image_ids": inputs["image_ids"],
        }
    expected = plain_step(copy.deepcopy(model), inputs)
    assert_same((cached_step(model, kept, 4), gradients(model)), expected)


def test_gradients_are_averaged_over_processes_in_the_last_chunk_only():
    model, events = tiny(), []

    @contextlib.contextmanager
    def no_sync():
        events.append("held back")
        yield
        events.append("done")

    def backward(scalar):
        events.append("backward")
        scalar.backward()

    cached_step(model, batch(), 4, backward=backward, no_sync=no_sync)
    assert events == ["held back", "backward", "done"] * 2 + ["backward"]


class Kept:
    """A tensor that autograd keeps for the backward pass; counts the activations (rows, tokens, width) alive at once."""

    alive = largest = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel() if tensor.ndim > 2 else 0  # (B, B) scores are no activations
        Kept.alive += self.size
        Kept.largest = max(Kept.largest, Kept.alive)

    def __del__(self):
        Kept.alive -= self.size


def largest_graph(step, rows):
    Kept.alive = Kept.largest = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step(tiny(), batch(rows))
    return Kept.largest


def test_no_more_than_a_chunk_is_ever_in_a_graph():
    small, large = (largest_graph(lambda model, inputs: cached_step(model, inputs, 4), rows) for rows in (8, 32))
    assert small == large > 0
    assert largest_graph(plain_step, 32) > 3 * largest_graph(plain_step, 8)  # the measure sees what it should


def test_batch_norms_that_train_are_found_and_their_statistics_move_once_a_chunk():
    model = tiny(vision=RESNET)
    found = batch_statistics(model)
    assert len(found) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 0
    reference = copy.deepcopy(model)
    cached_step(model, batch(), ROWS)
    plain_step(reference, batch())
    for name, value in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value, msg=name)
    assert all(layer.track_running_stats for layer in found)
    cached_step(model, batch(), 5)
    assert {layer.num_batches_tracked.item() for layer in found} == {3}
    assert batch_statistics(tiny(vision=RESNET, freeze_vision_tower=True)) == []
    assert batch_statistics(tiny()) == []


def make_trainer(model, tmp_path, **options):
    options = {"per_device_train_batch_size": ROWS, "gradient_cache_chunk_size": 3} | options
    args = XMatchingTrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    rows = [{name: value[i] for name, value in batch().items()} for i in range(ROWS)] * 2
    return XMatchingTrainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True, "max_steps": 1}], ids=str)
def test_the_trainer_with_it_trains_the_same_model(tmp_path, options):
    options = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, **options}
    trained, logs = [], []
    for chunk_size in (None, 3):
        trainer = make_trainer(tiny(), tmp_path, gradient_cache_chunk_size=chunk_size, **options)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        trained.append(trainer.model.state_dict())
        logs.append([entry for entry in trainer.state.log_history if "grad_norm" in entry])
    # bfloat16: every row is rounded alike, but a chunk's gradient is rounded before it is added to the others'
    tolerance = 1e-3 if options.get("bf16") else 1e-5
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=tolerance, rtol=tolerance, msg=name)
    assert any((value - before[name]).abs().max() > 10 * tolerance for name, value in trained[0].items())
    for plain, cached in zip(*logs, strict=True):
        assert cached["loss"] == pytest.approx(plain["loss"], rel=tolerance)
        assert cached["grad_norm"] == pytest.approx(plain["grad_norm"], rel=10 * tolerance)


def test_a_batch_that_fits_a_chunk_takes_the_plain_step(tmp_path, monkeypatch):
    monkeypatch.setattr("imagedex.training.dual_encoder.trainer.cached_step", None)
    make_trainer(tiny(), tmp_path, gradient_cache_chunk_size=ROWS, max_steps=1).train()


def test_batch_statistics_of_chunks_are_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        make_trainer(tiny(vision=RESNET), tmp_path, max_steps=2).train()
    assert caplog.text.count("batch norms train on the statistics of a chunk of 3 rows, not of the batch") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        make_trainer(tiny(), tmp_path, max_steps=1).train()
    assert not caplog.text


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused_in_one_line(tmp_path, monkeypatch, sharded):
    create = XMatchingTrainer.create_accelerator_and_postprocess

    def create_sharded(self):
        create(self)
        setattr(self, sharded, True)

    monkeypatch.setattr(XMatchingTrainer, "create_accelerator_and_postprocess", create_sharded)
    with pytest.raises(UserError, match="--gradient_cache_chunk_size works on one device and with DDP"):
        make_trainer(tiny(), tmp_path)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="--gradient_cache_chunk_size 0: give 1"):
        check_bounds(XMatchingTrainingArguments, {"gradient_cache_chunk_size": 0})
    with pytest.raises(ValueError, match="--hardest_warmup_steps -1: give 0"):
        check_bounds(XMatchingTrainingArguments, {"hardest_warmup_steps": -1})


# --- the warm-up of the hardest negative


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [1, 1, 1]), (0.1, [0, 1, 1]), (4, [0, 0.25, 0.5]), (0.4, [0, 0.25, 0.5]), (1, [0, 1, 1])],
)
def test_hardness_rises_linearly(tmp_path, warmup, expected):
    trainer = make_trainer(tiny(), tmp_path, hardest_warmup_steps=warmup)
    found = []
    for step in range(3):
        trainer.state = TrainerState(global_step=step, max_steps=10)
        found.append(trainer.hardness())
    assert found == expected
    trainer.state = TrainerState(global_step=10, max_steps=10)
    assert trainer.hardness() == 1


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_every_step_trains_with_its_hardness_and_the_model_is_left_with_1(tmp_path, monkeypatch, chunk_size):
    seen, compute_loss = [], XMatchingModel.compute_loss

    def record(self, *batch):
        seen.append((self.hardness, self.training))
        return compute_loss(self, *batch)

    monkeypatch.setattr(XMatchingModel, "compute_loss", record)
    model = tiny("hardest_hinge")
    options = {"max_steps": 5, "hardest_warmup_steps": 4, "gradient_cache_chunk_size": chunk_size}
    make_trainer(model, tmp_path, **options).train()
    assert seen == [(0, True), (0.25, True), (0.5, True), (0.75, True), (1, True)]
    assert model.hardness == 1
