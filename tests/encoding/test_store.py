"""Shards on disk: a stopped run goes on and gives what an unstopped one gives; another model's shards are refused."""

import json

import pytest
import torch

from imagedex.encoding import store as vector_index
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.store import encode_gallery, gallery_fingerprint, model_fingerprint, read_vectors
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.retrieval.gallery import read_gallery


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return load_dual_encoder(str(tiny_clip))


@pytest.fixture
def parts(encoder, picture_folder):
    return encoder.model, encoder.image_processor, read_gallery(str(picture_folder))


def test_shards_hold_what_encoding_at_once_gives(parts, tmp_path):
    vectors = encode_gallery(*parts, tmp_path, batch_size=3, rows_per_shard=10)
    torch.testing.assert_close(vectors, encode_images(*parts), atol=2e-6, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        *(f"vectors-0000{number}.safetensors" for number in range(3)),  # 23 pictures
    ]
    image_ids, read = read_vectors(tmp_path)
    assert image_ids == list(parts[2]["image_id"]) and torch.equal(read, vectors)


def test_a_stopped_run_goes_on_where_it_was(parts, tmp_path, monkeypatch):
    model, image_processor, gallery = parts
    whole = encode_gallery(*parts, tmp_path / "whole", batch_size=3, rows_per_shard=5)

    encoded = []

    def counting(pixel_values, honest=model.get_image_features):
        if len(encoded) == 5:  # in the middle of the third shard
            raise KeyboardInterrupt
        encoded.append(len(pixel_values))
        return honest(pixel_values=pixel_values)

    monkeypatch.setattr(model, "get_image_features", counting)
    with pytest.raises(KeyboardInterrupt):
        encode_gallery(*parts, tmp_path / "stopped", batch_size=3, rows_per_shard=5)
    assert len(list((tmp_path / "stopped").glob("vectors-*"))) == 2
    with pytest.raises(UserError, match="not finished"):
        read_vectors(tmp_path / "stopped")

    encoded.clear()
    monkeypatch.setattr(model, "get_image_features", lambda pixel_values, go=counting: go(pixel_values))
    monkeypatch.undo()
    honest = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixel_values: encoded.append(len(pixel_values)) or honest(pixel_values)
    )
    resumed = encode_gallery(*parts, tmp_path / "stopped", batch_size=3, rows_per_shard=999)
    assert sum(encoded) == len(gallery) - 10  # two shards of five were there
    assert torch.equal(resumed, whole)

    encoded.clear()
    assert torch.equal(encode_gallery(*parts, tmp_path / "stopped"), whole) and not encoded


def test_damaged_or_foreign_shards_are_encoded_again(parts, tmp_path, caplog):
    whole = encode_gallery(*parts, tmp_path, rows_per_shard=5)
    first, second, third = sorted(tmp_path.glob("vectors-*"))[:3]
    first.write_bytes(first.read_bytes()[:-8])
    third.write_bytes(second.read_bytes())
    torch.testing.assert_close(encode_gallery(*parts, tmp_path), whole, atol=2e-6, rtol=0)
    assert "is damaged" in caplog.text and "belongs to another index" in caplog.text
    assert second.read_bytes() != third.read_bytes()


def test_an_index_of_another_model_or_gallery_is_refused(parts, tmp_path):
    model, image_processor, gallery = parts
    encode_gallery(*parts, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="another gallery"):
        encode_gallery(model, image_processor, gallery.select(range(22)), tmp_path)
    weight = model.visual_projection.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    try:
        with pytest.raises(UserError, match="another model"):
            encode_gallery(*parts, tmp_path)
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1e-3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    manifest = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(manifest | {"format": 999}))
    with pytest.raises(UserError, match="another format"):
        vector_index.check_index(tmp_path, manifest["model"], manifest["gallery"])
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not an index"):
        encode_gallery(*parts, tmp_path)


def test_the_fingerprints_see_what_matters(encoder, tiny_clip, picture_folder, tmp_path):
    again = load_dual_encoder(str(tiny_clip))
    known = model_fingerprint(encoder.model, encoder.image_processor)
    assert model_fingerprint(again.model, again.image_processor) == known
    assert model_fingerprint(again.model.to(torch.bfloat16), again.image_processor) != known
    again = load_dual_encoder(str(tiny_clip))
    again.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert model_fingerprint(again.model, again.image_processor) != known

    (tmp_path / "a.png").write_bytes((picture_folder / "copy.png").read_bytes())
    first = gallery_fingerprint(read_gallery(str(tmp_path)))
    assert gallery_fingerprint(read_gallery(str(tmp_path))) == first
    other = next(picture_folder.glob("*.png"))
    (tmp_path / "a.png").write_bytes(other.read_bytes() + b"\0")
    assert gallery_fingerprint(read_gallery(str(tmp_path))) != first


def test_embedded_pictures_have_a_fingerprint_too(picture_folder):
    paths = read_gallery(str(picture_folder)).select(range(3))
    embedded = paths.map(
        lambda row: {"image": {"bytes": (picture_folder / row["image_id"]).read_bytes(), "path": None}}
    )
    assert gallery_fingerprint(embedded) == gallery_fingerprint(embedded.select(range(3)))
    assert gallery_fingerprint(embedded) != gallery_fingerprint(embedded.select([0, 1, 1]))


def test_no_index(tmp_path):
    with pytest.raises(UserError, match="no index"):
        read_vectors(tmp_path)
