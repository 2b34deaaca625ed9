"""Maria's own vision tower, ResNeXt-101 32x8d through timm: her recipe trains on it, and her file converts to it and is asked.

Weights are random, the architecture is the real one; nothing is downloaded.
"""

import csv
import json

import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_models import tiny_tokenizer
from transformers import BertConfig, BertModel

from imagedex import DATA
from imagedex.encoding.index import read_vectors
from imagedex.training.dual_encoder import convert_maria

pytestmark = pytest.mark.pretrained
NAME = "resnext101_32x8d"
SETTINGS = {
    "architecture": NAME, "input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of a small BERT with its tokenizer, and of timm's network as its towers lie on the Hub."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    folder = tmp_path_factory.mktemp("towers")
    tokenizer = tiny_tokenizer(max_length=80)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    config = {"architecture": NAME, "num_classes": 1000, "pretrained_cfg": SETTINGS}
    tower = TimmWrapperModel(TimmWrapperConfig.from_dict(config))
    tower.save_pretrained(folder / "resnext")
    return folder


@pytest.fixture(scope="module")
def lxmert(tmp_path_factory, flickr_folder):
    """Twelve pictures in the form of the original's corpus: eight to train on, four to validate."""
    folder = tmp_path_factory.mktemp("lxmert")
    with open(flickr_folder / "captions.txt", newline="") as file:
        captions = {}
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    (folder / "data" / "lxmert").mkdir(parents=True)
    rows = {"mscoco_train": [], "mscoco_nominival": [], "mscoco_minival": []}
    for number, (name, sentences) in enumerate(captions.items()):
        split = ("mscoco_train", "mscoco_nominival", "mscoco_minival")[number % 3]
        place = "train2014" if split == "mscoco_train" else "val2014"
        target = folder / "data" / "mscoco" / "images" / place / f"COCO_{place}_{number:012d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(flickr_folder / "images" / name).save(target)
        rows[split].append({"img_id": target.stem, "labelf": {}, "sentf": {"mscoco": sentences}})
    for split, content in rows.items():
        (folder / "data" / "lxmert" / f"{split}.json").write_text(json.dumps(content))
    return folder


def test_her_recipe_trains_and_her_file_is_asked(launch, towers, lxmert, tmp_path):
    recipe = DATA / "recipes" / "coco" / "xmatching_maria.yaml"
    flags = ["--text_model_name_or_path", towers / "bert", "--vision_model_name_or_path", towers / "resnext"]
    done = launch(
        "run_xmatching.py", recipe, *flags, "--max_steps", 2, "--per_device_train_batch_size", 8, "--use_cpu",
        "--per_device_eval_batch_size", 8, "--dataloader_num_workers", 0, "--output_dir", tmp_path / "trained", cwd=lxmert,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "trained" / "eval_results.json").read_text())
    assert (results["eval_queries"], results["eval_gallery_size"]) == (16, 4)

    # her file of this model: its names are torchvision's, its batch norms are frozen ones
    ours = safetensors.torch.load_file(tmp_path / "trained" / "model.safetensors")
    theirs = {}
    for name, value in ours.items():
        side, _, rest = name.partition("_")
        part, _, rest = rest.partition(".")
        side = {"text": "lang_model", "vision": "visn_model"}[side]
        rest = rest.removeprefix("timm_model.")
        rest = f"mlp.{rest.replace('layers.', 'linears.')}" if part == "head" else f"backbone.{rest}"
        if not rest.endswith("num_batches_tracked"):
            theirs[f"module.{side}.{rest}"] = value
    assert "module.visn_model.backbone.layer3.22.bn2.running_var" in theirs
    torch.save(theirs, tmp_path / "BEST.pth")
    convert_maria.main(list(map(str, [tmp_path / "BEST.pth", tmp_path / "maria", *flags])))

    (tmp_path / "queries.txt").write_text("red beside green\nthe left side is blue\n")
    pictures = lxmert / "data" / "mscoco" / "images"
    asked = launch(
        "run_retrieval.py", "--model_name_or_path", tmp_path / "maria", "--image_dir", pictures, "--queries",
        tmp_path / "queries.txt", "--output_dir", tmp_path / "answers", "--device", "cpu", "--num_workers", 0,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    names, kept, _ = read_vectors(tmp_path / "answers" / "index")
    expected = by_timm([pictures / name for name in names], ours)
    assert kept.shape == (12, 512)
    torch.testing.assert_close(kept, expected, atol=1e-4, rtol=0)


def by_timm(paths, ours):
    """(N, 512) unit vectors by timm's own network and transform, and the head written out."""
    import timm

    network = timm.create_model(NAME, pretrained=False, num_classes=0).eval()
    prefix = "vision_model.timm_model."
    weights = {name.removeprefix(prefix): value for name, value in ours.items() if name.startswith(prefix)}
    network.load_state_dict(weights)
    size = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"}
    transform = timm.data.create_transform(**size, mean=SETTINGS["mean"], std=SETTINGS["std"])
    with torch.no_grad():
        x = network(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))  # (N, 2048)
        for layer in range(3):
            x = x.relu() if layer else x
            x = x @ ours[f"vision_head.layers.{layer}.weight"].T + ours[f"vision_head.layers.{layer}.bias"]
    return x / x.norm(dim=-1, keepdim=True)
