"""The generative trainer: figures against exhaustive scoring, what memorising a picture means, stopping, smoothing, saving."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig

from imagedex.errors import UserError
from imagedex.identifiers.schemes import assign_identifiers
from imagedex.modeling.constrained_decoding import rank_identifiers, score_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.generative.arguments import DSITrainingArguments
from imagedex.training.generative.data import (
    DSICollator,
    GenerativeEvaluation,
    Items,
    ItemsFromIdentifiers,
    Mixture,
    Rows,
)
from imagedex.training.generative.trainer import DSITrainer, StopWhenMemorised
from imagedex.training.tokenizer import train_tokenizer

CAPTIONS = [
    f"{colour} {shape} number {digit}" for colour in ("red", "blue") for shape in ("ball", "box") for digit in "01"
]
NAMES = [f"{row}.jpg" for row in range(8)]
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
      "decoder_start_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "patch_size": 8,
       "image_size": 32}  # fmt: skip


class Drawings(torch.utils.data.Dataset):
    """Eight pictures of random colours in 4 x 4 fields, as tensors that need no processor."""

    def __init__(self):
        fields = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.pictures = F.interpolate(fields, scale_factor=8)

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {"pixel_values": self.pictures[row]}


def build(model_class, scheme="atomic", **fields):
    """(model, tokenizer, identifiers) with random weights."""
    tokenizer = train_tokenizer([*CAPTIONS, "question: identifier:"], 200)
    vectors = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    options = {"branches": 2, "leaf_size": 2, "levels": 2, "codes": 3}
    words = len(tokenizer)
    identifiers = assign_identifiers(scheme, NAMES, tokenizer, vectors, **options)
    torch.manual_seed(0)
    if model_class is T5ForConditionalGeneration:
        return model_class(T5Config(**T5, vocab_size=len(tokenizer))), tokenizer, identifiers
    if model_class is CodebookT5:
        fields |= {"num_codebook_words": words}
    model = model_class.from_t5_vision_pretrained(
        t5_config=T5 | {"vocab_size": len(tokenizer)}, vision_config=ViTConfig(**VIT), **fields
    )
    return model, tokenizer, identifiers


def make_trainer(parts, tmp_path, train=None, evaluation=None, callbacks=(), **options):
    model, tokenizer, identifiers = parts
    args = DSITrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **{"save_strategy": "no"} | options
    )
    return DSITrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DSICollator(tokenizer),
        identifiers=identifiers,
        callbacks=list(callbacks),
    )


def labels_of(identifiers):
    return {name: identifiers.labels(name) for name in NAMES}


def text_rows(tokenizer, labels, names=NAMES):
    rows = [{name: tokenizer(text)[name] for name in ("input_ids", "attention_mask")} for text in CAPTIONS]
    return Items(rows, names, labels)


@pytest.mark.parametrize("scheme", ["atomic", "semantic", "rq"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_figures_are_those_of_exhaustive_scoring(tmp_path, scheme, batch_size):
    parts = model, tokenizer, identifiers = build(T5ForConditionalGeneration, scheme)
    asked = text_rows(tokenizer, labels_of(identifiers))
    targets = np.array([identifiers.row(name) for name in NAMES])
    evaluation = GenerativeEvaluation(asked, targets)
    trainer = make_trainer(parts, tmp_path, evaluation=evaluation, per_device_eval_batch_size=batch_size, num_beams=8)
    metrics = trainer.evaluate()

    inputs = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    scores = score_identifiers(model, identifiers, dict(inputs))  # (8, 8)
    own = scores.gather(1, torch.from_numpy(targets)[:, None])
    ranks = (scores >= own).sum(1)
    assert len(ranks.unique()) > 2, "nothing to tell"
    for k in (1, 5, 10):
        assert metrics[f"eval_hits@{k}"] == pytest.approx((ranks <= k).float().mean().item())
    assert metrics["eval_mrr"] == pytest.approx((1 / ranks).mean().item(), abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx((-own.sum() / sum(map(len, asked.labels.values()))).item(), abs=1e-4)
    assert (metrics["eval_queries"], metrics["eval_gallery_size"]) == (8, 8)
    assert metrics["eval_ms_per_query"] > 0

    found_scores, names = trainer.found(3)
    best = scores.topk(3)
    assert names == [[identifiers.image_ids[row] for row in rows] for rows in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor(found_scores), best.values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_beams", [1, 8])
def test_weights_that_are_no_numbers_are_one_line(tmp_path, num_beams):
    parts = model, tokenizer, identifiers = build(T5ForConditionalGeneration)
    targets = np.array([identifiers.row(name) for name in NAMES])
    evaluation = GenerativeEvaluation(text_rows(tokenizer, labels_of(identifiers)), targets)
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="no identifier a score but NaN or infinity"):
        make_trainer(parts, tmp_path, evaluation=evaluation, num_beams=num_beams).evaluate()


def test_with_fewer_beams_what_was_not_found_adds_nothing(tmp_path):
    parts = model, tokenizer, identifiers = build(T5ForConditionalGeneration)
    targets = np.array([identifiers.row(name) for name in NAMES])
    evaluation = GenerativeEvaluation(text_rows(tokenizer, labels_of(identifiers)), targets)
    metrics = make_trainer(parts, tmp_path, evaluation=evaluation, num_beams=2).evaluate()
    scores = score_identifiers(model, identifiers, dict(tokenizer(CAPTIONS, padding=True, return_tensors="pt")))
    ranks = (scores >= scores.gather(1, torch.from_numpy(targets)[:, None])).sum(1).double()
    ranks[ranks > 2] = torch.inf
    assert metrics["eval_hits@5"] == metrics["eval_hits@10"] == pytest.approx((ranks <= 2).double().mean().item())
    assert metrics["eval_mrr"] == pytest.approx((1 / ranks).mean().item())
    if torch.isinf(ranks.median()):
        assert "eval_median_rank" not in metrics
    json.dumps(metrics, allow_nan=False)


ENCODING = {  # kind of model and rows -> (class, fields, texts, pictures, runs of the encoder in a batch, of the vision tower)
    "t5": (T5ForConditionalGeneration, {}, 8, 0, 1, 0),
    "codebook_t5 texts": (CodebookT5, {"num_visual_tokens": 9}, 8, 0, 1, 0),
    "codebook_t5 pictures": (CodebookT5, {"num_visual_tokens": 9}, 0, 8, 1, 1),
    "codebook_t5 learned, both": (CodebookT5, {"num_visual_tokens": 9, "quantization": "learned"}, 4, 4, 2, 1),
    "vision_grounded_t5 both": (VisionGroundedT5, {}, 4, 4, 1, 1),
}


@pytest.mark.parametrize("kind", ENCODING)
def test_evaluation_encodes_once_and_finds_what_encoding_twice_finds(tmp_path, kind):
    """A batch of the first half of the rows, one of the second; CodebookT5 encodes texts and pictures one after the other."""
    model_class, fields, texts, pictures, encoder_runs, tower_runs = ENCODING[kind]
    parts = model, tokenizer, identifiers = build(model_class, "rq", **fields)
    labels, drawings = labels_of(identifiers), Drawings()
    rows = [text_rows(tokenizer, labels)[row] for row in range(texts)]
    rows += [Items(drawings, NAMES, labels)[row] for row in range(pictures)]
    rows = rows[::2] + rows[1::2]  # of mixed rows both kinds in either batch
    trainer = make_trainer(parts, tmp_path, num_beams=8, per_device_eval_batch_size=4)
    runs = {"encoder": 0, "vision_model": 0}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    hooks = [getattr(model, name).register_forward_hook(count(name)) for name in runs if hasattr(model, name)]
    found = trainer.answer(rows, "Answering")
    assert runs == {"encoder": 2 * encoder_runs, "vision_model": 2 * tower_runs}
    for hook in hooks:
        hook.remove()

    for place, batch in ((slice(0, 4), rows[:4]), (slice(4, 8), rows[4:])):
        batch = trainer.data_collator(batch)
        right = batch.pop("labels")
        scores, best = rank_identifiers(model, identifiers, batch, 8)
        assert torch.equal(found.rows[place], best)
        torch.testing.assert_close(found.scores[place], scores)
        with torch.no_grad():
            logits = model(**batch, labels=right).logits
        losses = F.cross_entropy(logits.transpose(1, 2), right, reduction="none").sum(1)
        torch.testing.assert_close(found.losses[place], losses)


MEMORISING = {
    "vision_grounded_t5": (VisionGroundedT5, {"freeze_vision_tower": False}),
    "codebook_t5": (CodebookT5, {"num_visual_tokens": 17, "visual_token_selection": "even"}),
}


@pytest.mark.parametrize("kind", MEMORISING)
def test_what_is_memorised_is_the_pictures_themselves(tmp_path, kind):
    """After step 1 each picture has its own identifier; shown in another order, each picture still brings its own, so that none
    of the places has the right one any more."""
    model_class, fields = MEMORISING[kind]
    parts = *_, identifiers = build(model_class, **fields)
    pictures, labels = Drawings(), labels_of(identifiers)
    targets = np.array([identifiers.row(name) for name in NAMES])
    recall = GenerativeEvaluation(items=Items(pictures, NAMES, labels), item_targets=targets)
    trainer = make_trainer(
        parts, tmp_path, recall.items, recall, [StopWhenMemorised(1.0)], per_device_train_batch_size=8, max_steps=400,
        learning_rate=3e-3, eval_strategy="steps", eval_steps=20, lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.evaluate()["eval_memorised"] < 0.5
    trainer.train()
    assert trainer.state.global_step < 400, "it stops when all are memorised"
    assert trainer.evaluate()["eval_memorised"] == 1.0

    shuffled = [3, 0, 7, 1, 2, 4 + 2, 5, 4]  # no picture stays where it was
    assert all(row != place for place, row in enumerate(shuffled))
    others = GenerativeEvaluation(items=Items(Rows(pictures, shuffled), NAMES, labels), item_targets=targets)
    assert trainer.evaluate(others)["eval_memorised"] == 0.0
    followed = GenerativeEvaluation(items=others.items, item_targets=targets[shuffled])
    assert trainer.evaluate(followed)["eval_memorised"] == 1.0


def test_how_much_of_the_codebook_is_used_is_logged(tmp_path):
    """By hand, from what T5 read: exp of the entropy of its words, and how many different ones of all; means over batches."""
    parts = model, tokenizer, identifiers = build(CodebookT5, quantization="learned")
    labels, read = labels_of(identifiers), {True: [], False: []}
    pictures = Items(Drawings(), NAMES, labels)
    recall = GenerativeEvaluation(
        sentences=text_rows(tokenizer, labels), targets=np.arange(len(NAMES)), items=pictures, item_targets=np.arange(8)
    )
    trainer = make_trainer(parts, tmp_path, pictures, recall, max_steps=5, logging_steps=2, learning_rate=1e-2,
                           per_device_train_batch_size=3, per_device_eval_batch_size=5)  # fmt: skip

    def note(module, inputs, output):
        if getattr(output, "visual_token_ids", None) is not None and hasattr(output, "logits"):
            words = [token for token in output.visual_token_ids.flatten().tolist() if token > 1]
            shares = np.array(list(Counter(words).values())) / len(words)
            read[module.training].append((np.exp(-(shares * np.log(shares)).sum()), len(set(words))))

    model.register_forward_hook(note)
    trainer.train()
    total = model.config.num_codebook_words - len(model.config.codebook_special_token_ids)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for batches, entry in zip((read[True][:2], read[True][2:4]), logged, strict=True):
        assert entry["codebook_perplexity"] == pytest.approx(np.mean([one for one, _ in batches]), rel=1e-4)
        assert entry["codebook_usage"] == pytest.approx(np.mean([count for _, count in batches]) / total, rel=1e-4)
    metrics = trainer.evaluate()
    assert len(read[False]) == 2
    assert metrics["eval_codebook_perplexity"] == pytest.approx(np.mean([one for one, _ in read[False]]), rel=1e-4)
    assert metrics["eval_codebook_usage"] == pytest.approx(
        np.mean([count for _, count in read[False]]) / total, rel=1e-4
    )
    plain = make_trainer(build(T5ForConditionalGeneration), tmp_path, evaluation=None)
    assert plain.codebook_use.figures(True, plain.accelerator) == {}


@pytest.mark.parametrize("steps", [0, 12, 25])
def test_what_is_memorised_is_the_exact_match_of_the_likeliest_identifier(tmp_path, steps):
    """By hand: the log-probability of every identifier after every picture, one at a time."""
    parts = model, _, identifiers = build(CodebookT5, "naive", visual_token_selection="even")
    labels = labels_of(identifiers)
    targets = np.array([identifiers.row(name) for name in NAMES])
    recall = GenerativeEvaluation(items=Items(Drawings(), NAMES, labels), item_targets=targets)
    trainer = make_trainer(parts, tmp_path, recall.items, recall, max_steps=max(1, steps), learning_rate=1e-2,
                           lr_scheduler_type="constant", num_beams=8)  # fmt: skip
    if steps:
        trainer.train()
    found, right = trainer.evaluate()["eval_memorised"], 0
    for name, picture in zip(NAMES, Drawings(), strict=False):
        scores = {}
        for other in NAMES:
            written = torch.tensor([labels[other]])
            with torch.no_grad():
                loss = model(pixel_values=picture["pixel_values"][None], labels=written).loss
            scores[other] = -loss.item() * written.shape[1]
        right += max(scores, key=scores.get) == name
    assert found == right / len(NAMES)


def test_stop_when_memorised_also_holds_for_a_run_that_is_started_again(tmp_path):
    parts = *_, identifiers = build(VisionGroundedT5, freeze_vision_tower=False)
    labels = labels_of(identifiers)
    targets = np.array([identifiers.row(name) for name in NAMES])
    recall = GenerativeEvaluation(items=Items(Drawings(), NAMES, labels), item_targets=targets)

    def trainer():
        return make_trainer(
            parts, tmp_path, recall.items, recall, [StopWhenMemorised(0.01)], per_device_train_batch_size=8, max_steps=40,
            eval_strategy="steps", eval_steps=2, learning_rate=3e-3, save_strategy="steps", save_steps=2,
        )  # fmt: skip

    first = trainer()
    first.train()
    stopped = first.state.global_step
    assert stopped < 40
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped}"))
    assert again.state.global_step == stopped


@pytest.mark.parametrize("model_class", [T5ForConditionalGeneration, CodebookT5])
def test_label_smoothing_is_that_of_transformers(tmp_path, model_class):
    parts = model, tokenizer, identifiers = build(model_class)
    rows = text_rows(tokenizer, labels_of(identifiers))
    trainer = make_trainer(parts, tmp_path, label_smoothing_factor=0.2)
    batch = trainer.data_collator([rows[row] for row in range(8)])
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    log_probs = model(**batch).logits.log_softmax(-1)
    labels = batch["labels"]
    mask = labels != -100
    right = -log_probs.gather(2, labels.clamp(min=0)[..., None]).squeeze(2)[mask]
    expected = 0.8 * right.mean() + 0.2 * -log_probs.mean(-1)[mask].mean()
    torch.testing.assert_close(loss, expected)


def test_label_smoothing_leaves_rows_without_labels_as_they_are(tmp_path):
    """Rows that write pictures have no labels of ours; the smoothing is over the others, wherever these stand."""
    parts = model, tokenizer, identifiers = build(CodebookT5, visual_token_selection="even", num_visual_tokens=5)
    labels, pictures = labels_of(identifiers), Drawings()
    forward, backward = Items(pictures, NAMES, labels), ItemsFromIdentifiers(pictures, NAMES, labels, tokenizer)
    rows = text_rows(tokenizer, labels)
    trainer = make_trainer(parts, tmp_path, label_smoothing_factor=0.2)
    batch = trainer.data_collator([rows[0], rows[1], backward[2], forward[3]])
    model.train()
    with torch.no_grad():
        smoothed, plain = trainer.compute_loss(model, dict(batch)), model(**batch).loss
        alone = trainer.data_collator([rows[0], rows[1], forward[3]])
        only = trainer.compute_loss(model, dict(alone)) - model(**alone).loss
    torch.testing.assert_close(smoothed - plain, only, atol=1e-5, rtol=1e-4)
    assert only.abs() > 1e-3


def test_identifiers_are_saved_with_every_model(tmp_path):
    parts = *_, tokenizer, identifiers = build(T5ForConditionalGeneration)
    rows = text_rows(tokenizer, labels_of(identifiers))
    make_trainer(parts, tmp_path, rows, max_steps=1, save_strategy="steps", save_steps=1).train()
    saved = Identifiers.from_pretrained(tmp_path / "checkpoint-1")
    assert saved.image_ids == NAMES and saved.sequence("3.jpg") == identifiers.sequence("3.jpg")


def test_accumulated_steps_do_not_multiply_the_loss(tmp_path):
    """Stock T5 takes any keyword, from which Trainer concludes that it scales its loss itself."""
    losses = []
    for steps in (1, 4):
        parts = *_, tokenizer, identifiers = build(T5ForConditionalGeneration)
        rows = text_rows(tokenizer, labels_of(identifiers))
        options = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        trainer = make_trainer(parts, tmp_path, rows, max_steps=1, logging_steps=1, **options)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_where_t5_stays_as_it_is_the_projection_learns_with_the_tower(tmp_path):
    """As in step 1 of VisionGroundedT5 from scratch: learning_rate 0."""
    parts = model, _, identifiers = build(VisionGroundedT5, freeze_vision_tower=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Items(Drawings(), NAMES, labels_of(identifiers))
    options = {"learning_rate": 0.0, "vision_learning_rate": 1e-3, "weight_decay": 0.0, "max_steps": 2}
    make_trainer(parts, tmp_path, rows, **options).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    projection = {f"vision_projection.{name}" for name in ("linear.weight", "linear.bias", "layer_norm.weight")}
    assert projection < moved and all(name.startswith("vision_") for name in moved)


def test_items_of_a_run_that_goes_on_in_the_middle_of_an_epoch_are_those_of_one_that_was_not_stopped(tmp_path):
    """8 captions and 3 pictures an epoch, in batches of 4."""

    def shown(resume=None):
        parts = _, tokenizer, identifiers = build(CodebookT5, num_visual_tokens=9, visual_token_selection="even")
        labels = labels_of(identifiers)
        mixture = Mixture(text_rows(tokenizer, labels), [Items(Drawings(), NAMES, labels)], 3 / 8)
        trainer = make_trainer(
            parts, tmp_path, mixture, per_device_train_batch_size=4, num_train_epochs=4, save_strategy="steps", save_steps=4,
        )  # fmt: skip
        batches, step = [], trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: batches.append(dict(inputs)) or step(model, inputs, *rest)
        trainer.train(resume_from_checkpoint=resume)
        return batches

    whole = shown()
    assert len(whole) == 12
    pictures = torch.cat([batch["pixel_values"] for batch in whole if "pixel_values" in batch])
    often = [(pictures == picture).all((1, 2, 3)).sum().item() for picture in Drawings().pictures]
    assert sum(often) == 12 and max(often) - min(often) == 1
    rest = shown(str(tmp_path / "checkpoint-4"))
    assert len(rest) == 8
    for batch, expected in zip(rest, whole[4:], strict=True):
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
