"""The package: one import root, what is in the wheel, and an installed wheel that trains, asks and is read in another folder."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("modeling", "configuration", "metrics", "recipes", "model_cards", "accelerate_configs")
EXTRAS = ("timm", "torchvision", "wandb", "trackio", "tensorboard", "gradio", "faiss", "pymilvus", "pillow_heif")

# Imports the modules named, where the extras cannot be imported. Prints what is loaded from where.
IMPORT_ALL = """
import importlib, json, os, sys
names, blocked = map(json.loads, sys.argv[1:])
sys.modules |= dict.fromkeys(blocked)  # None: an import of it is an ImportError
for name in names:
    importlib.import_module(name)
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name != "__main__"}
print(json.dumps({name: os.path.realpath(file) for name, file in files.items() if file and os.path.isabs(file)}))
"""

# Nothing of the checkout can be imported here, and imagedex is the one that was installed in the folder named.
WHERE = """
import importlib.util, sys
import imagedex
assert all(path.startswith(sys.argv[1]) for path in imagedex.__path__), imagedex.__path__
assert imagedex.__file__.startswith(sys.argv[1])
for name in ("modeling", "configuration", "metrics", "run_xmatching", "conftest", "benchmarks"):
    assert importlib.util.find_spec(name) is None, name
import imagedex.retrieval, imagedex.metrics.hits_at_k.hits_at_k
"""

RELOAD = """
import importlib.util, json, sys
assert importlib.util.find_spec("imagedex") is None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(text=[sys.argv[2]], return_tensors="pt")
print(json.dumps(model.get_text_features(**inputs).pooler_output.tolist()))
"""

SMALL = [
    "--dataset_config_name", "24", "--max_steps", "3", "--per_device_train_batch_size", "8", "--use_cpu", "--report_to", "none",
    "--text_config", json.dumps({"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                 "intermediate_size": 32}),
    "--vision_config", json.dumps({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                   "layer_type": "basic"}),
    "--disable_tqdm", "true", "--image_size", "32",
]  # fmt: skip


OF_EXTRAS = ("imagedex.page.page", "imagedex.page.server")  # of `demo`; the command says what to install


def modules(files) -> list[str]:
    """`imagedex/a/b.py`, `modeling/c.py` -> the names by which they are imported."""
    names = set()
    for file in files:
        parts = [part for part in Path(file).with_suffix("").parts if part != "__init__"]
        names.add(".".join(parts if parts[0] == "imagedex" else ["imagedex", *parts]))
    return sorted(names)


def checkout_modules() -> list[str]:
    folders = [ROOT / name for name in ("imagedex", "modeling", "configuration", "metrics")]
    files = [*ROOT.glob("run_*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return modules(path.relative_to(ROOT) for path in files)


def loaded_by(names: list[str], blocked=(), **where) -> dict[str, str]:
    """name of a module -> its file, after all of the names were imported in a fresh process."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(names), json.dumps(list(blocked))]
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_without_the_extras_and_under_one_name():
    names = [name for name in checkout_modules() if name not in OF_EXTRAS]
    assert {"imagedex.cli", "imagedex.modeling.modeling_xmatching", "imagedex.run_dsi"} <= set(names)
    files = loaded_by(names, blocked=EXTRAS, cwd=ROOT)  # where `import modeling` would be possible too
    ours = [(file, name) for name, file in files.items() if file.startswith(str(ROOT)) and "site-packages" not in file]
    assert {name for _, name in ours} == {*names, "imagedex"}
    assert len({file for file, _ in ours}) == len(ours)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(ROOT), "--no-build-isolation", "-w", str(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that has the wheel installed in it."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(folder))
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_wheel_has_all_it_needs_in_one_folder_and_nothing_else(wheel):
    files = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in files} == {"imagedex"}
    assert modules(name for name in files if name.endswith(".py")) == checkout_modules()
    ours = subprocess.run(["git", "-C", str(ROOT), "ls-files", *SHIPPED], capture_output=True, text=True)
    if ours.returncode:
        pytest.skip("not a git checkout")
    assert {f"imagedex/{name}" for name in ours.stdout.splitlines() if (ROOT / name).exists()} <= set(files)
    assert not any(part in ("tests", "benchmarks", "docs") for name in files for part in Path(name).parts)


def test_the_sdist_builds_and_has_what_a_wheel_is_built_from(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    assert {"imagedex", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "run_dsi.py", *SHIPPED} <= tops


def test_an_installed_wheel_trains_asks_and_is_read_in_another_folder(installed, tmp_path):
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    apart = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))} | caches
    environment = apart | {"PYTHONPATH": str(installed)}

    def imagedex(*arguments):
        """The console command, as pip has made it."""
        command = [sys.executable, str(installed / "bin" / "imagedex"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    subprocess.run([sys.executable, "-c", WHERE, str(installed)], cwd=tmp_path, env=environment, check=True)
    assert imagedex("--help").startswith("usage: imagedex COMMAND")
    assert "quickstart/xmatching " in imagedex("recipes")

    said = imagedex("xmatching", "quickstart/xmatching", *SMALL, "--output_dir", "model")
    assert f"I recipe: {installed / 'imagedex' / 'recipes' / 'quickstart' / 'xmatching.yaml'}" in said
    trained = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert "shape_scenes" in (tmp_path / "model" / "README.md").read_text()

    imagedex("retrieval", "--model_name_or_path", "model", "--dataset_name", "shape_scenes", "--dataset_config_name", 24,
             "--queries", "model/eval_queries.csv", "--output_dir", "answers", "--device", "cpu")  # fmt: skip
    asked = json.loads((tmp_path / "answers" / "metrics.json").read_text())
    assert asked["mrr"] == pytest.approx(trained["eval_mrr"])

    sentence = "a red ball"
    command = [sys.executable, "-c", RELOAD, "model", sentence]
    done = subprocess.run(command, cwd=tmp_path, env=apart, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor = (kind.from_pretrained(tmp_path / "model") for kind in (XMatchingModel, RetrievalProcessor))
    with torch.no_grad():
        expected = model.eval().get_text_features(**processor(text=[sentence], return_tensors="pt")).pooler_output
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
