"""The making of the stand-in T5: what is corrupted can be put together again, and dictionaries become sentences."""

import argparse
import gzip
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SENTENCES = [f"a {colour} {thing} stands near the {place}" for colour in ("red", "blue") for thing in ("dog", "cat", "boat")
             for place in ("sea", "house", "tree")]  # fmt: skip


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("pretrain_t5")


@pytest.fixture
def english_text(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("english_text")


def test_what_is_corrupted_can_be_put_together_again(pretrain):
    tokenizer = pretrain.build_tokenizer(SENTENCES, 300)
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == len(tokenizer) - 1, (
        "as T5's, the first mark is the last token"
    )
    text = pretrain.Text(SENTENCES, tokenizer, seed=0)
    whole, marks = text.tokens.tolist(), range(text.first_extra_id - 99, text.first_extra_id + 1)
    inputs, mask, labels = text.corrupted(20, 32)
    for row, own, label in zip(inputs.tolist(), mask.tolist(), labels.tolist(), strict=True):
        row, label = row[: sum(own)], [token for token in label if token != -100]
        assert row[-1] == label[-1] == tokenizer.eos_token_id
        stretches, mark = {}, None
        for token in label[:-1]:
            if token in marks:
                mark = token
                stretches[mark] = []
            else:
                stretches[mark].append(token)
        back = [piece for token in row[:-1] for piece in (stretches[token] if token in marks else [token])]
        assert len(back) == 32 and any(whole[start : start + 32] == back for start in range(len(whole) - 31))
        assert sum(map(len, stretches.values())) == round(32 * pretrain.NOISE)
        assert sorted(stretches, reverse=True) == list(
            range(text.first_extra_id, text.first_extra_id - len(stretches), -1)
        )


def test_the_loss_of_vectors_is_nothing_for_the_vectors_themselves(pretrain):
    vectors = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert pretrain.vector_loss(3 * vectors, vectors).item() == pytest.approx(0, abs=1e-5)
    assert pretrain.vector_loss(-vectors, vectors).item() > 2


class LengthEncoder:
    """Stands in for a sentence encoder: the vector of a sentence is its length and its number of vowels."""

    def __init__(self):
        self.read = []
        self.model = argparse.Namespace(device=torch.device("cpu"), config=argparse.Namespace(hidden_size=2))

    def __call__(self, sentences):
        self.read += sentences
        return torch.tensor([[len(sentence), sum(letter in "aeiou" for letter in sentence)] for sentence in sentences])


def test_each_sentence_is_taught_once_an_epoch_and_encoded_once_in_all(pretrain):
    encoder = LengthEncoder()
    lengths = np.array([len(sentence) for sentence in SENTENCES])
    taught = pretrain.Taught(SENTENCES, lengths, encoder, count=4, seed=0)
    for _ in range(3):
        seen = []
        while len(seen) < len(SENTENCES):
            sentences, vectors = next(taught)
            assert torch.equal(vectors, LengthEncoder()(sentences).float())
            seen += sentences
        assert sorted(seen) == sorted(SENTENCES)
    assert sorted(encoder.read) == sorted(SENTENCES)


def test_words_pass_through_before_the_first_step(pretrain):
    """The decoder's first state is the mean of the normalised word embeddings, turned nowhere."""
    tokenizer = pretrain.build_tokenizer(SENTENCES, 300)
    torch.manual_seed(0)
    model = pretrain.build_model(tokenizer, argparse.Namespace(width=64, layers=2, decoder_layers=2)).eval()
    pretrain.pass_words_through(model)
    with torch.no_grad():
        states = pretrain.first_states(model, tokenizer, SENTENCES[:1])[0]
        words = model.shared.weight[tokenizer(SENTENCES[0])["input_ids"]]
        lengths = words.square().mean(1, keepdim=True).sqrt()
        mean = (words / lengths).mean(0) * 2 + model.shared.weight[0]
    assert torch.cosine_similarity(states, mean, dim=0) > 0.999


def test_a_dictionary_becomes_sentences(english_text, tmp_path):
    (tmp_path / "data.noun").write_text(
        '  1 licence text\n00001 05 n 01 dog 0 000 | a member of the genus Canis; "the dog barked all night"; tame\n'
    )
    for part in ("verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("")
    assert sorted(english_text.wordnet(tmp_path)) == ["a member of the genus Canis", "the dog barked all night"]
    (tmp_path / "gcide").write_bytes(gzip.compress(
        b"Dog \\Dog\\, n. [AS. docga]\n   1. (Zool.) A quadruped of the genus {Canis}. It is kept by man. --Bailey.\n   [1913]\n"
    ))  # fmt: skip
    assert english_text.gcide(tmp_path / "gcide") == ["A quadruped of the genus Canis .", "It is kept by man."]


def test_text_that_cannot_be_read_is_one_line(english_text, tmp_path):
    with pytest.raises(SystemExit, match=r"error: --text .*missing.txt: No such file"):
        english_text.english([tmp_path / "missing.txt"])


@pytest.mark.slow
def test_a_stand_in_is_made_from_any_text(pretrain, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(
        "\n".join(f"{sentence} {number} times" for number in range(100) for sentence in SENTENCES)
    )
    out = tmp_path / "t5"
    flags = ["--text", tmp_path / "text.txt", "--sentence_encoder", "none", "--minutes", 0.05, "--output_dir", out]
    monkeypatch.setattr("sys.argv", ["pretrain_t5.py", *map(str, flags), "--width", "64", "--words", "400"])
    pretrain.main()
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) + pretrain.SPARE_ROWS and (out / "pretraining.json").exists()
