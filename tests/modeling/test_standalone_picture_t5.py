"""A saved generative model stands alone: fresh process, another folder, nothing of this repository importable."""

import json

import pytest
import torch
from elsewhere import picture, run_elsewhere
from transformers import ViTImageProcessorPil

from imagedex.training.tokenizer import train_tokenizer
from modeling.identifiers import Identifiers
from modeling.processing_picture_t5 import PictureT5Processor

SENTENCES = ["a dog in the snow", "two birds on a wire"]

SCRIPT = """
config = AutoConfig.from_pretrained(name, trust_remote_code=True)

def answers(folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    text = processor(text=json.loads(sys.argv[2]), padding=True, return_tensors="pt")
    image = processor(images=[picture], return_tensors="pt")
    identifiers = model.load_identifiers()
    found = model.retrieve(identifiers, num_beams=3, **text) + model.retrieve(identifiers, num_beams=3, **image)
    return model, processor, identifiers, found

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
    processor = PictureT5Processor(
        image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=tokenizer
    )
    fields = {"quantization": "learned"} if kind == "codebook_t5" else {}
    model = tiny_picture_t5(kind, t5={"vocab_size": len(tokenizer)}, **fields).eval()
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    sequences = [[digits[i], digits[(3 * i) % 10]] for i in range(7)]
    identifiers = Identifiers.from_sequences("naive", [f"{i}.jpg" for i in range(7)], sequences, eos_token_id=1)
    for part in (model, processor, identifiers):
        part.save_pretrained(tmp_path / "model")

    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = run_elsewhere(SCRIPT, tmp_path / "elsewhere", tmp_path / "model", json.dumps(SENTENCES), **home)

    text = processor(text=SENTENCES, padding=True, return_tensors="pt")
    image = processor(images=[picture()], return_tensors="pt")
    expected = model.retrieve(identifiers, 3, **text) + model.retrieve(identifiers, 3, **image)
    assert len(expected) == 3 and all(len(ranking) == 3 for ranking in expected)
    for ranking, ours in zip(found["found"], expected, strict=True):
        assert [image_id for image_id, _ in ranking] == [image_id for image_id, _ in ours]
        torch.testing.assert_close(
            torch.tensor([score for _, score in ranking]), torch.tensor([score for _, score in ours])
        )
    assert found["model_type"] == kind and found["frozen"]
    class_name = f"modeling_{kind}.{type(model).__name__}"
    assert found["auto_map"]["AutoModel"] == found["auto_map"]["AutoModelForSeq2SeqLM"] == class_name
    code = {f"modeling_{kind}.py", f"configuration_{kind}.py", "picture_t5.py", "processing_picture_t5.py", "towers.py"}
    assert code | {"constrained_decoding.py", "identifiers.py", "identifiers.safetensors"} <= set(found["saved"])
