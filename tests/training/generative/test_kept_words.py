"""What `--keep_states` keeps for a CodebookT5: each patch's nearest word by hand, of this model's codebook and no other."""

from types import SimpleNamespace

import torch
from transformers import ViTImageProcessorPil

from imagedex.corpora import load_corpus
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.training.generative.data import keep_vision_states
from imagedex.training.pictures import Pictures, stacked


def kept_of(model, flickr_folder, folder):
    """(the rows that a run gets, the files that it keeps)."""
    pictures = Pictures(
        load_corpus(str(flickr_folder)).splits["train"], ViTImageProcessorPil(size={"height": 16, "width": 16})
    )
    args = SimpleNamespace(device="cpu", keep_dir=str(folder), per_device_eval_batch_size=5, dataloader_num_workers=0)
    before = set(folder.rglob("*.safetensors"))
    rows = keep_vision_states(model, pictures, stacked, args)
    return rows, pictures, set(folder.rglob("*.safetensors")) - before


def codebook_t5(seed=0, **fields):
    torch.manual_seed(seed)
    t5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
           "intermediate_size": 16, "image_size": 16, "patch_size": 4}  # fmt: skip
    return CodebookT5.from_t5_vision_pretrained(
        t5_config=t5, vision_config=vit, **{"num_visual_tokens": 5, "visual_token_selection": "even"} | fields
    )


def test_a_fixed_codebook_keeps_an_integer_a_patch(flickr_folder, tmp_path):
    model = codebook_t5()
    kept, pictures, files = kept_of(model, flickr_folder, tmp_path)
    assert len(kept) == 12 and kept[3]["image_states"].shape == (16,) and kept[3]["image_states"].dtype == torch.int32
    assert sum(path.stat().st_size for path in files) < 12 * (16 * 4 + 16) + 1000
    for row in (0, 7):
        by_hand = model.vision_states(pictures[row]["pixel_values"][None])[0, 1:]
        cosines = torch.cosine_similarity(by_hand[:, None], model.shared.weight[None, 3:60], dim=-1)
        assert torch.equal(kept[row]["image_states"], (cosines.argmax(-1) + 3).int())
    learned, _, _ = kept_of(codebook_t5(quantization="learned"), flickr_folder, tmp_path)
    assert learned[0]["image_states"].shape == (17, 32)


def test_words_of_another_codebook_or_selection_are_never_taken(flickr_folder, tmp_path):
    first = codebook_t5()
    kept, _, files = kept_of(first, flickr_folder, tmp_path)
    assert files and not kept_of(first, flickr_folder, tmp_path)[2], "the same model keeps nothing twice"
    moved = codebook_t5()
    with torch.no_grad():  # T5 has learned, its codebook is as it was
        moved.shared.weight.add_(1.0)
    assert not kept_of(moved, flickr_folder, tmp_path)[2]
    with torch.no_grad():
        moved.codebook.words[59, -1] += 1.0
    assert kept_of(moved, flickr_folder, tmp_path)[2], "one number of the codebook is another"
    attended, _, files = kept_of(codebook_t5(visual_token_selection="attention"), flickr_folder, tmp_path)
    assert files and attended[0]["image_states"].shape == (4,)
    for count in (5, 6):  # states of a learned codebook: the patches attended to, and how many
        fields = {"quantization": "learned", "visual_token_selection": "attention", "num_visual_tokens": count}
        attended, _, files = kept_of(codebook_t5(**fields), flickr_folder, tmp_path)
        assert files and attended[0]["image_states"].shape == (count, 32)
