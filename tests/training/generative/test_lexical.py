"""A T5 that starts as a search for words: its order before the first step against one by hand, and what is left to learn."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration
from weights_by_hand import weights_by_hand

import run_dsi
from imagedex.errors import UserError
from imagedex.identifiers.schemes import assign_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.arguments import ModelArguments
from imagedex.training.generative.arguments import T5Arguments
from imagedex.training.generative.checks import check_model
from imagedex.training.generative.starts.lexical import places_of, start_from_texts, token_vectors
from imagedex.training.tokenizer import train_tokenizer

WORDS = ["otter", "heron", "badger", "lynx", "salmon", "falcon", "river", "meadow", "sleeps", "hunts", "the", "a"]
WIDTH = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "patch_size": 8, "image_size": 16}  # fmt: skip
PROMPT = "question: "


def corpus(items=40, seed=3):
    """Random sentences over few words: more items than words, so that the factors are exact. The last item has no text."""
    draw = np.random.default_rng(seed)
    shares = np.linspace(1, 4, len(WORDS))
    texts = [" ".join(draw.choice(WORDS, draw.integers(2, 7), p=shares / shares.sum())) for _ in range(items - 1)]
    return [*texts, ""]


def start(texts, kind="t5", scheme="atomic", pairs=(), **sizes):
    """(model, tokenizer, identifiers) at the start."""
    tokenizer = train_tokenizer([*texts, *(sentence for sentence, _ in pairs), PROMPT], 300)
    vectors = None if scheme == "atomic" else np.random.default_rng(0).normal(size=(len(texts), 4))
    words = len(tokenizer)
    identifiers = assign_identifiers(scheme, [f"{row}.jpg" for row in range(len(texts))], tokenizer, vectors, codes=4)
    fields = WIDTH | sizes | {"vocab_size": words, "decoder_start_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if kind == "t5":
        model = T5ForConditionalGeneration(T5Config(**fields))
    else:
        model_class = {"codebook_t5": CodebookT5, "vision_grounded_t5": VisionGroundedT5}[kind]
        model = model_class.from_t5_vision_pretrained(t5_config=fields, vision_config=VIT)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    start_from_texts(model, tokenizer, identifiers, texts, pairs)
    return model.eval(), tokenizer, identifiers


def written(pieces, tokenizer):
    """piece -> how it is written."""
    return {piece: tokenizer.decode([piece]).strip().lower() for own in pieces for piece in own}


def first_token_log_probs(model, tokenizer, identifiers, sentences):
    """(Q, N): of the only token of every atomic identifier; all sentences in one padded batch."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    first = torch.full((len(sentences), 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=first).logits[:, 0]
    return logits.log_softmax(-1)[:, torch.from_numpy(identifiers.tokens).long()].double().numpy()


@pytest.mark.parametrize("kind", ["t5", "codebook_t5", "vision_grounded_t5"])
def test_the_order_is_that_of_the_words_weights(kind):
    texts = corpus()
    model, tokenizer, identifiers = start(texts, kind)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    weights = weights_by_hand(pieces, [], written(pieces, tokenizer))
    assert len({piece for own in pieces for piece in own}) < min(len(texts), WIDTH["d_model"]), "the factors fit"
    sentences = ["otter", "the heron hunts a salmon", "the the the lynx sleeps", "meadow river", "falcon badger a a"]
    asked = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
    expected = np.stack([np.sum([weights[piece] for piece in own], axis=0) for own in asked])
    # pieces that no text has, as a prompt's here, say nothing
    for asked in (sentences, [PROMPT + sentence for sentence in sentences]):
        found = first_token_log_probs(model, tokenizer, identifiers, asked)
        for row, right in zip(found, expected, strict=True):
            apart = right[:, None] - right[None] > 1e-3
            assert apart.sum() > 100, "the sentence tells many of the 780 pairs apart"
            assert (row[:, None] - row[None])[apart].min() > 0
            assert np.corrcoef(row, right)[0, 1] > 0.9999


def test_questions_may_have_words_that_no_document_has():
    texts = corpus()
    pairs = [(f"who saw {' '.join(text.split()[:2])}", text) for text in texts[:20]]
    model, tokenizer, identifiers = start(texts, pairs=pairs)
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    known = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]
    weights = weights_by_hand(pieces, known, written([*pieces, *(sentence for sentence, _ in known)], tokenizer))
    sentence = "who saw the heron"
    right = np.sum([weights[piece] for piece in tokenizer(sentence, add_special_tokens=False)["input_ids"]], axis=0)
    found = first_token_log_probs(model, tokenizer, identifiers, [sentence])[0]
    assert np.corrcoef(found, right)[0, 1] > 0.9999


def test_too_few_dimensions_still_find_the_item_of_its_own_words():
    """More words than dimensions, and more than items: no longer BM25, but far from chance."""
    texts = [f"word{row} thing{row} word{row} filler" for row in range(40)]
    model, tokenizer, identifiers = start(texts, d_model=16, d_kv=4)
    found = first_token_log_probs(model, tokenizer, identifiers, [f"word{row}" for row in range(40)])
    assert (found.argsort(1)[:, -10:] == np.arange(40)[:, None]).any(1).mean() > 0.5  # by chance 0.25


def test_shared_tokens_stand_for_the_mean_of_their_items():
    items = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    sequences = [[10, 20], [10, 21], [11, 20], [11, 22]]
    new_tokens = {f"<{token}>": token for token in (10, 11, 20, 21, 22, 23)}
    identifiers = Identifiers.from_sequences("rq", list("abcd"), sequences, 1, new_tokens=new_tokens)
    vectors = token_vectors(identifiers, items)
    for token, row in ((21, 1), (22, 3)):  # of one item alone
        torch.testing.assert_close(vectors[token], items[row])
    length = sum(item.norm() for item in items) / 4
    for token, rows in ((10, [0, 1]), (11, [2, 3]), (20, [0, 2])):
        apart = sum(items[row] for row in rows) / 2 - sum(items) / 4
        torch.testing.assert_close(vectors[token], apart / apart.norm() * length)
    assert 23 not in vectors, "a spare token keeps its start"


def test_a_shared_code_is_told_by_the_words_of_its_items():
    """rq: the first token that is written is a code; a sentence of words that only its items have brings it up."""
    texts = corpus()
    model, tokenizer, identifiers = start(texts, scheme="rq")
    rows = identifiers.tokens[identifiers.offsets[:-1]]  # the first code of each item
    codes = sorted(set(rows.tolist()))
    assert 1 < len(codes) < 40
    sentences = [texts[row] for row in range(39)]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        first = torch.full((len(sentences), 1), model.config.decoder_start_token_id)
        logits = model(**batch, decoder_input_ids=first).logits[:, 0, codes]
    right = [codes.index(code) for code in rows[:39].tolist()]
    hits = (logits.argmax(1) == torch.tensor(right)).float().mean().item()
    assert hits > 1.5 / len(codes)


@pytest.mark.parametrize("gate", [{}, {"feed_forward_proj": "gated-gelu"}], ids=["T5", "T5 1.1"])
@pytest.mark.parametrize(
    ("scheme", "names"), [("atomic", ["<image_"]), ("rq", ["<code_0_", "<code_1_", "<code_2_", "<suffix_"])]
)
def test_the_next_place_follows_and_after_the_last_the_end(scheme, names, gate):
    """Written without constraints, token after token, whole identifiers come out, and what is likely is of the right place."""
    model, tokenizer, identifiers = start(corpus(), scheme=scheme, d_model=128, d_kv=32, **gate)
    rows = torch.from_numpy(identifiers.tokens).long().reshape(len(identifiers), -1)
    written = F.pad(rows, (1, 0), value=model.config.decoder_start_token_id)  # (40, places + 1)
    batch = tokenizer(["the heron hunts a salmon"] * len(rows), return_tensors="pt")
    with torch.no_grad():
        says = model(**batch, decoder_input_ids=written).logits.softmax(-1)
    places = [[t for text, t in identifiers.new_tokens.items() if text.startswith(name)] for name in names]
    assert len(places) == rows.shape[1]
    for place, tokens in enumerate(places):
        assert says[:, place, tokens].sum(-1).min() > 0.9
    assert says[:, -1, tokenizer.eos_token_id].min() > 0.99


def test_every_code_is_chosen_as_if_it_were_the_first():
    """rq: what a code has for a sentence does not depend on the codes before it; with tied words it would be said again."""
    texts = corpus()
    model, tokenizer, identifiers = start(texts, scheme="rq", d_model=128, d_kv=32)
    rows = torch.from_numpy(identifiers.tokens).long().reshape(len(identifiers), -1)
    tokens = rows[:, 1].unique()
    written = F.pad(rows[:, :1].unique(dim=0), (1, 0), value=model.config.decoder_start_token_id)
    assert len(written) > 2 and len(tokens) > 2
    batch = tokenizer(["the heron hunts a salmon"] * len(written), return_tensors="pt")
    with torch.no_grad():
        says = model(**batch, decoder_input_ids=written).logits[:, 1, tokens].log_softmax(-1)
    spread, change = (says[0].max() - says[0].min()).item(), (says - says[:1]).abs().max().item()
    assert spread > 0.5 and change < 0.05 * spread


def test_digits_that_no_text_has_differ():
    model, tokenizer, identifiers = start(corpus(), scheme="naive")
    digits = F.normalize(model.get_input_embeddings().weight[sorted(identifiers.known_tokens.values())].detach(), dim=1)
    cosines = digits @ digits.T - torch.eye(len(digits))
    assert len(digits) == 10 and cosines.abs().max() < 0.9


def made(sequences, texts):
    return Identifiers.from_sequences("rq", list("abc"), sequences, 1, new_tokens=texts)


def test_places_are_known_where_tokens_keep_to_them():
    texts = {"<code_0_0>": 10, "<code_0_1>": 11, "<suffix_0>": 12, "<suffix_1>": 13, "<suffix_2>": 14}
    assert places_of(made([[10, 12], [11, 12], [10, 13]], texts)) == [{10, 11}, {12, 13, 14}], "14 is spare"
    assert places_of(made([[10, 11], [11, 12], [10, 13]], texts)) == [], "11 ends one and begins another"
    assert places_of(made([[10], [11, 12], [10, 13]], texts)) == [], "not all as long"


def test_training_goes_on_from_there():
    """Every branch that starts at zero gets a gradient, so none stays as it is; the attention to words stays even."""
    model, tokenizer, identifiers = start(corpus())
    batch = tokenizer(["the otter hunts", "a heron"], padding=True, return_tensors="pt")
    labels = torch.tensor([identifiers.labels("0.jpg"), identifiers.labels("1.jpg")])
    model(**batch, labels=labels).loss.backward()
    even = [f"decoder.block.0.layer.1.EncDecAttention.{name}.weight" for name in "qk"]
    even += [f"encoder.block.{block}.layer.0.SelfAttention.{name}.weight" for block in (0, 1) for name in "qk"]
    last_token_alone = "decoder.block.0.layer.0.SelfAttention.q.weight"  # by its place
    silent = [
        n for n, weight in model.named_parameters() if not weight.detach().any() and n not in (*even, last_token_alone)
    ]
    assert any("DenseReluDense.wo" in name for name in silent) and any("SelfAttention.o" in name for name in silent)
    for name, weight in model.named_parameters():
        if name in silent:
            assert weight.grad is not None and weight.grad.any(), name
        if name in even:
            assert not weight.grad.any(), name


def test_no_text_is_refused():
    with pytest.raises(UserError, match="needs trained captions or documents to start from"):
        start(["", ""])


@pytest.mark.parametrize("sizes", [{"d_kv": 4}, {"num_heads": 8}], ids=["narrower", "wider"])
def test_attention_of_another_width_is_refused(sizes):
    with pytest.raises(UserError, match=r"num_heads \* d_kv is (16|64) and d_model is 32"):
        start(corpus(8), **sizes)


@pytest.mark.parametrize(
    ("model", "t5"),
    [
        ({}, {"text_model_name_or_path": "google-t5/t5-small"}),
        ({"config_name": "{}"}, {}),
        ({"model_name_or_path": "{}"}, {}),
    ],
    ids=["a pretrained T5", "a config", "a checkpoint"],
)
def test_a_t5_that_is_not_from_scratch_is_refused(model, t5, tmp_path):
    T5Config(**WIDTH, vocab_size=9).save_pretrained(tmp_path)
    model = ModelArguments(**{name: value.format(tmp_path) for name, value in model.items()})
    with pytest.raises(UserError, match="--t5_start lexical is for a T5 from scratch"):
        check_model(model, T5Arguments(model_type="t5", t5_start="lexical", **t5))


def test_run_dsi_starts_so_and_refuses_in_one_line(flickr_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = [
        "--model_type", "t5", "--t5_start", "lexical", "--dataset_name", flickr_folder, "--held_out_captions_per_image", 1,
        "--caption_prompt", "", "--do_eval", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", "out",
    ]  # fmt: skip
    narrow = json.dumps(WIDTH | {"model_type": "t5", "d_kv": 4})
    with pytest.raises(UserError, match="attention as wide as the model"):
        run_dsi.main([*map(str, arguments), "--t5_config", narrow])
    assert not (tmp_path / "out").exists()
    run_dsi.main([*map(str, arguments), "--t5_config", json.dumps(WIDTH | {"model_type": "t5"})])
    started = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    asked = [tuple(row.values()) for row in csv.DictReader((tmp_path / "out" / "eval_queries.csv").open())]
    kept = {}
    for row in csv.DictReader((Path(flickr_folder) / "captions.txt").open()):
        own = kept.setdefault(row["image"], [])
        if (row["caption"], row["image"]) not in asked:
            own.append(row["caption"].split())  # words so often used are pieces of their own
    documents = [sum(own, []) for own in kept.values()]
    pairs = [
        (own[i], sum(own[:i] + own[i + 1 :], [])) for own in kept.values() if len(own) > 1 for i in range(len(own))
    ]
    assert pairs
    spelling = {word: word.lower() for own in documents for word in own}

    def ranks(known):
        """(best, worst) of each query: pictures that score the same may come in any order."""
        weights = weights_by_hand(documents, known, spelling)
        for caption, image in asked:
            scores = np.sum([weights[word] for word in caption.split() if word in weights], axis=0)
            right = scores[list(kept).index(image)]
            yield (scores > right + 1e-9).sum() + 1, (scores > right - 1e-9).sum()

    # Every other picture has a trained caption of the same pattern, so by idf the right ones come late. But a pattern never
    # comes again in what else is said of a picture, and colours do: only which is left and which is right is not known.
    assert np.mean([1 / best for best, _ in ranks([])]) < 0.2
    assert max(worst for _, worst in ranks(pairs)) == 2
    latest, earliest = (np.mean([1 / pair[place] for pair in ranks(pairs)]) for place in (1, 0))
    assert latest - 0.03 <= started["eval_mrr"] <= earliest + 0.03
    assert started["eval_hits@5"] == 1


def test_it_does_not_depend_on_what_the_model_was():
    """The same texts give the same embeddings, whatever the random start."""
    texts = corpus()
    embeddings = []
    for seed in (1, 2):
        tokenizer = train_tokenizer([*texts, PROMPT], 300)
        identifiers = assign_identifiers("atomic", [str(row) for row in range(len(texts))], tokenizer)
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(T5Config(**WIDTH, vocab_size=len(tokenizer)))
        start_from_texts(model, tokenizer, identifiers, texts)
        embeddings.append(model.get_input_embeddings().weight.detach())
    torch.testing.assert_close(
        F.normalize(embeddings[0], dim=1), F.normalize(embeddings[1], dim=1), atol=1e-4, rtol=1e-4
    )


def test_pictures_become_words_of_this_start():
    model, _, _ = start(corpus(), "codebook_t5")
    assert torch.equal(model.codebook.words, model.shared.weight[: model.config.num_codebook_words])
