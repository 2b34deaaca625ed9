"""transformers' pipeline over saved models: in a process in which nothing of this repository can be imported, and here."""

import json
import shutil

import numpy as np
import pytest
import torch
from elsewhere import run_elsewhere
from PIL import Image
from transformers import pipeline

from imagedex.modeling import GENERATIVE
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.modeling.constrained_decoding import score_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor

TASK = "text-to-image-retrieval"
SENTENCES = ["a red dog", "the grass is green, and blue on the left side", "yellow"]
IMAGE_IDS = [f"{number}.jpg" for number in range(9)]

# What strangers do; sentences one by one and in batches.
ASK = """
from transformers import pipeline
options = json.loads(sys.argv[2])
pipe = pipeline("text-to-image-retrieval", model=name, trust_remote_code=True, device="cpu", **options.pop("made"))
sentences = options.pop("sentences")
found = [pipe(sentence, **options) for sentence in sentences]
images = {"images": options.pop("images")} if "images" in options else {}  # the pipeline has kept them
together = [pipe(sentences, batch_size=2, **options), list(pipe((one for one in sentences), **options))]
pipe.save_pretrained("again")
again = pipeline(model="again", trust_remote_code=True, device="cpu", **images)  # the one task that it has
print(json.dumps({"found": [found, *together, again(sentences, **options)], "saved": sorted(os.listdir("again"))}))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Paths of nine pictures, the last of them the first again."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for image_id in IMAGE_IDS:
        coarse = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(folder / image_id)
    shutil.copy(folder / IMAGE_IDS[0], folder / IMAGE_IDS[-1])
    return [str(folder / image_id) for image_id in IMAGE_IDS]


@pytest.fixture(scope="module")
def dual_encoder(tiny_xmatching, tmp_path_factory):
    """XMatchingModel with a bank against hubs, saved."""
    folder = tmp_path_factory.mktemp("model") / "dual"
    shutil.copytree(tiny_xmatching, folder)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=-1)
    CaptionBank(vectors, 3).save_pretrained(folder)
    return folder


def best(scores, top_k: int) -> list[list[int]]:
    """Places by falling score, equal ones by place."""
    return [sorted(range(len(row)), key=lambda place: (-row[place], place))[:top_k] for row in scores.tolist()]


def scores_by_hand(folder, paths) -> torch.Tensor:
    """(sentences, pictures): cosines less the biases, by the model's parts, one input at a time."""
    model, processor = XMatchingModel.from_pretrained(folder).eval(), RetrievalProcessor.from_pretrained(folder)
    with torch.no_grad():
        texts = [processor(text=[sentence], return_tensors="pt") for sentence in SENTENCES]
        texts = torch.cat([model.get_text_features(**text).pooler_output for text in texts])
        shown = [processor(images=[path], return_tensors="pt") for path in paths]
        shown = torch.cat([model.get_image_features(**image).pooler_output for image in shown])
    bank = torch.nn.functional.normalize(model.caption_bank.vectors.double(), dim=-1)
    bias = (shown.double() @ bank.T).sort(dim=1, descending=True).values[:, :3].mean(1) / 2
    return texts.double() @ shown.double().T - bias


def test_strangers_ask_a_dual_encoder(tmp_path, dual_encoder, pictures):
    options = {"made": {"images": pictures[:2]}, "sentences": SENTENCES, "images": pictures, "top_k": 4}
    done = run_elsewhere(ASK, tmp_path / "elsewhere", dual_encoder, json.dumps(options), HF_HOME=str(tmp_path / "home"))
    scores = scores_by_hand(dual_encoder, pictures)
    for found in done["found"]:
        assert [[one["index"] for one in own] for own in found] == best(scores.float(), 4)
        for own, row in zip(found, scores, strict=True):
            assert [one["image"] for one in own] == [pictures[one["index"]] for one in own]
            assert [one["score"] for one in own] == pytest.approx([row[one["index"]].item() for one in own], abs=1e-5)
    assert {"retrieval_pipeline.py", "caption_bank.safetensors", "processor_config.json"} <= set(done["saved"])


@pytest.mark.parametrize("kind", ["codebook_t5", "vision_grounded_t5"])
def test_strangers_ask_a_model_that_writes_identifiers(tmp_path, save_generative, kind):
    folder = save_generative(tmp_path / "model", kind, "naive", IMAGE_IDS)
    options = {"made": {}, "sentences": SENTENCES, "top_k": 4}
    done = run_elsewhere(ASK, tmp_path / "elsewhere", folder, json.dumps(options), HF_HOME=str(tmp_path / "home"))
    model, processor = GENERATIVE[kind].from_pretrained(folder), RetrievalProcessor.from_pretrained(folder)
    identifiers = Identifiers.from_pretrained(folder)
    scores = score_identifiers(model, identifiers, dict(processor(text=SENTENCES, return_tensors="pt")))
    for found in done["found"]:
        places = [[identifiers.image_ids.index(one["image_id"]) for one in own] for own in found]
        assert places == best(scores, 4)
        for own, row, at in zip(found, scores, places, strict=True):
            assert [one["score"] for one in own] == pytest.approx(row[at].tolist(), abs=1e-4)
    assert {"retrieval_pipeline.py", "identifiers.json", "processor_config.json"} <= set(done["saved"])


def test_a_picture_is_encoded_once_and_anew_when_its_file_has_changed(dual_encoder, pictures, tmp_path):
    paths = [str(shutil.copy(path, tmp_path)) for path in pictures]
    pipe = pipeline(TASK, model=str(dual_encoder), trust_remote_code=True, device="cpu", batch_size=4)
    seen, encode = [], pipe.model.get_image_features
    pipe.model.get_image_features = lambda **inputs: seen.append(len(inputs["pixel_values"])) or encode(**inputs)
    first = pipe(SENTENCES, images=paths)
    assert seen == [4, 4, 1]
    assert pipe(SENTENCES, images=paths) == pipe(SENTENCES) == first and seen == [4, 4, 1]
    shutil.copy(paths[2], paths[5])
    changed = {one["index"]: one["score"] for one in pipe(SENTENCES[0], images=paths)}
    assert seen == [4, 4, 1, 1] and changed[5] == pytest.approx(changed[2], abs=1e-6)
    opened = [Image.open(path) for path in paths]
    found = pipe(SENTENCES[0], images=opened)
    assert {one["index"]: one["score"] for one in found} == pytest.approx(changed, abs=1e-6)
    assert all(one["image"] is opened[one["index"]] for one in found)


def test_vectors_that_were_kept_are_searched(dual_encoder, pictures):
    pipe = pipeline(TASK, model=str(dual_encoder), trust_remote_code=True, device="cpu")
    found, vectors = pipe(SENTENCES, images=pictures, top_k=3), pipe.image_embeds
    pipe.encode_images = None  # nothing is encoded
    assert pipe(SENTENCES, images=pictures, image_embeds=vectors.numpy(), top_k=3) == found
    alone = pipe(SENTENCES, image_embeds=2 * vectors, top_k=3)
    assert [[one["index"] for one in own] for own in alone] == [[one["index"] for one in own] for own in found]
    assert all(set(one) == {"index", "score"} for own in alone for one in own)


def test_what_cannot_be_heeded_is_said(dual_encoder, pictures, save_generative, tmp_path):
    dual = pipeline(TASK, model=str(dual_encoder), trust_remote_code=True, device="cpu")
    folder = save_generative(tmp_path / "model", "codebook_t5", "naive", IMAGE_IDS)
    writer = pipeline(TASK, model=str(folder), trust_remote_code=True, device="cpu")
    for pipe, options, said in (
        (dual, {}, "which pictures"),
        (dual, {"images": []}, "one or more"),
        (dual, {"images": pictures, "image_embeds": np.eye(2, 16)}, "9 images and 2 vectors"),
        (dual, {"images": pictures, "num_beams": 3}, "num_beams is for models that write"),
        (dual, {"images": pictures, "top_k": 0}, "top_k must be 1 or more"),
        (writer, {"images": pictures}, "names the pictures that it learned"),
        (writer, {"num_beams": 0}, "num_beams must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe("a red dog", **options)
    with pytest.raises(ValueError, match="a sentence is wanted, not int"):
        writer(3)
    assert writer([]) == [] and len(writer("a red dog", top_k=99)) == len(IMAGE_IDS)
