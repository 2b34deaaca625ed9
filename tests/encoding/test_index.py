"""The vectors of a gallery on disk: the same as encoding at once; new pictures alone are encoded; another model is refused."""

import numpy as np
import pytest
import torch

from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.index import encode_gallery, open_index, read_vectors
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.retrieval.gallery import read_gallery


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return load_dual_encoder(str(tiny_clip))


@pytest.fixture
def parts(encoder, picture_folder):
    return encoder.model, encoder.image_processor, read_gallery(str(picture_folder))


def encode(folder, model, image_processor, gallery, bank=None, **options):
    return encode_gallery(
        open_index(folder, model, image_processor, bank), model, image_processor, gallery, bank, **options
    )


def test_the_index_holds_what_encoding_at_once_gives(parts, tmp_path):
    vectors, bias = encode(tmp_path, *parts, batch_size=3, rows_per_shard=10)
    torch.testing.assert_close(vectors, encode_images(*parts), atol=2e-6, rtol=0)
    assert bias is None and len(list(tmp_path.glob("shard-*"))) == 3  # 23 pictures
    image_ids, read, bias = read_vectors(tmp_path)
    assert image_ids == list(parts[2]["image_id"]) and torch.equal(read, vectors) and bias is None


def test_new_pictures_alone_are_encoded_and_get_their_bias(parts, tmp_path, monkeypatch, caplog):
    model, image_processor, gallery = parts
    bank = CaptionBank(torch.nn.functional.normalize(torch.randn(40, model.config.projection_dim), dim=1))
    first, first_bias = encode(tmp_path, model, image_processor, gallery.select(range(20)), bank)
    encoded, honest = [], model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda pixel_values: encoded.append(len(pixel_values)) or honest(pixel_values)
    )
    with caplog.at_level("INFO"):
        vectors, bias = encode(tmp_path, *parts, bank)
    assert sum(encoded) == 3 and "20 of 23 pictures are in" in caplog.text
    assert torch.equal(vectors[:20], first) and torch.equal(bias[:20], first_bias)  # the others' are as they were
    kept = bank.vectors.float()
    cosines = np.sort(vectors.numpy() @ (kept / kept.norm(dim=1, keepdim=True)).numpy().T, axis=1)
    np.testing.assert_allclose(bias, cosines[:, -5:].mean(1) / 2, atol=1e-5)
    assert torch.equal(read_vectors(tmp_path)[2], bias)


def test_an_index_of_another_model_or_bank_is_refused(parts, tmp_path):
    model, image_processor, _ = parts
    encode(tmp_path, *parts)
    with pytest.raises(UserError, match="index of another bank"):
        open_index(tmp_path, model, image_processor, CaptionBank(torch.eye(4)))
    weight = model.visual_projection.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    try:
        with pytest.raises(UserError, match="index of another model"):
            open_index(tmp_path, model, image_processor)
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1e-3


def test_every_flipped_byte_of_the_gallery_is_found(parts, tmp_path):
    model, image_processor, gallery = parts
    encode(tmp_path, model, image_processor, gallery.select(range(2)))
    path = tmp_path / "gallery.json"
    content, unharmed = path.read_bytes(), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            read_vectors(tmp_path)
        except UserError as error:
            assert "is damaged" in str(error)
        else:
            unharmed += 1
    assert unharmed <= len("checksum")  # its name, without which it is an index as it used to be
    encode(tmp_path, model, image_processor, gallery.select(range(2)))
    assert path.read_bytes() == content


def test_no_index(tmp_path):
    with pytest.raises(UserError, match="no finished index"):
        read_vectors(tmp_path)
