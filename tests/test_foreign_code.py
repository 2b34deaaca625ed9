"""Saved models and kept files need no pickle, bring no code: whatever lies in a folder, none of it runs, and nobody is asked.

A planted pickle or module leaves a mark when it runs. Standard input says "y" to every question, as `yes |` would.
"""

import builtins
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

from imagedex.checkpoints import from_hub
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.store import Store
from imagedex.errors import UserError
from imagedex.evaluation.baselines import TextEncoder
from imagedex.identifiers.generative_model import load_generative
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor, SentenceProcessor
from imagedex.modeling.two_towers import is_two_towers, load_two_towers

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL, vocab_size=30)),
    "vit": lambda: ViTModel(ViTConfig(**SMALL, image_size=16, patch_size=8)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}
AUTO = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
WAYS_IN = {
    "dual encoder": load_dual_encoder,
    "generative model": load_generative,
    "text encoder": TextEncoder,
    "towers": lambda name: XMatchingModel.from_text_vision_pretrained(name, name),
    "two towers": lambda name: is_two_towers(name, name) and load_two_towers(name),
    "T5": lambda name: CodebookT5.from_t5_vision_pretrained(name, name),
    "our model": XMatchingModel.from_pretrained,
    "our processor": RetrievalProcessor.from_pretrained,
    "our sentence processor": SentenceProcessor.from_pretrained,
    "identifiers": Identifiers.from_pretrained,
    "caption bank": CaptionBank.from_pretrained,
}  # fmt: skip


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What must not be there at the end, nor a question have been asked."""
    path, asked = tmp_path / "it ran", []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield path
    assert not path.exists() and not asked


def foreign(folder, mark, model_type):
    """A folder that brings code for every Auto class."""
    if model_type in MODELS:
        MODELS[model_type]().save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    (folder / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "theirs.py", folder / "custom_generate" / "generate.py")
    auto_map = {name: "theirs.Theirs" for name in AUTO}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {"model_type": model_type}
        if name == "tokenizer_config.json":
            known |= {"tokenizer_class": "Theirs"}
        path.write_text(json.dumps(known | {"auto_map": auto_map}))
    return folder


def bombed(folder, mark, model_type):
    """A folder whose weights, and all else that is binary, are pickles."""
    MODELS[model_type]().save_pretrained(folder)
    bomb = pickle.dumps({"weights": Bomb(mark)})
    (folder / "model.safetensors").unlink()
    for name in (
        "pytorch_model.bin",
        "identifiers.safetensors",
        "caption_bank.safetensors",
        "training_args.bin",
        "spiece.model",
    ):
        (folder / name).write_bytes(bomb)
    (folder / "identifiers.json").write_text(json.dumps({"format_version": 1, "tensors_sha256": "0" * 64}))
    return folder


def tried(way, folder):
    try:
        WAYS_IN[way](str(folder))
    except Exception as error:  # whatever it is, what counts is that nothing ran
        return str(error)
    return ""


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("model_type", ["theirs", *MODELS])
def test_code_that_a_folder_brings_is_not_run(tmp_path, mark, way, model_type):
    tried(way, foreign(tmp_path / "model", mark, model_type))


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("model_type", MODELS)
def test_pickles_are_not_run(tmp_path, mark, way, model_type):
    tried(way, bombed(tmp_path / "model", mark, model_type))


def test_the_line_says_how_to_let_it(tmp_path, mark):
    assert "--trust_remote_code" in tried("dual encoder", foreign(tmp_path / "model", mark, "theirs"))


def test_the_loaders_of_a_training_ask_for_no_code(tmp_path, mark):
    """As the flags of towers, tokenizer and teacher are read."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    folder = foreign(tmp_path / "model", mark, "theirs")
    for kind in (AutoConfig, AutoTokenizer, AutoImageProcessor):
        with pytest.raises(UserError, match="cannot load --tokenizer_name"):
            from_hub(kind.from_pretrained, str(folder), "tokenizer_name")


def test_a_model_whose_marks_would_be_seen(tmp_path, mark):
    """Or the tests above would prove nothing."""
    with open(bombed(tmp_path / "model", mark, "bert") / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert mark.exists()
    mark.unlink()
    from transformers import AutoConfig

    with pytest.raises(Exception):  # noqa: B017  their module has no such class
        AutoConfig.from_pretrained(foreign(tmp_path / "other", mark, "theirs"), trust_remote_code=True)
    assert mark.exists()
    mark.unlink()


def test_kept_files_that_are_pickles_are_made_anew(tmp_path, mark):
    keys = np.zeros((1, 16), np.uint8)
    store = Store(tmp_path / "store", {"model": "m"})
    store.write(keys, vectors=np.ones((1, 2), np.float32))
    (shard,) = store.folder.glob("shard-*")
    shard.write_bytes(pickle.dumps(Bomb(mark)))
    store.reload()
    assert store.missing(keys).tolist() == [0]
    (store.folder / "store.json").write_bytes(pickle.dumps(Bomb(mark)))
    assert Store(store.folder, {"model": "m"}).missing(keys).tolist() == [0]
