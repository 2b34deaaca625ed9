"""The trainer: a rate a tower, and metrics that a plain loop over the model gives too."""

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessorPil

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.corpora import load_corpus, split_corpus
from imagedex.corpora.splits import gallery_rows
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import SentenceProcessor
from imagedex.training.dual_encoder.arguments import XMatchingTrainingArguments
from imagedex.training.dual_encoder.data import (
    CaptionPairs,
    Collator,
    RetrievalEvaluation,
    token_rows,
    tokenize_captions,
)
from imagedex.training.dual_encoder.trainer import XMatchingTrainer
from imagedex.training.pictures import Pictures
from imagedex.training.tokenizer import train_tokenizer


@pytest.fixture
def parts(flickr_folder, text_config, vision_config):
    splits = split_corpus(load_corpus(str(flickr_folder)), held_out_captions_per_image=1)
    tokenizer = train_tokenizer([c for captions in splits.train["captions"] for c in captions], 200)
    image_processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    torch.manual_seed(0)
    model = XMatchingModel(
        XMatchingConfig(
            text_config=text_config | {"vocab_size": len(tokenizer)},
            vision_config=vision_config,
            text_pooling="first",
            text_pooling_layers=1,
            text_head="mlp",
            vision_head="mlp",
            head_dropout=0.2,
            projection_dim=8,
            freeze_text_tower=False,
            freeze_vision_tower=False,
            loss_type="info_nce",
        )
    )
    asked = tokenize_captions(splits.evaluation, SentenceProcessor(tokenizer))
    gallery = Pictures(splits.gallery, image_processor)
    evaluation = RetrievalEvaluation(token_rows(asked), gallery, gallery_rows(splits.gallery, asked["image_id"]))
    tokens = tokenize_captions(splits.train, SentenceProcessor(tokenizer))
    train = CaptionPairs(token_rows(tokens), Pictures(splits.train, image_processor), tokens["image_row"])
    return splits, model, train, evaluation, Collator(tokenizer)


def make_trainer(parts, tmp_path, **options):
    _, model, train, evaluation, collator = parts
    args = XMatchingTrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **options
    )
    return XMatchingTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=evaluation, data_collator=collator
    )


@pytest.mark.parametrize("batch_size", [5, 64])
def test_evaluation_equals_a_plain_loop(parts, tmp_path, batch_size):
    splits, model, _, evaluation, collator = parts
    metrics = make_trainer(parts, tmp_path, per_device_eval_batch_size=batch_size).evaluate()

    model.eval()
    names, captions, images = list(splits.gallery["image_id"]), [], []
    with torch.no_grad():
        for image_id, tokens in zip(splits.evaluation["image_id"], evaluation.texts, strict=True):  # one caption each
            captions.append((image_id, model.get_text_features(**collator([tokens])).pooler_output[0]))
        for row in range(len(names)):
            batch = collator([evaluation.pictures[row]])
            images.append(model.get_image_features(**batch).pooler_output[0])
    ranks, backwards = [], []
    for image_id, vector in captions:
        scores = [float(vector @ image) for image in images]
        ranks.append(sum(score >= scores[names.index(image_id)] for score in scores))
    for name, image in zip(names, images, strict=True):
        own = max(float(image @ vector) for image_id, vector in captions if image_id == name)
        backwards.append(1 + sum(float(image @ vector) >= own for image_id, vector in captions if image_id != name))
    for prefix, found in (("eval_", ranks), ("eval_image_to_text_", backwards)):
        for k in (1, 5, 10):
            assert metrics[f"{prefix}hits@{k}"] == pytest.approx(np.mean([rank <= k for rank in found]))
        assert metrics[f"{prefix}mrr"] == pytest.approx(np.mean([1 / rank for rank in found]))
        assert metrics[f"{prefix}median_rank"] == pytest.approx(np.median(found))
    assert (metrics["eval_queries"], metrics["eval_gallery_size"]) == (12, 12)
    assert np.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("eval_gallery", ["all", "held_out"])
def test_new_pictures_are_searched_alone_and_among_all(flickr_folder, parts, tmp_path, eval_gallery):
    """Every caption of held-out pictures against both galleries by a plain loop; each picture is embedded once."""
    _, model, train, _, collator = parts
    splits = split_corpus(load_corpus(str(flickr_folder)), held_out_images=0.4, eval_gallery=eval_gallery)
    asked = tokenize_captions(splits.evaluation, SentenceProcessor(collator.tokenizer))
    pictures, galleries = splits.galleries()
    shown = Pictures(pictures, ViTImageProcessorPil(size={"height": 16, "width": 16}))
    evaluation = RetrievalEvaluation(token_rows(asked), shown, gallery_rows(pictures, asked["image_id"]), galleries)
    trainer = make_trainer((splits, model, train, evaluation, collator), tmp_path)
    embedded = []
    trainer.embed = lambda rows, field, said: (
        embedded.append((field, len(rows))) or (XMatchingTrainer.embed(trainer, rows, field, said))
    )
    metrics = trainer.evaluate()
    assert embedded == [("text_embeds", len(asked)), ("image_embeds", 12)]

    names, new = pictures["image_id"][:], set(splits.evaluation["image_id"])
    assert 1 < len(new) < 12
    with torch.no_grad():
        images = [model.get_image_features(**collator([shown[row]])).pooler_output[0] for row in range(12)]
        texts = [model.get_text_features(**collator([tokens])).pooler_output[0] for tokens in evaluation.texts]
    ranks = {"new": [], "whole": []}
    for image_id, vector in zip(asked["image_id"], texts, strict=True):
        scores = {name: float(vector @ image) for name, image in zip(names, images, strict=True)}
        ranks["whole"].append(sum(score >= scores[image_id] for score in scores.values()))
        ranks["new"].append(sum(scores[name] >= scores[image_id] for name in new))
    own, other = ("whole", "new") if eval_gallery == "all" else ("new", "whole")
    for prefix, found in (("eval_", ranks[own]), (f"eval_{other}_", ranks[other])):
        assert metrics[f"{prefix}hits@1"] == pytest.approx(np.mean([rank <= 1 for rank in found]))
        assert metrics[f"{prefix}mrr"] == pytest.approx(np.mean([1 / rank for rank in found]))
        assert metrics[f"{prefix}mrr_low"] <= metrics[f"{prefix}mrr"] <= metrics[f"{prefix}mrr_high"]
        assert metrics[f"{prefix}gallery_size"] == (12 if found is ranks["whole"] else len(new))

    embedded.clear()
    trainer.is_in_train = True  # an evaluation on the way: the gallery that chooses the best model, and nothing else
    brief = trainer.evaluate()
    assert brief["eval_mrr"] == pytest.approx(metrics["eval_mrr"])
    assert brief["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert not [name for name in brief if "_low" in name or name.startswith(f"eval_{other}")]
    assert embedded[1] == ("image_embeds", brief["eval_gallery_size"])
    scores, images, _ = trainer.found(3, splits.gallery["image_id"][:])
    assert set().union(*images) <= (set(names) if eval_gallery == "all" else new) and len(scores) == len(asked)


def test_each_tower_learns_at_its_own_rate(parts, tmp_path):
    trainer = make_trainer(
        parts, tmp_path, learning_rate=1e-3, text_learning_rate=1e-5, vision_learning_rate=2e-4, weight_decay=0.1
    )
    optimizer = trainer.create_optimizer()
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        rate, decay = rates.pop(id(parameter))
        assert rate == (
            1e-5 if name.startswith("text_model.") else 2e-4 if name.startswith("vision_model.") else 1e-3
        ), name
        if name.endswith("bias"):
            assert decay == 0.0
    assert not rates, "a parameter is optimised that is not the model's"
    assert len(optimizer.param_groups) == 6  # three rates, each with and without decay


def test_training_lowers_the_loss_and_keeps_the_best(parts, tmp_path):
    trainer = make_trainer(
        parts, tmp_path, learning_rate=5e-3, num_train_epochs=8, per_device_train_batch_size=12, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="hits@1", logging_strategy="epoch",
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    seen = [entry["eval_hits@1"] for entry in trainer.state.log_history if "eval_hits@1" in entry]
    assert after["eval_hits@1"] == max(seen[1:])  # the first was before training


def test_five_fold_evaluation_is_the_mean_over_the_fifths_of_the_gallery(parts, tmp_path):
    _, model, _, evaluation, _ = parts
    found = make_trainer(parts, tmp_path, five_fold=True).evaluate()
    whole = make_trainer(parts, tmp_path)
    text, image = whole.embed_both(evaluation)
    bounds, folds = [0, 2, 4, 7, 9, 12], []  # twelve pictures in their order, one caption each
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        ranks = []
        for vector, target in zip(text, evaluation.targets, strict=True):
            if start <= target < stop:
                scores = [float(vector @ other) for other in image[start:stop]]
                ranks.append(sum(score >= scores[target - start] for score in scores))
        assert len(ranks) == stop - start
        folds.append(([rank <= 1 for rank in ranks], [1 / rank for rank in ranks]))
    assert found["eval_hits@1"] == pytest.approx(np.mean([np.mean(hits) for hits, _ in folds]))
    assert found["eval_mrr"] == pytest.approx(np.mean([np.mean(reciprocal) for _, reciprocal in folds]))
    assert (found["eval_folds"], found["eval_gallery_size"], found["eval_queries"]) == (5, 3, 12)
    assert found["eval_mrr"] > whole.evaluate()["eval_mrr"]  # fewer pictures to be mistaken for
