"""A saved generative model stands alone: fresh process, another folder, nothing of this repository importable."""

import json

import pytest
import torch
from elsewhere import picture, run_elsewhere
from transformers import ViTImageProcessorPil

from imagedex.modeling.constrained_decoding import rank_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.tokenizer import train_tokenizer

SENTENCES = ["a dog in the snow", "two birds on a wire"]

SCRIPT = """
config = AutoConfig.from_pretrained(name, trust_remote_code=True)

def answers(folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    os.makedirs("below", exist_ok=True)
    os.chdir("below")  # a model asked later, from another folder
    found = model.retrieve(json.loads(sys.argv[2]), num_beams=3) + model.retrieve(images=[picture], num_beams=3)
    (alone,) = model.retrieve(json.loads(sys.argv[2])[0], num_beams=3)
    assert [image_id for image_id, _ in alone] == [image_id for image_id, _ in found[0]]
    os.chdir("..")
    return model, processor, model.load_identifiers(), found

model, processor, identifiers, found = answers(name)
assert type(AutoModel.from_pretrained(name, trust_remote_code=True)).__name__ == type(model).__name__
for part in (model, processor, identifiers):
    part.save_pretrained("again")
assert answers("again")[-1] == found
assert type(AutoModel.from_pretrained("again", trust_remote_code=True)).__name__ == type(model).__name__
auto_map = json.load(open("again/config.json"))["auto_map"]
print(json.dumps({"model_type": config.model_type, "found": found, "saved": sorted(os.listdir("again")),
                  "auto_map": auto_map, "frozen": not any(p.requires_grad for p in model.vision_model.parameters())}))
"""


@pytest.mark.parametrize("kind", ["codebook_t5", "vision_grounded_t5"])
def test_a_saved_model_works_without_this_repository(tmp_path, tiny_picture_t5, kind):
    tokenizer = train_tokenizer(SENTENCES * 3, 60)
    image_processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor = RetrievalProcessor(image_processor, tokenizer, prompt="question: ", clean_text=True)
    fields = {"quantization": "learned"} if kind == "codebook_t5" else {}
    model = tiny_picture_t5(kind, t5={"vocab_size": len(tokenizer)}, **fields).eval()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    sequences = [[digits[i], digits[(3 * i) % 10]] for i in range(7)]
    identifiers = Identifiers.from_sequences("naive", [f"{i}.jpg" for i in range(7)], sequences, eos_token_id=1)
    for part in (model, processor, identifiers):
        part.save_pretrained(tmp_path / "model")

    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = run_elsewhere(SCRIPT, tmp_path / "elsewhere", tmp_path / "model", json.dumps(SENTENCES), **home)

    text = tokenizer([f"question: {sentence}" for sentence in SENTENCES], padding=True, return_tensors="pt")
    image = image_processor(images=[picture()], return_tensors="pt")
    ranked = [rank_identifiers(model, identifiers, dict(inputs), 3) for inputs in (text, image)]
    scores, rows = (torch.cat(parts).tolist() for parts in zip(*ranked, strict=True))
    expected = [
        [(f"{row}.jpg", score) for row, score in zip(*own, strict=True)] for own in zip(rows, scores, strict=True)
    ]
    assert len(expected) == 3 and all(len(ranking) == 3 for ranking in expected)
    for ranking, ours in zip(found["found"], expected, strict=True):
        assert [image_id for image_id, _ in ranking] == [image_id for image_id, _ in ours]
        torch.testing.assert_close(
            torch.tensor([score for _, score in ranking]), torch.tensor([score for _, score in ours])
        )
    assert found["model_type"] == kind and found["frozen"]
    class_name = f"modeling_{kind}.{type(model).__name__}"
    assert found["auto_map"]["AutoModel"] == found["auto_map"]["AutoModelForSeq2SeqLM"] == class_name
    code = {f"modeling_{kind}.py", f"configuration_{kind}.py", "picture_t5.py", "processing_retrieval.py", "towers.py"}
    assert code | {"constrained_decoding.py", "identifiers.py", "identifiers.safetensors"} <= set(found["saved"])
