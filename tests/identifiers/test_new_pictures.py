"""Pictures that a model was not trained on: codes by hand, captions that must not enter, encoders that are not the right one."""

import csv
import shutil

import pytest
import torch

from imagedex.corpora import load_corpus, split_corpus
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.identifiers.generative_model import load_generative
from imagedex.identifiers.new_pictures import NewPictures, agreement
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.retrieval.gallery import read_gallery

FLAG = "--identifier_vectors_from"


@pytest.fixture(scope="module")
def gallery(picture_folder):
    return read_gallery(str(picture_folder))


@pytest.fixture(scope="module")
def vectors(gallery, tiny_xmatching):
    """(23, 16): every picture of the gallery as the XMatchingModel embeds it."""
    encoder = load_dual_encoder(str(tiny_xmatching))
    return encode_images(encoder.model, encoder.image_processor, gallery)


@pytest.fixture(scope="module")
def models(save_generative, gallery_ids, vectors, tmp_path_factory):
    """Models that know the first eighteen pictures, by scheme."""
    folder, first = tmp_path_factory.mktemp("models"), gallery_ids[:18]
    assert len(gallery_ids) == 23
    saved = {}
    for scheme, vectors_are in (("rq", "xmatching"), ("semantic", "xmatching"), ("rq", "text"), ("naive", None)):
        saved[f"{scheme} {vectors_are}"] = save_generative(
            folder / f"{scheme}_{vectors_are}", "codebook_t5", scheme, first, vectors[:18], vectors_are
        )
    return saved


def adder(gallery, asked=(), vectors_from=None, vectors_of="images"):
    return NewPictures(vectors_from, vectors_of, gallery, asked)


def nearest_codes(quantizer, vector):
    """Residual quantisation of one vector by plain arithmetic."""
    codes = []
    for codebook in quantizer.codebooks:
        distances = [(vector - centroid).square().sum().item() for centroid in codebook]
        codes.append(distances.index(min(distances)))
        vector = vector - codebook[codes[-1]]
    return codes


def code_texts(identifiers, image_id):
    text_of = {token: text for text, token in identifiers.new_tokens.items()}
    return [text_of[token] for token in identifiers.sequence(image_id)]


def test_new_pictures_get_the_code_of_their_own_vector(models, gallery, gallery_ids, vectors, tiny_xmatching):
    parts = load_generative(str(models["rq xmatching"]))
    new = gallery_ids[18:]
    extended = adder(gallery, vectors_from=str(tiny_xmatching)).identifiers(parts, new)
    assert extended.image_ids == gallery_ids and extended.added_image_ids == new
    for image_id in gallery_ids[:18]:
        assert extended.sequence(image_id) == parts.identifiers.sequence(image_id)
    for row, image_id in enumerate(new, start=18):
        codes = nearest_codes(extended.quantizer, vectors[row])
        assert code_texts(extended, image_id)[:-1] == [f"<code_{level}_{code}>" for level, code in enumerate(codes)]


def test_semantic_identifiers_go_down_the_same_tree(models, gallery, gallery_ids, vectors, tiny_xmatching):
    parts = load_generative(str(models["semantic xmatching"]))
    extended = adder(gallery, vectors_from=str(tiny_xmatching)).identifiers(parts, gallery_ids[18:])
    digits = [int(text.strip("▁")) for text in extended.known_tokens]
    digit_of = dict(zip(extended.known_tokens.values(), digits, strict=True))
    tree = extended.quantizer
    for row, image_id in enumerate(gallery_ids):
        if row < 18:
            continue
        node, way = 0, []
        while tree.child_offsets[node] < tree.child_offsets[node + 1]:
            start, end = tree.child_offsets[node : node + 2].tolist()
            distances = (tree.centroids[start:end] - vectors[row]).square().sum(1).tolist()
            way.append(distances.index(min(distances)))
            node = start + way[-1] + 1
        assert [digit_of[token] for token in extended.sequence(image_id)][: len(way)] == way


def test_vectors_of_another_encoder_are_noticed(models, gallery, gallery_ids, tiny_xmatching, tiny_clip, tmp_path):
    parts, new = load_generative(str(models["rq xmatching"])), gallery_ids[18:]
    other = shutil.copytree(tiny_xmatching, tmp_path / "other")
    torch.manual_seed(7)
    XMatchingModel(XMatchingModel.from_pretrained(tiny_xmatching).config).save_pretrained(other)
    for folder in (other, tiny_clip):  # of the same width, of another one
        with pytest.raises(
            UserError, match=rf"only .* of 18 trained pictures get the code.*{FLAG} .* is another model"
        ):
            adder(gallery, vectors_from=str(folder)).identifiers(parts, new)


def test_agreement_counts_codes_alone(models, vectors, gallery_ids):
    for scheme in ("rq", "semantic"):
        identifiers = load_generative(str(models[f"{scheme} xmatching"])).identifiers
        assert agreement(identifiers, gallery_ids[:18], vectors[:18]) == 1
        # the suffix (or the place in the leaf) may differ: a picture whose vector is another's has the other's code
        copies = torch.stack([vectors[0]] * 18)
        same = sum(
            bool(
                (identifiers.quantizer.encode(vectors[row : row + 1]) == identifiers.quantizer.encode(copies[:1])).all()
            )
            for row in range(18)
        )
        assert 0 < agreement(identifiers, gallery_ids[:18], copies) == same / 18 < 1


def test_what_cannot_take_new_pictures_says_why(models, gallery, gallery_ids, tiny_xmatching):
    def refused(name, *parts, **wanted):
        with pytest.raises(UserError) as raised:
            adder(gallery, **wanted).identifiers(load_generative(str(models[name])), gallery_ids[18:])
        assert "\n" not in str(raised.value)
        for part in parts:
            assert part in str(raised.value)

    refused("naive None", "naive identifiers cannot take new pictures")
    refused("rq text", "made from the words of the training captions", "--identifier_vectors vision")
    refused("rq xmatching", f"give its folder with {FLAG}")
    refused("rq xmatching", FLAG, "is not a folder", vectors_from="./nowhere")


def test_the_models_own_vision_tower(save_generative, gallery, gallery_ids, tiny_xmatching, tmp_path):
    drawn = save_generative(tmp_path / "drawn", "vision_grounded_t5", "naive", gallery_ids[:18])
    parts = load_generative(str(drawn))
    means = []
    for row in range(23):
        picture = gallery[row]["image"].convert("RGB")
        pixels = parts.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = parts.model.vision_model(pixel_values=pixels).last_hidden_state[0]
        means.append(states.mean(0))
    means = torch.stack(means)
    model = save_generative(tmp_path / "model", "vision_grounded_t5", "rq", gallery_ids[:18], means[:18], "vision")
    tower = parts.model.vision_model.state_dict()
    parts = load_generative(str(model))
    parts.model.vision_model.load_state_dict(tower)
    extended = adder(gallery).identifiers(parts, gallery_ids[18:])
    for row, image_id in enumerate(gallery_ids[18:], start=18):
        codes = nearest_codes(extended.quantizer, means[row])
        assert code_texts(extended, image_id)[:-1] == [f"<code_{level}_{code}>" for level, code in enumerate(codes)]
    with pytest.raises(UserError, match=f"{FLAG}: .* own vision tower"):
        adder(gallery, vectors_from=str(tiny_xmatching)).identifiers(parts, gallery_ids[18:])
    with torch.no_grad():  # as if it had been trained since
        for parameter in parts.model.vision_model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    with pytest.raises(UserError, match="its vision tower has learned since"):
        adder(gallery).identifiers(parts, gallery_ids[18:])


class TestCaptions:
    """Vectors of new pictures from their captions: twelve pictures of four captions, one of each held out."""

    @pytest.fixture
    def rows(self, flickr_folder):
        return read_gallery(dataset_name=str(flickr_folder), held_out=(1, 5))

    @pytest.fixture
    def parts(self, rows, tiny_xmatching, save_generative, tmp_path):
        encoder = load_dual_encoder(str(tiny_xmatching))
        vectors = encode_images(encoder.model, encoder.image_processor, rows)
        ids = rows["image_id"][:9]
        return load_generative(str(save_generative(tmp_path / "m", "codebook_t5", "rq", ids, vectors[:9], "xmatching")))

    def test_held_out_captions_are_not_in_the_rows(self, rows, flickr_folder, tmp_path):
        splits = split_corpus(
            load_corpus(str(flickr_folder)), held_out_captions_per_image=1, split_seed=5
        )  # as in training
        assert rows["image_id"][:] == splits.train["image_id"][:]
        assert rows["captions"][:] == splits.train["captions"][:] and all(len(own) == 3 for own in rows["captions"])
        every = read_gallery(dataset_name=str(flickr_folder), held_out=(0, 5))
        assert all(len(own) == 4 for own in every["captions"])

    def test_captions_of_a_split_that_is_asked_are_used_only_when_some_of_each_are_held_out(
        self, tmp_path, flickr_folder
    ):
        folder = tmp_path / "own"
        for split, start in (("train", 0), ("validation", 6)):
            (folder / split).mkdir(parents=True)
            with open(flickr_folder / "captions.txt", newline="") as file:
                rows = list(csv.DictReader(file))
            names = sorted({row["image"] for row in rows})[start : start + 6]
            lines = ["file_name,text\n"] + [
                f'{row["image"]},"{row["caption"]}"\n' for row in rows if row["image"] in names
            ]
            (folder / split / "metadata.csv").write_text("".join(lines))
            for name in names:
                shutil.copy(flickr_folder / "images" / name, folder / split)

        def counts(held_out):
            rows = read_gallery(dataset_name=str(folder), held_out=held_out)
            return {len(own) for own in rows["captions"][:6]}, {len(own) for own in rows["captions"][6:]}

        assert counts((0, 0)) == ({4}, {0}) and counts((1, 0)) == ({3}, {3}) and counts(None) == ({4}, {4})

    def test_the_mean_of_what_may_be_used(self, rows, parts, tiny_xmatching):
        model = XMatchingModel.from_pretrained(tiny_xmatching).eval()
        tokenizer = RetrievalProcessor.from_pretrained(tiny_xmatching).tokenizer
        new = rows["image_id"][9:]
        captions = dict(zip(rows["image_id"], rows["captions"], strict=True))
        asked = captions[new[0]][1]  # somebody asks a caption that is not held out: it is left out too
        wanted = {"vectors_from": str(tiny_xmatching), "vectors_of": "captions"}
        extended = adder(rows, [asked.upper() + "!"], **wanted).identifiers(parts, new)
        for image_id in new:
            own = [caption for caption in captions[image_id] if caption != asked]
            assert len(own) == (2 if image_id == new[0] else 3)
            with torch.no_grad():
                units = [
                    model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0] for text in own
                ]
            mean = torch.nn.functional.normalize(torch.stack(units).mean(0), dim=0)
            codes = nearest_codes(extended.quantizer, mean)
            assert code_texts(extended, image_id)[:-1] == [f"<code_{level}_{code}>" for level, code in enumerate(codes)]

    def test_a_picture_without_a_caption_that_may_be_used(self, rows, parts, tiny_xmatching):
        new = rows["image_id"][9:]
        wanted = {"vectors_from": str(tiny_xmatching), "vectors_of": "captions"}
        with pytest.raises(UserError, match=r"1 of 3 new pictures have no caption .* 'yellow_green.jpg'"):
            target = new.index("yellow_green.jpg")
            adder(rows, rows["captions"][9 + target], **wanted).identifiers(parts, new)
