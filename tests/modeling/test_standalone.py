"""A saved model stands alone: fresh process, another folder, nothing of this repository importable."""

import json

import torch
from elsewhere import picture, run_elsewhere
from transformers import ViTImageProcessorPil

from imagedex.configuration.configuration_xmatching import XMatchingConfig
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.tokenizer import train_tokenizer

SENTENCES = ["a dog in the snow", "two birds on a wire"]

SCRIPT = """
config = AutoConfig.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
batch = processor(text=json.loads(sys.argv[2]), images=[picture], padding=True, return_tensors="pt")
with torch.no_grad():
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    image = model.get_image_features(batch["pixel_values"]).pooler_output
model.save_pretrained("again"); processor.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again.get_image_features(batch["pixel_values"]).pooler_output, image)
AutoProcessor.from_pretrained("again", trust_remote_code=True)
frozen = not any(p.requires_grad for p in model.text_model.parameters())
print(json.dumps({"model_type": config.model_type, "text": text.tolist(), "image": image.tolist(),
                  "saved": sorted(os.listdir("again")), "frozen": frozen}))
"""


def test_a_saved_model_works_without_this_repository(tmp_path, text_config, vision_config):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(SENTENCES * 3, 60)
    processor = RetrievalProcessor(
        image_processor=ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer=tokenizer
    )
    model = XMatchingModel(
        XMatchingConfig(
            text_config=text_config | {"vocab_size": len(tokenizer)},
            vision_config=vision_config,
            text_pooling="first",
            text_pooling_layers=2,
            text_head="mlp",
            vision_head="mlp",
            loss_type="info_nce",
        )
    ).eval()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = run_elsewhere(SCRIPT, tmp_path / "elsewhere", tmp_path / "model", json.dumps(SENTENCES), **home)

    batch = processor(text=SENTENCES, images=[picture()], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    assert found["model_type"] == "xmatching" and found["frozen"]
    torch.testing.assert_close(torch.tensor(found["text"]), output.text_embeds)
    torch.testing.assert_close(torch.tensor(found["image"]), output.image_embeds)
    code = {"modeling_xmatching", "configuration_xmatching", "processing_retrieval", "losses", "gathering"}
    assert {f"{name}.py" for name in code} <= set(found["saved"])
