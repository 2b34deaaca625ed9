"""Generative models as retrievers: the exhaustive ranking by hand, galleries that are not theirs, sentences as they know them."""

import itertools
import json
import math
import shutil

import pytest
import torch

from imagedex.errors import UserError
from imagedex.identifiers.generative_model import load_generative, without_identifier
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks
from imagedex.modeling.identifiers import Identifiers
from imagedex.retrieval.generative import GenerativeRetriever

QUERIES = ["A red dog (on the LEFT)!", "the blue half", "yellow grass", "a red dog on the left"]


@pytest.fixture(scope="module")
def models(save_generative, gallery_ids, tmp_path_factory):
    """A T5 that knows its pictures by random numbers, and a CodebookT5 that knows them by codes."""
    folder = tmp_path_factory.mktemp("generative")
    vectors = torch.randn(len(gallery_ids), 6, generator=torch.Generator().manual_seed(1))
    return {
        "t5": save_generative(folder / "t5", "t5", "naive", gallery_ids),
        "codebook_t5": save_generative(folder / "codebook_t5", "codebook_t5", "rq", gallery_ids, vectors),
    }


def by_hand(parts, sentence, image_id):
    """Log-probability of an identifier after a sentence, one at a time and without a batch, from the model's own forward."""
    cleaned = " ".join(sentence.lower().replace("!", " ").replace("(", " ").replace(")", " ").split())
    inputs = parts.processor.tokenizer("question: " + cleaned, return_tensors="pt")
    labels = torch.tensor([parts.identifiers.labels(image_id)])
    with torch.no_grad():
        logits = parts.model(**inputs, labels=labels).logits[0].double()
    return sum(logits[place].log_softmax(0)[token].item() for place, token in enumerate(labels[0]))


@pytest.mark.parametrize("name", ["t5", "codebook_t5"])
def test_with_a_beam_for_each_picture_the_ranking_is_the_exhaustive_one(models, name, gallery_ids):
    parts = load_generative(str(models[name]))
    targets = [gallery_ids[row] for row in (3, 22, 0, 3)]
    found = GenerativeRetriever("tiny", parts, num_beams=23, batch_size=3).search(
        QUERIES, 5, [(target,) for target in targets]
    )
    for ranking, sentence, target in zip(found, QUERIES, targets, strict=True):
        scores = {image_id: by_hand(parts, sentence, image_id) for image_id in gallery_ids}
        best = sorted(scores, key=scores.get, reverse=True)
        assert ranking.query == sentence and ranking.targets == [target]
        assert ranking.images == best[:5]
        assert ranking.scores == pytest.approx([scores[image_id] for image_id in best[:5]], abs=1e-4)
        assert ranking.rank == 1 + best.index(target)
    assert found[0].images == found[3].images  # the same sentence once it is cleaned
    assert found[0].scores != found[1].scores


def test_a_picture_beyond_the_beams_has_no_rank_and_one_beyond_k_has(models, gallery_ids):
    parts = load_generative(str(models["t5"]))
    everything = GenerativeRetriever("tiny", parts, num_beams=23).search(QUERIES[:1], 23)[0]
    narrow = GenerativeRetriever("tiny", parts, num_beams=4)
    beams = narrow.candidates(QUERIES[:1])[0].images
    assert len(set(beams)) == 4
    lost = next(image_id for image_id in everything.images if image_id not in beams)
    ranked = narrow.search(QUERIES[:1] * 2, 2, [(beams[3],), (lost,)])
    assert [ranking.images for ranking in ranked] == [beams[:2]] * 2
    assert [ranking.rank for ranking in ranked] == [4, math.inf]
    assert summarize_ranks([ranking.rank for ranking in ranked])["mrr"] == pytest.approx(0.125)


def test_a_smaller_gallery_is_searched_alone_and_scores_stay(models, gallery_ids):
    parts = load_generative(str(models["codebook_t5"]))
    some = gallery_ids[4:9]
    fewer = parts.identifiers.restricted(some)
    assert fewer.image_ids == some
    assert [fewer.sequence(name) for name in some] == [parts.identifiers.sequence(name) for name in some]
    assert parts.identifiers.restricted(gallery_ids) is parts.identifiers
    found = GenerativeRetriever("tiny", parts, fewer, num_beams=10).search(QUERIES[:1], 10)[0]
    scores = {image_id: by_hand(parts, QUERIES[0], image_id) for image_id in some}
    assert found.images == sorted(some, key=scores.get, reverse=True)
    assert found.scores == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)


def test_sentences_are_written_as_in_training(models, save_generative, gallery_ids, tmp_path):
    retriever = GenerativeRetriever("t5", load_generative(str(models["t5"])))
    processor = retriever.parts.processor
    assert (processor.prompt, processor.clean_text, processor.max_text_length) == ("question: ", True, 20)
    rows = [*retriever.written(["A dog!"]), *retriever.written([" ".join(["red"] * 50)])]
    assert processor.tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True) == "question : a dog"
    assert len(rows[1]["input_ids"]) == 20
    assert retriever.remarks() == ["1 of 2 sentences are longer than 20 tokens and were cut"]
    style = {"prompt": "", "clean_text": False, "max_text_length": 9}
    plain = load_generative(str(save_generative(tmp_path / "plain", "t5", "naive", gallery_ids, style=style)))
    retriever = GenerativeRetriever("plain", plain)
    assert retriever.written(["A dog!"])[0]["input_ids"] == plain.processor.tokenizer("A dog!")["input_ids"]
    assert retriever.remarks() == ["1 of 1 texts have words or signs that the tokenizer does not know"]  # "!"


def test_a_model_that_kept_its_style_with_the_identifiers_keeps_it(save_generative, gallery_ids, tmp_path):
    """As imagedex 0.1 saved one: nothing in the processor, all of it in identifiers.json."""
    folder = save_generative(tmp_path / "old", "codebook_t5", "naive", gallery_ids)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("prompt", "clean_text", "max_text_length")})
    )
    path = folder / "identifiers.json"
    facts = json.loads(path.read_text())
    facts["source"]["queries"] = {"prompt": "question: ", "cleans": True, "max_length": 9}
    path.write_text(json.dumps(facts))
    parts = load_generative(str(folder))
    style = parts.processor.prompt, parts.processor.clean_text, parts.processor.max_text_length
    assert style == ("question: ", True, 9) and "queries" not in parts.identifiers.source


def test_pictures_without_an_identifier():
    known = Identifiers.from_sequences("naive", ["a.jpg", "b.jpg"], [[5], [6]], 1)
    assert without_identifier("M", known, ["b.jpg"], may_add=False) == []
    assert without_identifier("M", known, ["n.jpg", "b.jpg", "m.jpg"], may_add=True) == ["n.jpg", "m.jpg"]
    with pytest.raises(
        UserError, match=r"M has identifiers of 2 pictures, but 1 of the 2 in the gallery.*'n.jpg'.*--add_new"
    ):
        without_identifier("M", known, ["b.jpg", "n.jpg"], may_add=False)
    for may_add in (False, True):
        with pytest.raises(UserError, match=r"identifiers of 2 pictures, and not one of the 1 .*'a.jpg'.*'x/a.jpg'"):
            without_identifier("M", known, ["x/a.jpg"], may_add=may_add)


def test_what_cannot_answer_is_refused_in_one_line(models, tiny_clip, tmp_path):
    copies = (tmp_path / f"copy{number}" for number in itertools.count())

    def refused(*parts, source=models["codebook_t5"], change=None):
        folder = shutil.copytree(source, next(copies))
        if change:
            change(folder)
        with pytest.raises(UserError) as raised:
            load_generative(str(folder))
        assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
        for part in parts:
            assert part in str(raised.value)

    def greater_tokens(folder):
        own = Identifiers.from_pretrained(folder)
        sequences = [own.sequence(name) for name in own.image_ids[:-1]] + [[100_000]]
        Identifiers.from_sequences("atomic", own.image_ids, sequences, own.eos_token_id).save_pretrained(folder)

    refused("is a clip model", source=tiny_clip)
    refused("brings no identifiers.json", "run_dsi.py", change=lambda folder: (folder / "identifiers.json").unlink())
    refused("not of one another", change=lambda folder: shutil.copy(models["t5"] / "identifiers.json", folder))
    refused("100000", change=greater_tokens)
    refused(
        "its model.safetensors is broken", change=lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99)
    )
    refused("tokenizer", change=lambda folder: [path.unlink() for path in folder.glob("tokenizer*")])


@pytest.mark.parametrize("name", ["t5", "codebook_t5"])
@pytest.mark.parametrize("num_beams", [1, 4, 23])
def test_weights_that_are_no_numbers_are_one_line_and_not_empty_rankings(models, name, num_beams):
    parts = load_generative(str(models[name]))
    with torch.no_grad():
        parts.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(
        UserError, match="^tiny: the model gives no identifier a score but NaN or infinity; its weights"
    ):
        GenerativeRetriever("tiny", parts, num_beams=num_beams).search(QUERIES, 5)
