"""CodebookT5: which words a picture becomes, what learns and what does not, pictures as targets, identifiers added later."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration, ViTModel

from imagedex.configuration.configuration_codebook_t5 import CodebookT5Config
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.visual_codebook import codebook_statistics
from imagedex.training.tokenizer import train_tokenizer

SELECTIONS = ["random", "even", "attention", "merge"]
QUANTIZATIONS = ["fixed", "learned"]
LABELS = torch.tensor([[5, 6, 1, -100], [7, 8, 9, 1], [5, 1, -100, -100], [8, 6, 1, -100], [9, 9, 9, 1]])


@pytest.fixture
def tiny(tiny_picture_t5):
    return lambda **fields: tiny_picture_t5("codebook_t5", **fields)


def states_by_hand(model, pixel_values):
    tower = ViTModel(copy.deepcopy(model.config.vision_config), add_pooling_layer=False).eval()
    tower.set_attn_implementation("eager")  # the kernel that gives attention weights
    tower.load_state_dict(model.vision_model.state_dict())
    with torch.no_grad():
        return tower(pixel_values, output_attentions=True)


def word_by_hand(model, patch):
    """The first of the nearest words, one cosine after the other."""
    if model.config.quantization == "learned":
        patch, project = model.codebook.vision_projection(patch), model.codebook.word_projection
    else:
        project = torch.nn.Identity()
    best, best_cosine = None, -2.0
    for token in range(3, 60):
        cosine = torch.cosine_similarity(patch, project(model.shared.weight[token]), dim=0).item()
        if cosine > best_cosine:
            best, best_cosine = token, cosine
    return best


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_visual_tokens_written_out(tiny, picture_batch, selection, quantization):
    model = tiny(visual_token_selection=selection, quantization=quantization).eval()
    output = states_by_hand(model, picture_batch["pixel_values"])
    found = model.visual_tokens(picture_batch["pixel_values"])
    for row in range(2):
        patches = output.last_hidden_state[row, 1:]  # 16 of them
        words = [word_by_hand(model, patch) for patch in patches]
        if selection == "even":
            expected = [words[i] for i in (1, 3, 5, 7, 9, 11, 13, 15)]
        elif selection == "attention":
            seen = output.attentions[-1][row, :, 0, 1:].mean(0)
            expected = [words[i] for i in sorted(sorted(range(16), key=lambda i: -seen[i])[:8])]
        elif selection == "merge":
            runs = [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
            expected = [runs[int((slot + 0.5) * len(runs) / 8)] for slot in range(8)] if len(runs) > 8 else runs
        else:
            drawn = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:8].sort().values
            expected = [words[i] for i in drawn]
        length = len(expected)
        assert found[row, :length].tolist() == expected
        assert found[row, length].item() == 1 and not found[row, length + 1 :].any()  # end of sequence, then padding


def trained(model, batch, steps=3):
    """The model after a few large steps, which move its embeddings."""
    before = model.shared.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch, labels=LABELS).loss.backward()
        optimizer.step()
    assert (model.shared.weight - before).abs().max() > 0.1
    return model.eval()


def test_training_moves_no_picture_to_other_words(tiny, picture_batch, tmp_path):
    model = tiny(num_visual_tokens=17).eval()
    pictures, start = picture_batch["pixel_values"], copy.deepcopy(model.state_dict())
    before = model.visual_tokens(pictures)
    trained(model, picture_batch)
    assert torch.equal(model.visual_tokens(pictures), before)
    with torch.no_grad():
        patches = model.vision_states(pictures)[:, 1:].flatten(0, 1)
    now = torch.cosine_similarity(patches[:, None], model.shared.weight[None, 3:60], dim=-1).argmax(1) + 3
    assert not torch.equal(now, before[:, :-1].flatten()), "the embeddings as they are now say other words"
    model.save_pretrained(tmp_path)
    loaded = CodebookT5.from_pretrained(tmp_path)
    assert torch.equal(loaded.codebook.words, start["shared.weight"]) and torch.equal(
        loaded.visual_tokens(pictures), before
    )
    half = CodebookT5.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.codebook.words.dtype == torch.float32
    assert torch.equal(half.codebook.words, start["shared.weight"])


@pytest.mark.parametrize("embeddings", ["shared.weight", "encoder.embed_tokens.weight"])
def test_a_model_without_a_snapshot_starts_with_its_embeddings_as_they_are(tiny, picture_batch, tmp_path, embeddings):
    """Saved before there was one, or a plain T5; under whichever of the tied names its embeddings were saved."""
    model = trained(tiny(num_visual_tokens=17), picture_batch)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["codebook.words"]
    weights[embeddings] = weights.pop("shared.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = CodebookT5.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.codebook.words, model.shared.weight) and not loaded.codebook.words.requires_grad
    states = model.vision_states(picture_batch["pixel_values"])[:, 1:]
    cosines = torch.cosine_similarity(states[:, :, None], model.shared.weight[None, None, 3:60], dim=-1)
    assert torch.equal(loaded.visual_tokens(picture_batch["pixel_values"])[:, :-1], cosines.argmax(-1) + 3)


def test_the_codebook_of_a_pretrained_t5_is_its_embeddings(tmp_path, t5_fields, vit_fields):
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(**t5_fields, decoder_start_token_id=0))
    t5.save_pretrained(tmp_path)
    model = CodebookT5.from_t5_vision_pretrained(tmp_path, vision_config=vit_fields, num_codebook_words=50)
    assert torch.equal(model.codebook.words, t5.shared.weight[:50])


def test_random_patches_change_in_training_only(tiny, picture_batch):
    model = tiny(visual_token_selection="random", num_visual_tokens=5).train()
    pictures = picture_batch["pixel_values"]
    draws = {str(model.visual_tokens(pictures).tolist()) for _ in range(5)}
    assert len(draws) > 1
    model.eval()
    assert len({str(model.visual_tokens(pictures).tolist()) for _ in range(5)}) == 1


def test_of_few_patches_all_are_taken(tiny, picture_batch):
    for selection in SELECTIONS:
        tokens = (
            tiny(visual_token_selection=selection, num_visual_tokens=32)
            .eval()
            .visual_tokens(picture_batch["pixel_values"])
        )
        assert tokens.shape[1] <= 17 and (tokens == 1).sum(1).tolist() == [1, 1]
        if selection != "merge":
            assert tokens.shape == (2, 17) and tokens[:, -1].tolist() == [1, 1]


def test_merged_pictures_are_shorter_and_what_is_behind_them_is_not_read(tiny, picture_batch):
    """Two words in all: runs are long, rows of different lengths."""
    model = tiny(
        visual_token_selection="merge", num_visual_tokens=17, num_codebook_words=5, vit={"patch_size": 4}
    ).eval()
    pictures = torch.cat([torch.zeros(1, 3, 32, 32), picture_batch["pixel_values"]])
    ids = model.visual_tokens(pictures)
    lengths = (ids != 0).sum(1)
    assert lengths.min() < lengths.max()
    _, mask = model.encode(pixel_values=pictures)
    assert mask.sum(1).tolist() == lengths.tolist()
    for row in range(3):
        words = ids[row, : lengths[row] - 1]
        if len(words) < 16:  # no run was left out
            assert (words[1:] != words[:-1]).all()


def test_t5_reads_the_words_embeddings(tiny, picture_batch):
    """A picture row is the same as a text row of its visual tokens: both forms of the codebook."""
    for quantization in QUANTIZATIONS:
        model = tiny(quantization=quantization).eval()
        tokens = model.visual_tokens(picture_batch["pixel_values"])
        with torch.no_grad():
            as_text = model(input_ids=tokens, labels=LABELS[3:]).logits
            as_picture = model(pixel_values=picture_batch["pixel_values"], labels=LABELS[3:]).logits
        torch.testing.assert_close(as_picture, as_text)


def with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    ("fields", "vision_learns", "codebook_learns"),
    [
        ({"quantization": "fixed"}, False, False),
        ({"quantization": "fixed", "freeze_vision_tower": False}, False, False),
        ({"quantization": "learned"}, False, True),
        ({"quantization": "learned", "freeze_vision_tower": False}, True, True),
    ],
)
def test_gradients_reach_what_should_learn_and_nothing_else(
    tiny, picture_batch, selection, fields, vision_learns, codebook_learns
):
    model = tiny(visual_token_selection=selection, t5={"dropout_rate": 0.0}, **fields).train()
    before = copy.deepcopy(model.state_dict())
    pictures = {"pixel_values": picture_batch["pixel_values"], "labels": LABELS[3:]}
    loss = model(**pictures).loss
    loss.backward()
    reached = with_gradient(model)
    t5 = {n for n, _ in model.named_parameters() if not n.startswith(("vision_model.", "codebook."))}
    vision = {n for n, _ in model.named_parameters() if n.startswith("vision_model.")}
    codebook = {n for n, _ in model.named_parameters() if n.startswith("codebook.")}
    assert t5 <= reached
    # A key's bias shifts all scores of a query alike: softmax, and so the loss, cannot see it.
    vision = {n for n in vision if not n.endswith(("key.bias", "k_proj.bias"))}
    assert (vision <= reached) if vision_learns else not (vision & reached)
    assert (codebook <= reached and codebook) if codebook_learns else not (codebook & reached)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable >= reached and bool({n for n in trainable if n.startswith("vision_model.")}) == vision_learns

    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, value in model.state_dict().items():
        if name.startswith("vision_model.") and not vision_learns:
            assert torch.equal(value, before[name]), f"{name} is frozen and moved"
    assert not any(m.training for m in model.vision_model.modules()) or vision_learns


def test_words_learn_from_being_read_and_written_not_from_being_chosen(tiny, picture_batch):
    """The gradient of the word embeddings is that of a text row with the same tokens; the quantizer adds nothing to it."""
    gradients = []
    for quantization in QUANTIZATIONS:
        model = tiny(quantization=quantization, t5={"dropout_rate": 0.0}).eval()
        tokens = model.visual_tokens(picture_batch["pixel_values"])
        for inputs in ({"pixel_values": picture_batch["pixel_values"]}, {"input_ids": tokens}):
            model.zero_grad()
            model(**inputs, labels=LABELS[3:]).loss.backward()
            gradients.append(model.shared.weight.grad.clone())
        torch.testing.assert_close(gradients[-2], gradients[-1])


@pytest.mark.slow
def test_the_entropy_penalty_keeps_words_in_use(tiny):
    """Trained on the same pictures, the learned codebook without the penalty falls to few words."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(16, 3, 32, 32, generator=generator)
    labels = torch.stack([torch.arange(16) // 4 + 10, torch.arange(16) % 4 + 20, torch.ones(16, dtype=torch.long)], 1)
    perplexity = {}
    for weight in (0.0, 1.0):
        model = tiny(quantization="learned", codebook_entropy_weight=weight, t5={"dropout_rate": 0.0}).train()
        states = model.vision_states(pictures)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(150):
            output = model(image_states=states, labels=labels)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        perplexity[weight] = output.codebook_perplexity.item()
    assert perplexity[1.0] > 1.25 * perplexity[0.0]


def test_the_codebook_is_reported(tiny, picture_batch):
    model = tiny(quantization="learned").eval()
    output = model(**picture_batch, labels=LABELS)
    words = output.visual_token_ids[:, :-1]
    perplexity, usage = codebook_statistics(output.visual_token_ids, 60, [0, 1, 2])
    assert torch.equal(output.codebook_perplexity, perplexity) and torch.equal(output.codebook_usage, usage)
    assert usage.item() == pytest.approx(len(set(words.flatten().tolist())) / 57)
    token_loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), LABELS.flatten())
    torch.testing.assert_close(output.loss, token_loss + output.quantizer_loss)
    assert output.quantizer_loss > 0
    text = model(input_ids=picture_batch["input_ids"], labels=LABELS[:3])
    assert text.codebook_usage is None and text.quantizer_loss is None
    assert tiny().eval()(**picture_batch, labels=LABELS).quantizer_loss is None


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_picture_as_target(tiny, picture_batch, selection, quantization):
    """Rows: a caption, two identifiers that have to write their pictures, two pictures. Against labels put together here."""
    model = tiny(visual_token_selection=selection, quantization=quantization).eval()
    targets = picture_batch["pixel_values"].flip(0)
    given = LABELS[[0, 3, 4]]
    tokens = model.visual_tokens(targets)
    by_hand = torch.full((5, tokens.shape[1]), -100)
    by_hand[1:3] = tokens.masked_fill(tokens == 0, -100)
    by_hand[[0, 3, 4], :4] = given
    with torch.no_grad():
        expected = model(**picture_batch, labels=by_hand)
        found = model(**picture_batch, target_pixel_values=targets, labels=given)
        states = model.vision_states(targets)
        kept = model(**picture_batch, target_image_states=states, labels=given)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss) and torch.equal(kept.loss, expected.loss)
    alone = model(input_ids=picture_batch["input_ids"][1:], target_pixel_values=targets)
    assert alone.loss.isfinite() and alone.logits.shape[:2] == tokens.shape


def test_wrong_targets_say_what_is_wrong(tiny, picture_batch):
    model = tiny()
    for labels in (LABELS, LABELS[:1], None):
        with pytest.raises(ValueError, match="2 target pictures"):
            model(**picture_batch, target_pixel_values=picture_batch["pixel_values"], labels=labels)
    with pytest.raises(ValueError, match="leave them out"):
        model(
            **picture_batch,
            target_pixel_values=picture_batch["pixel_values"],
            labels=LABELS[:3],
            decoder_input_ids=LABELS[:, :2],
        )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_tokens_added_for_identifiers_are_no_words_and_leave_the_words_as_they_were(
    tiny, picture_batch, tmp_path, quantization
):
    model = tiny(quantization=quantization).eval()
    before = model.visual_tokens(picture_batch["pixel_values"])
    model.resize_token_embeddings(90)
    with torch.no_grad():  # each new token would win every comparison
        patches = model.vision_states(picture_batch["pixel_values"])[:, 1:].flatten(0, 1)
        model.shared.weight[60:] = patches[:30]
    assert torch.equal(model.visual_tokens(picture_batch["pixel_values"]), before)
    assert model(**picture_batch, labels=LABELS).logits.shape[-1] == 90
    model.save_pretrained(tmp_path)
    loaded = CodebookT5.from_pretrained(tmp_path)
    assert (loaded.config.vocab_size, loaded.config.num_codebook_words) == (90, 60)
    assert torch.equal(loaded.visual_tokens(picture_batch["pixel_values"]), before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_kept_words_stand_for_the_pictures(tiny, picture_batch, selection, training):
    """What is read, written and learned from words is to the bit what it is from pixels, draws included."""
    model = tiny(visual_token_selection=selection, t5={"dropout_rate": 0.0}).train(training)
    pictures = picture_batch["pixel_values"]
    words = model.kept_states(pictures)
    assert words.dtype == torch.int32 and words.shape == (2, 8 if selection == "attention" else 16)
    text = {name: picture_batch[name] for name in ("input_ids", "attention_mask")}
    outputs, gradients = [], []
    for inputs in (
        {"pixel_values": pictures, "target_pixel_values": pictures.flip(0)},
        {"image_states": words, "target_image_states": words.flip(0)},
    ):
        torch.manual_seed(3)
        model.zero_grad()
        outputs.append(model(**text, **inputs, labels=LABELS[[0, 3, 4]]))
        outputs[-1].loss.backward()
        gradients.append(model.shared.weight.grad.clone())
    assert torch.equal(outputs[0].visual_token_ids, outputs[1].visual_token_ids)
    assert torch.equal(outputs[0].logits, outputs[1].logits) and torch.equal(*gradients)
    if training and selection == "random":
        assert len({str(model.visual_tokens(image_states=words).tolist()) for _ in range(5)}) > 1
    model.eval()
    flags = {"max_new_tokens": 3, "num_beams": 2}
    assert torch.equal(model.generate(image_states=words, **flags), model.generate(pixel_values=pictures, **flags))


def test_words_stand_for_a_picture_of_a_fixed_codebook_alone(tiny):
    words = torch.full((2, 16), 5, dtype=torch.int32)
    for model, states in ((tiny(quantization="learned"), words), (tiny(), words[..., None])):
        with pytest.raises(ValueError, match="with quantization='fixed' alone"):
            model(image_states=states, labels=LABELS[:2])
    with pytest.raises(ValueError, match="16 patches in image_states"):
        tiny(visual_token_selection="attention")(image_states=words, labels=LABELS[:2])


def test_the_tokenizer_tells_which_tokens_are_words():
    tokenizer = train_tokenizer(["a dog in the snow", "two birds on a wire"] * 3, 60)
    size = len(tokenizer)
    expected = {"num_codebook_words": size, "codebook_special_token_ids": [0, 1, 2]}
    assert CodebookT5Config.codebook_fields(tokenizer) == expected
    tokenizer.add_tokens(["<image_0>", "<image_1>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_id_0>"]})
    assert len(tokenizer) == size + 3
    assert CodebookT5Config.codebook_fields(tokenizer) == expected


def test_attention_needs_its_own_states(tiny, picture_batch):
    model = tiny(visual_token_selection="attention").eval()
    assert model.vision_states(picture_batch["pixel_values"]).shape == (2, 9, 32)
    with pytest.raises(ValueError, match="16 patches in image_states"):
        model(image_states=torch.zeros(2, 17, 32), labels=LABELS[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vit": {"hidden_size": 16}}, "--quantization learned with --codebook_projection_dim"),
        ({"num_visual_tokens": 1}, "num_visual_tokens=1"),
        ({"commitment_cost": -1.0}, "commitment_cost=-1.0: 0 or more"),
        ({"num_codebook_words": 61}, "num_codebook_words=61, but the vocabulary has 60"),
        ({"codebook_projection_dim": 8}, "quantization is 'fixed'"),
        ({"visual_token_selection": "nonsense"}, "visual_token_selection"),
    ],
)
def test_wrong_configs_say_what_is_wrong(tiny, fields, message):
    with pytest.raises(Exception, match=message):
        tiny(**fields)


def test_widths_may_differ_where_the_codebook_is_learned(tiny, picture_batch):
    model = tiny(vit={"hidden_size": 16}, quantization="learned", codebook_projection_dim=8, freeze_vision_tower=False)
    assert model.codebook.vision_projection.weight.shape == (8, 16)
    assert model.codebook.word_projection.weight.shape == (8, 32)
    model(**picture_batch, labels=LABELS).loss.backward()
    assert model.vision_model.embeddings.cls_token.grad.abs().sum() > 0


@pytest.mark.parametrize("vision_width", [16, 32])
def test_the_learned_codebook_starts_orthogonal_and_is_loaded_as_it_was_saved(tiny, tmp_path, vision_width):
    model = tiny(vit={"hidden_size": vision_width}, quantization="learned", codebook_projection_dim=16)
    layers = model.codebook.vision_projection, model.codebook.word_projection
    for layer in layers:
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not layers[0].bias.any()
    with torch.no_grad():
        for parameter in model.codebook.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = CodebookT5.from_pretrained(tmp_path)
    for name, saved in model.codebook.state_dict().items():
        assert torch.equal(loaded.codebook.state_dict()[name], saved), name


def test_attention_needs_a_class_token(t5_fields):
    vision = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 32],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    with pytest.raises(ValueError, match="needs a class token, which a resnet has not"):
        CodebookT5.from_t5_vision_pretrained(
            t5_config=t5_fields, vision_config=vision, visual_token_selection="attention"
        )


def test_the_originals_defaults():
    config = CodebookT5Config()
    assert (config.num_visual_tokens, config.visual_token_selection, config.quantization) == (32, "random", "fixed")
    assert config.vision_config.model_type == "vit" and config.decoder_start_token_id == 0
    again = CodebookT5Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
