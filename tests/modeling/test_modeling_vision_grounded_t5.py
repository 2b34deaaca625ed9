"""VisionGroundedT5: what the decoder attends to, what learns and what does not, and that a picture can be memorised."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, ViTModel

from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5

LABELS = torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1], [5, 1, -100, -100], [8, 6, 1, -100], [9, 9, 9, 1]])


@pytest.fixture
def tiny(tiny_picture_t5):
    return lambda **fields: tiny_picture_t5("vision_grounded_t5", **fields)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("projection", [True, False])
def test_the_decoder_attends_to_the_towers_states(tiny, picture_batch, t5_fields, projection, norm):
    """Stock ViT, a matrix product, T5's norm written out, and stock T5's decoder over it."""
    model = tiny(vision_projection=projection, vision_layer_norm=norm).eval()
    tower = ViTModel(model.config.vision_config, add_pooling_layer=False).eval()
    tower.load_state_dict(model.vision_model.state_dict())
    stock = T5ForConditionalGeneration(T5Config(**t5_fields, decoder_start_token_id=0)).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    if norm:
        torch.nn.init.uniform_(model.vision_projection.layer_norm.weight, 0.5, 2.0)
    assert any(name.startswith("vision_projection.linear") for name, _ in model.named_parameters()) is projection
    with torch.no_grad():
        states = tower(picture_batch["pixel_values"]).last_hidden_state  # (2, 17, 32), class token included
        if projection:
            linear = model.vision_projection.linear
            states = states @ linear.weight.T + linear.bias
        if norm:
            scale = model.vision_projection.layer_norm.weight
            states = states / states.square().mean(-1, keepdim=True).sqrt() * scale
        expected = stock(encoder_outputs=(states,), labels=LABELS[3:])
        found = model(pixel_values=picture_batch["pixel_values"], labels=LABELS[3:])
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_what_should_learn_and_nothing_else(tiny, picture_batch, frozen):
    """Pictures alone teach decoder, projection and (where not frozen) tower; sentences alone teach encoder and decoder."""
    model = tiny(freeze_vision_tower=frozen, t5={"dropout_rate": 0.0}).train()
    text = {name: picture_batch[name] for name in ("input_ids", "attention_mask")}

    def reached(**inputs):
        model.zero_grad()
        model(**inputs).loss.backward()
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return {part: {n for n in found if n.startswith(part)} for part in parts}, found

    parts = {
        part: {
            n for n, _ in model.named_parameters() if n.startswith(part) and not n.endswith(("key.bias", "k_proj.bias"))
        }
        for part in ("shared", "encoder", "decoder", "vision_projection", "vision_model")
    }
    found, everything = reached(pixel_values=picture_batch["pixel_values"], labels=LABELS[3:])
    assert parts["decoder"] <= found["decoder"] and parts["shared"] <= everything
    assert found["vision_projection"] == parts["vision_projection"] and not found["encoder"]
    assert not found["vision_model"] if frozen else parts["vision_model"] <= found["vision_model"]
    found, everything = reached(**text, labels=LABELS[:3])
    assert parts["encoder"] <= found["encoder"] and parts["decoder"] <= found["decoder"]
    assert not found["vision_projection"] and not found["vision_model"]
    assert any(p.requires_grad for p in model.vision_model.parameters()) is not frozen
    assert model.vision_model.training is not frozen


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_pictures_are_memorised_by_what_is_in_them(tiny, shuffled):
    """Sixteen pictures, sixteen identifiers. Where the pictures are shuffled each time there is nothing to memorise."""
    model = tiny(t5={"dropout_rate": 0.0}).train()
    generator = torch.Generator().manual_seed(0)
    states = model.vision_states(torch.randn(16, 3, 32, 32, generator=generator))
    labels = torch.stack(
        [torch.arange(16) // 4 + 10, torch.arange(16) % 4 + 20, torch.ones(16, dtype=torch.long)], dim=1
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(200):
        shown = states[torch.randperm(16, generator=generator)] if shuffled else states
        loss = model(image_states=shown, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = model.eval().generate(image_states=states, max_new_tokens=3)[:, 1:]
    memorised = (written[:, :3] == labels[:, : written.shape[1]]).all(1).float().mean().item()
    assert memorised < 0.4 if shuffled else memorised == 1.0


def test_widths_that_differ_need_the_projection(tiny, picture_batch):
    with pytest.raises(ValueError, match="16 channels and T5's decoder attends to 32: --vision_projection true"):
        tiny(vit={"hidden_size": 16}, vision_projection=False)
    model = tiny(vit={"hidden_size": 16})
    assert model(**picture_batch, labels=LABELS).loss.isfinite()


def test_the_projection_keeps_the_size_of_what_it_reads_at_the_start_and_is_loaded_as_it_was_saved(tiny, tmp_path):
    model = tiny(vit={"hidden_size": 256}, t5={"d_model": 128, "initializer_factor": 0.5})
    linear = model.vision_projection.linear
    assert linear.weight.std().item() == pytest.approx(0.5 / 16, rel=0.03)  # 32,768 draws: within 0.4 % in 2 of 3 cases
    assert not linear.bias.any() and (model.vision_projection.layer_norm.weight == 0.5).all()
    with torch.no_grad():
        for parameter in model.vision_projection.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = VisionGroundedT5.from_pretrained(tmp_path)
    for name, saved in model.vision_projection.state_dict().items():
        assert torch.equal(loaded.vision_projection.state_dict()[name], saved), name


def test_it_cannot_write_pictures(tiny, picture_batch):
    with pytest.raises(ValueError, match="VisionGroundedT5 cannot write pictures"):
        tiny()(**picture_batch, target_pixel_values=picture_batch["pixel_values"], labels=LABELS[:3])
