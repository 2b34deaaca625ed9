from transformers import AutoTokenizer

from imagedex.training.tokenizer import train_tokenizer

CAPTIONS = ["A small red circle", "a red square left of 12 circles", "the blue triangle"] * 20


def test_t5_layout_digits_alone_and_the_same_after_loading(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 120)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = found("Red CIRCLE 2047")["input_ids"]
        assert ids[-1] == 1 and 2 not in ids
        pieces = found.convert_ids_to_tokens(ids)
        assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["2", "0", "4", "7"]
        assert found.decode(ids, skip_special_tokens=True).split() == ["red", "circle", "2047"]
    assert found("Red CIRCLE")["input_ids"] == tokenizer("red circle")["input_ids"]
