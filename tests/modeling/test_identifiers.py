"""Identifiers: look-ups, what is refused, and the two files they are kept in."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hub_server import HubServer

from imagedex.modeling.identifier_quantizers import KMeansTree, ResidualQuantizer
from imagedex.modeling.identifiers import FACTS_FILE, TENSORS_FILE, Identifiers, names_fingerprint
from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EOS = 1
SEQUENCES = {"a.jpg": [5, 6], "dogs/b 1.jpg": [5], "ü.png": [7, 7, 7]}


def identifiers(scheme="naive", **fields):
    return Identifiers.from_sequences(scheme, list(SEQUENCES), list(SEQUENCES.values()), EOS, **fields)


def quantized():
    quantizer = ResidualQuantizer(torch.arange(24, dtype=torch.float32).view(2, 4, 3))
    facts = {"seed": 3, "vectors": {"model": "x", "split": None}}
    return identifiers("rq", quantizer=quantizer, new_tokens={"<code_0_1>": 5}, known_tokens={"7": 7}, source=facts)


def test_look_ups():
    own = identifiers()
    assert len(own) == 3 and own.max_length == 4
    for row, (image_id, sequence) in enumerate(SEQUENCES.items()):
        assert own.sequence(image_id) == sequence
        assert own.labels(image_id) == [*sequence, EOS]
        assert own.row(image_id) == row and image_id in own
        for written in (sequence, [*sequence, EOS], [*sequence, EOS, 0, 0], [*sequence, EOS, EOS]):
            assert own.image_id_of(written) == image_id
    for written in ([], [5, 7], [5, 6, 6], [7, 7], [0, 5], [-1], [99], [EOS], [7, 7, 7, 0]):
        assert own.image_id_of(written) is None
    assert "c.jpg" not in own
    with pytest.raises(KeyError, match="'c.jpg' has no identifier here"):
        own.sequence("c.jpg")


def test_padded_labels():
    own = identifiers()
    assert own.padded().tolist() == [[5, 6, 1, -100], [5, 1, -100, -100], [7, 7, 7, 1]]
    assert own.padded([2, 1], fill=0).tolist() == [[7, 7, 7, 1], [5, 1, 0, 0]]


def test_what_is_refused():
    build = Identifiers.from_sequences
    for arguments, message in [
        (("digits", ["a"], [[5]]), "scheme 'digits' is none of"),
        (("naive", [], []), "no pictures"),
        (("naive", ["a", "b", "a"], [[5], [6], [7]]), "'a' is there twice"),
        (("naive", ["a", "b"], [[5]]), "1 sequences for 2 pictures"),
        (("naive", ["a", "b"], [[5], []]), "identifier of 'b' is empty"),
        (("naive", ["a", "b"], [[5], [5]]), "a and b have the same identifier"),
        (("naive", ["a", "b"], [[5], [5, EOS]]), "end-of-sequence token 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(*arguments, EOS)
    with pytest.raises(ValueError, match="offsets do not fit"):
        Identifiers("naive", ["a"], [5, 6], [0, 1], EOS)


def test_fingerprint_names_the_gallery_whatever_the_order():
    expected = hashlib.sha256(b"".join(f"{len(n.encode())}:{n}".encode() for n in sorted(SEQUENCES))).hexdigest()
    assert identifiers().fingerprint == expected == names_fingerprint(reversed(list(SEQUENCES)))
    assert names_fingerprint(["ab", "c"]) != names_fingerprint(["a", "bc"])
    assert identifiers().fingerprint != names_fingerprint([*SEQUENCES, "d"])


def test_identifiers_of_another_gallery_are_told():
    own = identifiers()
    own.check_gallery(reversed(list(SEQUENCES)))
    with pytest.raises(ValueError, match="another gallery: 1 of its 4 pictures have no identifier and 0 of the 3"):
        own.check_gallery([*SEQUENCES, "new.jpg"])
    with pytest.raises(ValueError, match=r"0 of its 2 .* 1 of the 3 identifiers .*'a.jpg' is not in the gallery"):
        own.check_gallery(list(SEQUENCES)[1:])


def test_another_tokenizer_is_told():
    tokenizer = train_tokenizer(["a red circle"] * 3, 60)
    tokenizer.add_tokens(["<image_0>"])
    new, digit = tokenizer.convert_tokens_to_ids(["<image_0>", "7"])
    identifiers(new_tokens={"<image_0>": new}, known_tokens={"7": digit}).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=f"use '<image_0>' as token {new + 1}, but this tokenizer has {new} for it"):
        identifiers(new_tokens={"<image_0>": new + 1}).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="'7' as token 4000"):
        identifiers(known_tokens={"7": 4000}).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="'<image_1>' as token 8, but"):
        identifiers(new_tokens={"<image_1>": 8}).check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="end with token 9, .* end-of-sequence token is 1"):
        Identifiers.from_sequences("naive", ["a"], [[5]], 9).check_tokenizer(tokenizer)


@pytest.mark.parametrize("make", [identifiers, quantized])
def test_saved_and_loaded_the_same_bytes_each_time(make, tmp_path):
    own = make()
    own.save_pretrained(tmp_path / "one")
    found = Identifiers.from_pretrained(tmp_path / "one")
    found.save_pretrained(tmp_path / "two")
    make().save_pretrained(tmp_path / "two" / "three")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {TENSORS_FILE, FACTS_FILE}
    for name in (TENSORS_FILE, FACTS_FILE):
        written = (tmp_path / "one" / name).read_bytes()
        assert written == (tmp_path / "two" / name).read_bytes() == (tmp_path / "two" / "three" / name).read_bytes()

    for name in ("scheme", "image_ids", "eos_token_id", "new_tokens", "known_tokens", "source", "fingerprint"):
        assert getattr(found, name) == getattr(own, name)
    np.testing.assert_array_equal(found.tokens, own.tokens)
    np.testing.assert_array_equal(found.offsets, own.offsets)
    if own.quantizer is not None:
        assert torch.equal(found.quantizer.codebooks, own.quantizer.codebooks)
    arrays = safetensors.numpy.load_file(tmp_path / "one" / TENSORS_FILE)
    assert arrays["tokens"].dtype == np.int32 and arrays["tokens"].tolist() == [5, 6, 5, 7, 7, 7]
    assert arrays["offsets"].tolist() == [0, 2, 3, 6]


def test_a_tree_comes_back_too(tmp_path):
    tree = KMeansTree(torch.tensor([0, 2, 2, 2]), torch.tensor([[0.0, 1.0], [5.0, 5.0]]))
    identifiers("semantic", quantizer=tree).save_pretrained(tmp_path)
    found = Identifiers.from_pretrained(tmp_path).quantizer
    assert torch.equal(found.child_offsets, tree.child_offsets) and torch.equal(found.centroids, tree.centroids)
    assert found.encode(torch.tensor([[4.0, 4.0], [0.0, 0.0]])).tolist() == [2, 1]


def test_saving_over_others_and_half_a_pair(tmp_path):
    identifiers().save_pretrained(tmp_path)
    before = (tmp_path / TENSORS_FILE).read_bytes()
    quantized().save_pretrained(tmp_path)
    assert Identifiers.from_pretrained(tmp_path).scheme == "rq"
    (tmp_path / TENSORS_FILE).write_bytes(before)
    with pytest.raises(ValueError, match="are not of one another"):
        Identifiers.from_pretrained(tmp_path)


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(OSError, match=FACTS_FILE):
        Identifiers.from_pretrained(tmp_path)
    identifiers().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / FACTS_FILE).read_text())
    for content in ("{", "[]", json.dumps({k: v for k, v in facts.items() if k != "scheme"})):
        (tmp_path / FACTS_FILE).write_text(content)
        with pytest.raises(ValueError, match="are broken"):
            Identifiers.from_pretrained(tmp_path)
    (tmp_path / FACTS_FILE).write_text(json.dumps(facts | {"format_version": 99}))
    with pytest.raises(ValueError, match="newer version"):
        Identifiers.from_pretrained(tmp_path)
    (tmp_path / FACTS_FILE).write_text(json.dumps(facts))
    (tmp_path / TENSORS_FILE).unlink()
    with pytest.raises(OSError, match=TENSORS_FILE):
        Identifiers.from_pretrained(tmp_path)


def test_from_the_hub(tmp_path):
    quantized().save_pretrained(tmp_path / "model")
    script = (
        "import sys; from imagedex.modeling.identifiers import Identifiers; "
        "Identifiers.from_pretrained('someone/model').save_pretrained(sys.argv[1])"
    )
    with HubServer() as hub:
        hub.add("someone/model", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
        environment = os.environ | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "copy")], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in (TENSORS_FILE, FACTS_FILE):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
