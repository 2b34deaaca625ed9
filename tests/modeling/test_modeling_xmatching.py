"""XMatchingModel: what it computes, what learns and what does not, what survives saving."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, BertModel, CLIPConfig, CLIPModel

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.modeling_xmatching import XMatchingModel

VISION_TOWERS = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 32, "patch_size": 16},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "swin": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}  # fmt: skip
TEXT_TOWERS = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    "t5": {"d_model": 16, "num_layers": 4, "num_heads": 2, "d_kv": 8, "d_ff": 32},
    "distilbert": {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32},
}
LOSSES = ["paired_hinge", "hinge", "hardest_hinge", "info_nce", "sigmoid"]


# Maria's: every part of the model is in use
MARIA = {"text_pooling": "first", "text_pooling_layers": 4, "text_head": "mlp", "vision_head": "mlp", "head_dropout": 0.2,
         "loss_type": "paired_hinge", "loss_margin": 0.5}  # fmt: skip


def tiny(text="bert", vision="resnet", **fields):
    torch.manual_seed(0)
    fields = MARIA | {"projection_dim": 12, "head_hidden_sizes": [20, 20]} | fields
    return XMatchingModel(
        XMatchingConfig(
            text_config={"model_type": text, "vocab_size": 40, **TEXT_TOWERS[text]},
            vision_config={"model_type": vision, **VISION_TOWERS[vision]},
            **fields,
        )
    )


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, 40, (size, 6), generator=generator),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]] * (size // 2)),
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "image_ids": torch.arange(size),
    }


def test_a_head_takes_the_power_of_its_state_and_the_power_travels(tmp_path):
    fields = {"vision_head": "linear", "text_head": "linear", "freeze_vision_tower": False}
    model = tiny(vision_head_power=0.5, **fields).eval()
    states = torch.tensor([[-4.0, 9.0, 0.0, 0.25] * 4])
    layer = model.vision_head.layers[0]
    expected = layer.weight @ torch.tensor([-2.0, 3.0, 0.0, 0.5] * 4) + layer.bias
    torch.testing.assert_close(model.vision_head(states)[0], expected)
    model.save_pretrained(tmp_path)
    assert XMatchingModel.from_pretrained(tmp_path).vision_head.power == 0.5
    output = model.train()(**batch())  # ReLU leaves exact zeros, where a root has no slope
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.vision_model.parameters() if p.grad is not None)
    with pytest.raises(Exception, match="text_head_power=0"):  # transformers wraps what a config says
        tiny(text_head_power=0)


def test_a_linear_head_starts_as_the_identity_where_the_widths_agree():
    model = tiny(text_pooling_layers=1, text_head="linear", vision_head="linear", projection_dim=16, vision="vit")
    for head in (model.text_head, model.vision_head):
        assert torch.equal(head.layers[0].weight, torch.eye(16)) and not head.layers[0].bias.any()
    wider = tiny(text_pooling_layers=2, text_head="linear", vision_head="mlp", projection_dim=20, vision="vit")
    for layer in (wider.text_head.layers[0], *wider.vision_head.layers):  # the middle one of the mlp is square
        bound = layer.in_features**-0.5
        assert bound / 2 < layer.weight.abs().max() <= bound and bound / 4 < layer.bias.abs().max() <= bound
        assert layer.weight.diagonal().mean().abs() < bound / 2


@pytest.mark.parametrize("vision", VISION_TOWERS)
@pytest.mark.parametrize("text", TEXT_TOWERS)
def test_every_tower_gives_unit_embeddings_of_the_same_width(text, vision):
    inputs = batch()
    output = tiny(text, vision).eval()(**inputs)
    for embeds in (output.text_embeds, output.image_embeds):
        assert embeds.shape == (4, 12)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(output.logits_per_text, output.text_embeds @ output.image_embeds.T)
    torch.testing.assert_close(output.logits_per_image, output.logits_per_text.T)


def test_the_sentence_vector_is_the_first_token_of_the_last_four_layers_through_the_head():
    """Against the same arithmetic written out on transformers' BertModel."""
    model, inputs = tiny().eval(), batch()
    bert = BertModel(model.config.text_config, add_pooling_layer=False).eval()
    bert.load_state_dict(model.text_model.state_dict())
    with torch.no_grad():
        states = bert(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
        pooled = torch.cat([states[-4][:, 0], states[-3][:, 0], states[-2][:, 0], states[-1][:, 0]], dim=-1)  # (4, 64)
        first, second, third = model.text_head.layers
        expected = third(second(first(pooled).relu()).relu())
        expected = expected / expected.norm(dim=-1, keepdim=True)
        found = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(found, expected)


def test_mean_pooling_leaves_padding_out():
    model = tiny(text_pooling="mean", text_pooling_layers=1, text_head="none", projection_dim=16).eval()
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    padded = model.get_text_features(ids, torch.tensor([[1, 1, 1, 0, 0]]))
    alone = model.get_text_features(ids[:, :3], torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(padded.pooler_output, alone.pooler_output, atol=1e-5, rtol=1e-5)
    by_hand = F.normalize(alone.last_hidden_state.mean(1), dim=-1)
    torch.testing.assert_close(alone.pooler_output, by_hand)


@pytest.mark.parametrize("vision", VISION_TOWERS)
def test_vision_pooling(vision):
    inputs = batch()
    for pooling in ("pooler", "first", "mean"):
        model = tiny(vision=vision, vision_pooling=pooling, vision_head="linear").eval()
        tower = model.vision_model(inputs["pixel_values"])
        states = tower.last_hidden_state
        if pooling == "mean":
            pooled = states.flatten(2).mean(-1) if states.ndim == 4 else states.mean(1)
        elif pooling == "first" and states.ndim == 3:
            pooled = states[:, 0]
        elif pooling == "pooler" and getattr(tower, "pooler_output", None) is not None:
            pooled = tower.pooler_output.flatten(1)
        else:
            pooled = states.flatten(2).mean(-1) if states.ndim == 4 else states[:, 0]
        expected = F.normalize(model.vision_head.layers[0](pooled), dim=-1)
        torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output, expected)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("freeze_text", [True, False])
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_one_step_moves_every_trainable_parameter_and_nothing_frozen(loss_type, freeze_text, freeze_vision):
    model = tiny(
        loss_type=loss_type, freeze_text_tower=freeze_text, freeze_vision_tower=freeze_vision, loss_margin=2.0
    ).train()
    frozen = {"text_model": freeze_text, "vision_model": freeze_vision}
    before = copy.deepcopy(model.state_dict())  # buffers too: batch statistics of a frozen tower must not move
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = batch(32) | {"input_ids": torch.arange(32 * 6).view(32, 6) % 40}
    # every position, so that every row of the position table is used
    inputs["attention_mask"] = torch.ones(32, 6, dtype=torch.long)
    model(**inputs).loss.backward()
    optimizer.step()
    unused = ("position_embeddings", "token_type_embeddings")  # rows of these tables that six tokens never look up
    for name, value in model.state_dict().items():
        moved = not torch.equal(value, before[name])
        is_frozen = frozen.get(name.split(".")[0], False)
        if is_frozen:
            assert not moved, f"{name} is frozen and moved"
        elif name in dict(model.named_parameters()):
            rows = before[name] != value
            assert moved, f"{name} did not move"
            if name.endswith("embeddings.weight") and not any(part in name for part in unused):
                assert rows[1:].any(dim=1).all(), f"some rows of {name} did not move"  # row 0 is the padding
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != frozen.get(name.split(".")[0], False), name


def test_a_frozen_tower_stays_in_evaluation_mode():
    model = tiny(freeze_text_tower=True, freeze_vision_tower=False).train()
    assert not any(module.training for module in model.text_model.modules())
    assert model.vision_model.training and model.text_head.training
    first, second = (
        model.get_text_features(**{k: batch()[k] for k in ("input_ids", "attention_mask")}) for _ in range(2)
    )
    torch.testing.assert_close(first.last_hidden_state, second.last_hidden_state, atol=0, rtol=0)  # no dropout inside


@pytest.mark.parametrize("loss_type", LOSSES)
def test_saved_and_loaded_gives_identical_vectors(tmp_path, loss_type):
    model = tiny(loss_type=loss_type, freeze_vision_tower=False).eval()
    model.save_pretrained(tmp_path)
    loaded = XMatchingModel.from_pretrained(tmp_path)
    with torch.no_grad():
        before, after = model(**batch()), loaded(**batch())
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert torch.equal(before.image_embeds, after.image_embeds)
    assert torch.equal(before.loss, after.loss)
    # what was frozen is frozen after loading
    assert not any(p.requires_grad for p in loaded.text_model.parameters())
    assert all(p.requires_grad for p in loaded.vision_model.parameters())
    config = loaded.config
    assert (config.loss_type, config.freeze_text_tower, config.freeze_vision_tower) == (loss_type, True, False)


def test_pretrained_towers_come_in_unchanged(tmp_path):
    text = BertModel(AutoConfig.for_model("bert", vocab_size=40, **TEXT_TOWERS["bert"]))
    text.save_pretrained(tmp_path / "text")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 16}))
    clip.save_pretrained(tmp_path / "clip")
    model = XMatchingModel.from_text_vision_pretrained(tmp_path / "text", tmp_path / "clip", projection_dim=8)
    for name, value in model.text_model.state_dict().items():
        assert torch.equal(value, text.state_dict()[name]), name
    original = clip.vision_model.state_dict()
    for name, value in model.vision_model.state_dict().items():
        assert torch.equal(value, original[name.removeprefix("vision_model.")]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_towers_saved_in_half_precision_train_in_float32(tmp_path, dtype):
    text = BertModel(AutoConfig.for_model("bert", vocab_size=40, **TEXT_TOWERS["bert"])).to(dtype)
    text.save_pretrained(tmp_path / "text")
    vision = AutoConfig.for_model("vit", **VISION_TOWERS["vit"])
    AutoModel.from_config(vision).to(dtype).save_pretrained(tmp_path / "vision")
    model = XMatchingModel.from_text_vision_pretrained(tmp_path / "text", tmp_path / "vision", projection_dim=8)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(**batch()).loss.isfinite()
    for name, value in text.state_dict().items():
        assert name.startswith("pooler") or torch.equal(model.text_model.state_dict()[name], value.float()), name
    model.save_pretrained(tmp_path / "saved")
    assert XMatchingModel.from_pretrained(tmp_path / "saved").dtype == torch.float32


def test_captions_of_one_picture_are_no_negatives_unless_asked():
    inputs = batch() | {"image_ids": torch.tensor([0, 0, 0, 0])}
    masked = tiny(loss_type="info_nce").eval()
    assert masked(**inputs).loss.item() == pytest.approx(0.0, abs=1e-6)
    parity = tiny(loss_type="info_nce", mask_same_image=False).eval()
    assert parity(**inputs).loss.item() > 0.1


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = tiny(freeze_text_tower=False, freeze_vision_tower=False, vision="vit", head_dropout=0.0).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**batch()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


def test_bf16_and_eager_attention_agree_with_the_default(tmp_path):
    model = tiny(vision="vit").eval()
    model.save_pretrained(tmp_path)
    assert model.text_model.config._attn_implementation == "sdpa"
    eager = XMatchingModel.from_pretrained(tmp_path, attn_implementation="eager")
    half = XMatchingModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).text_embeds
        torch.testing.assert_close(eager(**inputs).text_embeds, expected, atol=1e-5, rtol=1e-4)
        found = half(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).text_embeds
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), expected).min() > 0.99


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_is_computed_in_float32_under_autocast(loss_type):
    model = tiny(loss_type=loss_type, vision="vit").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch())
    expected = model.compute_loss(output.text_embeds.float(), output.image_embeds.float(), batch()["image_ids"])
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected)


def test_one_side_alone_gives_its_embeddings_and_the_tuple_form_keeps_the_order():
    model, inputs = tiny().eval(), batch()
    both = model(**inputs)
    assert torch.equal(
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds, both.text_embeds
    )
    assert torch.equal(model(pixel_values=inputs["pixel_values"]).image_embeds, both.image_embeds)
    assert torch.equal(model(**inputs, return_dict=False)[0], both.loss)


def test_states_are_returned_to_those_who_ask_alone():
    model, inputs = tiny(vision="vit").eval(), batch()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    alone = {"loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"}
    assert set(model(**inputs)) == alone == set(model(**inputs, output_hidden_states=False))
    features = model.get_text_features(**text)  # four layers are pooled, so the tower gives all of them
    assert set(features) == {"last_hidden_state", "pooler_output"}

    asked = model(**inputs, output_hidden_states=True)
    assert set(asked) == alone | {"text_model_output", "vision_model_output"}
    states = model.text_model(**text, output_hidden_states=True).hidden_states
    for output in (asked.text_model_output, model.get_text_features(**text, output_hidden_states=True)):
        assert all(torch.equal(*pair) for pair in zip(output.hidden_states, states, strict=True))
    assert len(asked.vision_model_output.hidden_states) == 3 and "attentions" not in asked.text_model_output
    model.config.output_hidden_states = True
    assert len(model(**inputs).vision_model_output.hidden_states) == 3
    assert "hidden_states" not in model.get_text_features(**text, output_hidden_states=False)
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True, output_hidden_states=False).text_model_output
    assert attentions.attentions[0].shape == (4, 2, 6, 6) and "hidden_states" not in attentions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_pooling_layers": 9}, "text tower has 4 layers"),
        ({"text_head": "none"}, "projection_dim is 12"),
        ({"loss_margin": 0.0}, "margin must be above 0"),
        ({"loss_type": "nonsense"}, "loss_type"),
    ],
)
def test_wrong_configs_say_what_is_wrong(fields, message):
    with pytest.raises(Exception, match=message):
        tiny(**fields)
