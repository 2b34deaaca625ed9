"""What CodebookT5 and VisionGroundedT5 share: text as in T5, pictures that matter, checkpoints, generation, the Trainer."""

import copy

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    CLIPModel,
    LogitsProcessor,
    LogitsProcessorList,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    ViTModel,
)

from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5

KINDS = [
    ("codebook_t5", {}),
    ("codebook_t5", {"quantization": "learned"}),
    ("codebook_t5", {"visual_token_selection": "merge"}),
    ("vision_grounded_t5", {}),
]
kinds = pytest.mark.parametrize(("kind", "fields"), KINDS)
both = pytest.mark.parametrize("model_class", [CodebookT5, VisionGroundedT5])
LABELS = torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1], [5, 1, -100, -100], [8, 6, 1, -100], [9, 9, 9, 1]])


def rows_of(batch, text, pictures):
    return {
        "input_ids": batch["input_ids"][text],
        "attention_mask": batch["attention_mask"][text],
        "pixel_values": batch["pixel_values"][pictures],
    }


@kinds
def test_text_rows_are_what_stock_t5_makes_of_them(tiny_picture_t5, picture_batch, t5_fields, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    stock = T5ForConditionalGeneration(T5Config(**t5_fields, decoder_start_token_id=0)).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and {name.split(".")[0] for name in unexpected} <= {
        "vision_model",
        "codebook",
        "vision_projection",
    }
    text = {name: picture_batch[name] for name in ("input_ids", "attention_mask")}
    found, expected = model(**text, labels=LABELS[:3]), stock(**text, labels=LABELS[:3])
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(
        model.generate(**text, num_beams=3, max_new_tokens=4), stock.generate(**text, num_beams=3, max_new_tokens=4)
    )


@kinds
def test_a_mixed_batch_is_its_rows_encoded_alone(tiny_picture_t5, picture_batch, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    with torch.no_grad():
        mixed = model(**picture_batch, labels=LABELS)
        logits, losses = [], []
        for row in range(3):
            length = int(picture_batch["attention_mask"][row].sum())
            output = model(input_ids=picture_batch["input_ids"][row : row + 1, :length], labels=LABELS[row : row + 1])
            logits.append(output.logits)
            losses.append(output.loss * (LABELS[row] != -100).sum())
        for row in range(2):
            output = model(pixel_values=picture_batch["pixel_values"][row : row + 1], labels=LABELS[3 + row : 4 + row])
            logits.append(output.logits)
            quantizer_loss = getattr(output, "quantizer_loss", None) or 0
            losses.append((output.loss - quantizer_loss) * (LABELS[3 + row] != -100).sum())
        tokens = (LABELS != -100).sum()
    torch.testing.assert_close(mixed.logits, torch.cat(logits), atol=1e-4, rtol=1e-4)
    quantizer_loss = getattr(mixed, "quantizer_loss", None) or 0
    torch.testing.assert_close(mixed.loss - quantizer_loss, sum(losses) / tokens, atol=1e-4, rtol=1e-4)


@kinds
def test_generate_writes_what_forward_says(tiny_picture_t5, picture_batch, kind, fields):
    """Token by token, without a cache, for sentences and pictures in one batch."""
    model = tiny_picture_t5(kind, **fields).eval()
    output = model.generate(
        **picture_batch, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    written = torch.zeros(5, 1, dtype=torch.long)
    for step in range(4):
        with torch.no_grad():
            logits = model(**picture_batch, decoder_input_ids=written).logits[:, -1]
        torch.testing.assert_close(output.logits[step], logits, atol=1e-4, rtol=1e-4)
        allowed = logits.clone()
        allowed[:, 1] = float("-inf")  # min_new_tokens
        written = torch.cat([written, allowed.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(output.sequences, written)


@kinds
def test_the_picture_matters(tiny_picture_t5, picture_batch, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    flags = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    pictures = picture_batch["pixel_values"]
    first, second = model.generate(pixel_values=pictures, **flags).logits[0]
    assert (first - second).abs().max() > 1e-2
    swapped = model.generate(pixel_values=pictures.flip(0), **flags).logits[0]
    torch.testing.assert_close(swapped, torch.stack([second, first]), atol=1e-5, rtol=1e-5)


@kinds
def test_kept_states_stand_for_the_pictures(tiny_picture_t5, picture_batch, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    states = model.vision_states(picture_batch["pixel_values"])
    assert states.shape == (2, 17, 32)
    text = {name: picture_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, found = model(**picture_batch, labels=LABELS), model(**text, image_states=states, labels=LABELS)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(
        model.generate(**text, image_states=states, max_new_tokens=3, num_beams=2),
        model.generate(**picture_batch, max_new_tokens=3, num_beams=2),
    )


class OnlyTokens(LogitsProcessor):
    def __init__(self, allowed):
        self.allowed = allowed

    def __call__(self, input_ids, scores):
        constrained = torch.full_like(scores, float("-inf"))
        constrained[:, self.allowed] = scores[:, self.allowed]
        return constrained


@kinds
def test_beams_of_a_batch_are_the_beams_of_each_row(tiny_picture_t5, picture_batch, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    flags = {
        "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 3, "length_penalty": 0.0,
        "logits_processor": LogitsProcessorList([OnlyTokens([1, 20, 21, 22])]),
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    together = model.generate(**picture_batch, **flags)
    assert together.sequences.shape[0] == 20
    assert set(together.sequences.unique().tolist()) <= {0, 1, 20, 21, 22}
    alone = [
        model.generate(picture_batch["input_ids"][:1], attention_mask=picture_batch["attention_mask"][:1], **flags),
        model.generate(pixel_values=picture_batch["pixel_values"][1:], **flags),
    ]
    for place, output in zip((slice(0, 4), slice(16, 20)), alone, strict=True):
        torch.testing.assert_close(together.sequences_scores[place], output.sequences_scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(together.sequences[place][:, : output.sequences.shape[1]], output.sequences)


@kinds
@pytest.mark.parametrize("frozen", [True, False])
def test_saved_and_loaded_it_is_the_same_model(tiny_picture_t5, picture_batch, tmp_path, kind, fields, frozen):
    model = tiny_picture_t5(kind, freeze_vision_tower=frozen, **fields).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(AutoModel.from_pretrained(tmp_path)) is type(model)
    with torch.no_grad():
        expected, found = model(**picture_batch, labels=LABELS), loaded(**picture_batch, labels=LABELS)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    frozen = frozen or (kind == "codebook_t5" and "quantization" not in fields)  # no gradient passes a fixed choice
    assert {p.requires_grad for p in loaded.vision_model.parameters()} == {not frozen}
    still = {name for name, p in loaded.named_parameters() if not p.requires_grad} - {"codebook.words"}
    assert all(name.startswith("vision_model.") for name in still)
    loaded.train()
    assert loaded.vision_model.training is not frozen


LEARNING = [("codebook_t5", {"quantization": "learned"}), ("vision_grounded_t5", {})]


def moved(model, batch, steps=2) -> set[str]:
    """Names of what changes in the vision tower in as many steps, `train()` before each as in a Trainer."""
    before = copy.deepcopy(model.vision_model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        model(**batch, labels=LABELS).loss.backward()
        optimizer.step()
    return {name for name, value in model.vision_model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(("kind", "fields"), LEARNING)
@pytest.mark.parametrize("where", ["made", "loaded"])
def test_what_is_unfrozen_afterwards_trains_and_the_rest_does_not(
    tiny_picture_t5, picture_batch, tmp_path, kind, fields, where
):
    model = tiny_picture_t5(kind, **fields)
    if where == "loaded":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    assert model.vision_is_frozen and not moved(model, picture_batch)
    assert model.training and not any(module.training for module in model.vision_model.modules())
    unfrozen = "layernorm.weight"
    model.vision_model.get_parameter(unfrozen).requires_grad_(True)
    assert moved(model, picture_batch) == {unfrozen} and not model.vision_is_frozen
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "query"])
    peft.inject_adapter_in_model(config, model.vision_model)
    adapters = {name for name, _ in model.vision_model.named_parameters() if "lora_" in name}
    assert len(adapters) == 4 and adapters <= moved(model, picture_batch)  # A and B of either layer


@pytest.mark.parametrize(("kind", "fields"), LEARNING)
def test_the_statistics_of_a_frozen_tower_stay(t5_fields, picture_batch, kind, fields):
    """Frozen as a whole, and of a tower in training those of the batch norms that are frozen."""
    tower = {"model_type": "resnet"} | TOWERS["resnet"][0]
    model_class = {"codebook_t5": CodebookT5, "vision_grounded_t5": VisionGroundedT5}[kind]
    model = model_class.from_t5_vision_pretrained(t5_config=t5_fields, vision_config=tower, **fields)
    assert not moved(model, picture_batch)
    norms = [name for name, m in model.vision_model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    model.vision_model.get_submodule(norms[-1]).requires_grad_(True)
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert moved(model, picture_batch) == {f"{norms[-1]}.{part}" for part in parts}


COMPILED = [  # kind, selection of patches, quantization, in training
    ("codebook_t5", "random", "fixed", True),
    ("codebook_t5", "random", "learned", False),
    ("codebook_t5", "even", "learned", True),
    ("vision_grounded_t5", None, None, True),
]


@pytest.mark.parametrize(("kind", "selection", "quantization", "training"), COMPILED)
def test_torch_compile_makes_one_graph_of_the_forward_pass(
    tiny_picture_t5, picture_batch, kind, selection, quantization, training
):
    fields = {"visual_token_selection": selection, "quantization": quantization} if selection else {}
    model = tiny_picture_t5(kind, t5={"num_layers": 1}, vit={"num_hidden_layers": 1}, **fields).train(training)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(**picture_batch, labels=LABELS)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@both
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_t5_checkpoint_loads_into_it(tmp_path, picture_batch, t5_fields, vit_fields, model_class, version):
    """Version 1.1 has a gated feed-forward layer and an output layer of its own; its outputs are not scaled."""
    torch.manual_seed(3)
    if version == "1.1":
        t5_fields |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    stock = T5ForConditionalGeneration(T5Config(**t5_fields, decoder_start_token_id=0)).eval()
    if version == "1.1":
        stock.lm_head.weight = torch.nn.Parameter(torch.randn_like(stock.lm_head.weight))
    stock.to(torch.bfloat16).save_pretrained(tmp_path / "t5")
    stock.float()
    tower = ViTModel(AutoConfig.for_model(**vit_fields), add_pooling_layer=False)
    tower.save_pretrained(tmp_path / "vit")
    model = model_class.from_t5_vision_pretrained(tmp_path / "t5", tmp_path / "vit").eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in tower.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value), name
    text = {name: picture_batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = stock(**text, labels=LABELS[:3]).logits
        torch.testing.assert_close(model(**text, labels=LABELS[:3]).logits, expected)
        model.save_pretrained(tmp_path / "again")
        again = model_class.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(again(**text, labels=LABELS[:3]).logits, expected)
    scratch = model_class.from_t5_vision_pretrained(tmp_path / "t5", vision_config=vit_fields).eval()
    torch.testing.assert_close(scratch(**text, labels=LABELS[:3]).logits, expected)
    assert all(torch.isfinite(p).all() and p.abs().sum() >= 0 for p in scratch.parameters())
    assert scratch.vision_model.embeddings.patch_embeddings.projection.weight.std() > 0


@both
def test_the_vision_half_of_clip(tmp_path, t5_fields, model_class, picture_batch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 16})).eval()
    clip.save_pretrained(tmp_path)
    model = model_class.from_t5_vision_pretrained(None, tmp_path, t5_config=t5_fields).eval()
    assert model.prefix_tokens == 1
    with torch.no_grad():
        expected = clip.vision_model(picture_batch["pixel_values"]).last_hidden_state
        torch.testing.assert_close(model.vision_states(picture_batch["pixel_values"]), expected)


TOWERS = {
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, 0, 16),
    "deit": ({"intermediate_size": 16}, 2, 18),
    "dinov2_with_registers": ({"num_register_tokens": 4}, 5, 21),
    "siglip_vision_model": ({"intermediate_size": 16}, 0, 16),
}
TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@both
@pytest.mark.parametrize("tower", TOWERS)
def test_other_towers(t5_fields, picture_batch, model_class, tower):
    """Class tokens, registers and feature maps: 16 patches each, of 16 channels, behind so many other states."""
    vision, prefix, states = TOWERS[tower]
    vision = {"model_type": tower} | vision | ({} if tower == "resnet" else TRANSFORMER)
    fields = {"quantization": "learned"} if model_class is CodebookT5 else {}
    model = model_class.from_t5_vision_pretrained(t5_config=t5_fields, vision_config=vision, **fields).eval()
    assert (model.vision_width, model.prefix_tokens) == (16, prefix)
    assert model.vision_states(picture_batch["pixel_values"]).shape == (2, states, 16)
    assert model(**picture_batch, labels=LABELS).loss.isfinite()
    if model_class is CodebookT5:
        assert model.visual_tokens(picture_batch["pixel_values"]).shape == (2, 17)  # 16 patches and end-of-sequence


@kinds
def test_activation_checkpointing_changes_no_gradient(tiny_picture_t5, picture_batch, kind, fields):
    grads = []
    for checkpointing in (False, True):
        model = tiny_picture_t5(kind, t5={"dropout_rate": 0.0}, freeze_vision_tower=False, **fields).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**picture_batch, labels=LABELS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name, atol=1e-5, rtol=1e-4)


@kinds
def test_half_precision_and_the_tuple_form(tiny_picture_t5, picture_batch, tmp_path, kind, fields):
    model = tiny_picture_t5(kind, **fields).eval()
    expected = model(**picture_batch, labels=LABELS)
    as_tuple = model(**picture_batch, labels=LABELS, return_dict=False)
    assert torch.equal(as_tuple[0], expected.loss) and torch.equal(as_tuple[1], expected.logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**picture_batch, labels=LABELS).loss.item() == pytest.approx(expected.loss.item(), rel=0.1)
    half = model.to(torch.bfloat16)
    pictures = picture_batch["pixel_values"].bfloat16()
    assert half(**picture_batch | {"pixel_values": pictures}, labels=LABELS).loss.isfinite()
    assert half.generate(pixel_values=pictures, max_new_tokens=2).shape == (2, 3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_half_precision_it_trains_writes_and_finds(
    tiny_picture_t5, picture_batch, tmp_path, kind, fields, dtype
):
    model = tiny_picture_t5(kind, t5={"dropout_rate": 0.0}, **fields).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    half = picture_batch | {"pixel_values": picture_batch["pixel_values"].to(dtype)}
    expected, found = model(**picture_batch, labels=LABELS).loss.item(), loaded(**half, labels=LABELS).loss
    assert found.item() == pytest.approx(expected, rel=0.02)
    found.backward()
    trained = {name: p.grad for name, p in loaded.named_parameters() if p.grad is not None}
    learns = {name for name, p in loaded.named_parameters() if name.startswith("codebook.") and p.requires_grad}
    assert trained.keys() >= learns
    assert all(gradient.isfinite().all() for gradient in trained.values())
    identifiers = Identifiers.from_sequences("naive", ["a", "b", "c"], [[5, 6], [5, 7], [8]], 1)
    _, rows = rank_identifiers(loaded, identifiers, half, num_beams=3)
    assert rows.sort(1).values.tolist() == [[0, 1, 2]] * 5


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "T5 comes from"),
        ({"t5_name_or_path": "a", "t5_config": {}}, "T5 comes from"),
        ({"t5_config": {}}, "vision tower comes from"),
    ],
)
def test_each_side_comes_from_one_place(model_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_class.from_t5_vision_pretrained(**arguments)


@both
def test_another_model_is_no_t5(model_class, tmp_path, vit_fields):
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model; a T5 is needed"):
        model_class.from_t5_vision_pretrained(tmp_path, vision_config=vit_fields)


@kinds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {}, "nothing to encode"),
        (lambda b: b | {"labels": LABELS[:3]}, "3 rows of labels for 5 rows of input"),
        (lambda b: b | {"image_states": torch.zeros(2, 17, 32)}, "not both"),
        (lambda b: {"image_states": torch.zeros(2, 17, 31)}, r"gives \(pictures, states, 32\)"),
    ],
)
def test_wrong_batches_say_what_is_wrong(tiny_picture_t5, picture_batch, kind, fields, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_picture_t5(kind, **fields)(**{"labels": LABELS} | change(picture_batch))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"index": index}


def collate(rows):
    """Even rows are sentences, odd ones pictures; the label tells which."""
    text = [row["index"] for row in rows if row["index"] % 2 == 0]
    pictures = [row["index"] for row in rows if row["index"] % 2]
    pixels = torch.stack([torch.full((3, 32, 32), i / 10) for i in pictures])
    return {
        "input_ids": torch.tensor([[10 + i, 1] for i in text]),
        "pixel_values": pixels,
        "labels": torch.tensor([[20 + i, 1] for i in text + pictures]),
    }


@kinds
def test_seq2seq_trainer_trains_and_generates(tiny_picture_t5, tmp_path, kind, fields):
    """The loss that Trainer reports is ours whatever the accumulation steps, and evaluation generates for mixed batches."""
    model = tiny_picture_t5(kind, t5={"dropout_rate": 0.0}, **fields)
    arguments = Seq2SeqTrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=5, gradient_accumulation_steps=2, learning_rate=0.0,
        logging_steps=1, predict_with_generate=True, per_device_eval_batch_size=5, use_cpu=True, save_strategy="no",
        generation_max_length=4, generation_num_beams=2, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), data_collator=collate)
    reported = trainer.train().training_loss
    ours = [model.eval()(**collate([{"index": i} for i in part])).loss.item() for part in (range(5), range(5, 10))]
    assert reported == pytest.approx(sum(ours) / 2, rel=0.1)
    predicted = trainer.predict(Rows())
    assert predicted.metrics["test_loss"] == pytest.approx(sum(ours) / 2, rel=1e-3)
    expected = model.generate(**collate([{"index": i} for i in range(5)]), max_length=4, num_beams=2)
    assert predicted.predictions[:5, : expected.shape[1]].tolist() == expected.tolist()
