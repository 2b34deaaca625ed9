"""What a run leaves: baselines whose encoder does not fit must not cost a training."""

import logging

import pytest
from transformers import T5Config, T5EncoderModel

from imagedex.corpora import load_corpus, split_corpus
from imagedex.errors import UserError
from imagedex.training.results import baselines
from imagedex.training.tokenizer import train_tokenizer


@pytest.fixture
def t5(tmp_path):
    train_tokenizer(["red on the left"], 50).save_pretrained(tmp_path)
    T5EncoderModel(T5Config(d_model=8, num_layers=1, num_heads=1, d_kv=8, d_ff=8, vocab_size=50)).save_pretrained(
        tmp_path
    )
    return str(tmp_path)


def test_a_tower_that_is_no_text_encoder_leaves_its_row_out_and_a_named_encoder_is_an_error(flickr_folder, t5, caplog):
    splits = split_corpus(load_corpus(str(flickr_folder)), held_out_captions_per_image=1)
    with caplog.at_level(logging.WARNING, logger="imagedex"):
        assert list(baselines(splits, None, t5)) == ["BM25"]
    assert "no row of caption vectors" in caplog.text
    with pytest.raises(UserError, match="not a text encoder alone"):
        baselines(splits, t5, None)
    assert list(baselines(splits, None, None)) == ["BM25"]
