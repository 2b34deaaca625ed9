"""The cards of generative models say what the run did, and nothing that it did not."""

from types import SimpleNamespace

import pytest
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig

from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.cards import CardFacts, write_dsi_card
from imagedex.training.generative.arguments import DSITrainingArguments

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8,
       "image_size": 16}  # fmt: skip
FIGURES = {"eval_hits@1": 0.5, "eval_hits@5": 0.75, "eval_hits@10": 1.0, "eval_mrr": 0.625, "eval_queries": 4,
           "eval_gallery_size": 2}  # fmt: skip
MEMORISED = {"eval_memorised": 0.5, "eval_memorised_samples": 2, "eval_gallery_size": 2, "eval_loss": 1.0}


def build(kind):
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**T5))
    model_class = CodebookT5 if kind == "codebook_t5" else VisionGroundedT5
    return model_class.from_t5_vision_pretrained(t5_config=T5, vision_config=ViTConfig(**VIT))


CASES = {
    # name: (kind, step, mix, metrics, what is said, what is not)
    "codebook": ("codebook_t5", "retrieval", "1 picture rows", FIGURES | MEMORISED,
                 ["0.625", "50.0 % are memorised", "learned in one run (1 picture rows)"], ["Nothing was held out"]),
    "captions alone": ("codebook_t5", "retrieval", None, FIGURES, ["Only captions were learned"], ["learned in one run"]),
    "pictures alone": ("codebook_t5", "indexing", None, MEMORISED,
                       ["Only pictures were learned", "Captions come in the second run"], ["Hits@1", "Nothing was held"]),
    "first step": ("vision_grounded_t5", "indexing", None, MEMORISED,
                   ["This is the first step", "Captions come in the second step"], ["Hits@1", "None captions"]),
    "second step": ("vision_grounded_t5", "retrieval", None, FIGURES, ["This is the second step", "0.625"], []),
    "nothing held out": ("vision_grounded_t5", "retrieval", None, {}, ["Nothing was held out"], ["Hits@1"]),
    "plain": ("t5", "retrieval", None, FIGURES, ["0.625", "never seen"], ["vision tower"]),
    "captioning": ("codebook_t5", "captioning", None, {"eval_loss": 1.5, "eval_queries": 4},
                   ["4 captions that were not trained on: 1.500 nats a token"], ["identifiers_scheme", "Hits@1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_card_says_what_was_done(tmp_path, name):
    kind, step, mix, metrics, said, unsaid = CASES[name]
    identifiers = Identifiers.from_sequences("atomic", ["a", "b"], [[5], [6]], 1)
    trainer = SimpleNamespace(
        model=build(kind),
        args=DSITrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True),
        processing_class=SimpleNamespace(prompt="ask: "),
        identifiers=None if step == "captioning" else identifiers,
    )
    facts = CardFacts("photos", "2 pictures, 3 captions", "Held out.", metrics=metrics)
    write_dsi_card(tmp_path / "README.md", trainer, facts, ("captions", "pictures"), step, mix)
    card = (tmp_path / "README.md").read_text()
    for text in ["2 pictures, 3 captions", "1 encoder and 1 decoder layers of width 16", *said]:
        assert text in card, card
    for text in ["{{", "None", *unsaid]:
        assert text not in card, card
    if step != "captioning":
        assert "`atomic`" in card and (kind != "t5" or 'writes "ask: "' in card)
