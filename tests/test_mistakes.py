"""Mistakes on the command line: each is one line, before the corpus is read and before anything is written."""

import json
import shutil
from types import SimpleNamespace

import pytest
import safetensors.numpy
import torch
import yaml
from transformers import ViTConfig, ViTModel

import imagedex.corpora
import imagedex.corpora.indexed
import imagedex.retrieval.gallery
import run_dsi
import run_image_indexing
import run_retrieval
import run_xmatching
from imagedex import endings
from imagedex.configuration.configuration_codebook_t5 import CodebookT5Config
from imagedex.errors import UserError
from imagedex.training.argument_checks import compiled

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = VIT | {"model_type": "bert"}
T5 = {"model_type": "t5", "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
TRAINING = {
    "dataset_name": "shape_scenes", "held_out_captions_per_image": 1, "do_train": True, "do_eval": True, "max_steps": 2,
    "vision_config": VIT, "image_size": 32, "report_to": "none",
}  # fmt: skip
RECIPES = {
    run_xmatching: TRAINING | {"text_config": BERT},
    run_dsi: TRAINING | {"model_type": "codebook_t5", "t5_config": T5},
    run_image_indexing: TRAINING | {"model_type": "codebook_t5", "t5_config": T5, "max_memorised_samples": 5},
}


class CorpusReadError(Exception):
    """Nothing was found wrong before the corpus."""


@pytest.fixture(autouse=True)
def no_corpus(monkeypatch):
    def read(*args, **kwargs):
        raise CorpusReadError

    monkeypatch.setattr(imagedex.corpora, "load_splits", read)
    monkeypatch.setattr(imagedex.corpora.indexed, "load_indexed_splits", read)
    monkeypatch.setattr(imagedex.corpora.indexed, "load_picture_splits", read)
    monkeypatch.setattr(imagedex.retrieval.gallery, "read_gallery", read)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def call(tmp_path):
    """call(script, *flags, **changes to the recipe)"""

    def run(script, *flags, **changes):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPES[script] | changes))
        script.main([str(recipe), "--output_dir", str(tmp_path / "out"), *map(str, flags)])

    return run


def refused(tmp_path, parts, action):
    with pytest.raises(UserError) as caught:
        action()
    line = endings.without_traceback(caught.value)
    assert "\n" not in line and len(line) < 1200
    for part in [parts] if isinstance(parts, str) else parts:
        assert part in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", RECIPES)
def test_without_a_mistake_the_corpus_is_read(call, script):
    with pytest.raises(CorpusReadError):
        call(script)


EVALUATED = ["--eval_strategy", "steps", "--eval_steps", 1]
NUMBERS = {
    "per_device_train_batch_size": [0, -2, 10**9],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0, -1],
    "num_train_epochs": [-3, "nan", "inf"],
    "max_steps": [-5],
    "learning_rate": ["nan", "inf", -1, 1e30],
    "vision_learning_rate": ["nan", -1],
    "text_learning_rate": ["inf"],
    "weight_decay": ["nan", -1],
    "adam_beta1": [2],
    "adam_epsilon": [-1],
    "max_grad_norm": ["nan", -1],
    "warmup_steps": [-1, "nan", "inf"],
    "label_smoothing_factor": [-1, 2],
    "seed": [-1, 2**32, 2**70],
    "data_seed": [-1, 2**70],
    "dataloader_num_workers": [-1, 100_000],
    "dataloader_prefetch_factor": [0],
    "logging_steps": [-5, "nan", 0],
    "eval_steps": [-1, "nan"],
    "save_steps": [0, -1],
    "save_total_limit": [-1],
    "ddp_timeout": [-1, 2**70],
    "image_size": [0, -1, 100_000],
    "max_text_length": [0, 10**9],
    "held_out_images": [1.5, "nan", -0.1],
    "held_out_captions_per_image": [-1],
    "max_train_samples": [0],
    "max_images": [0],
    "preprocessing_num_workers": [0, 100_000],
    "tokenizer_vocab_size": [0, 2**70],
    "split_seed": [2**70],
    "projection_dim": [0, -1, 10**9],
    "text_pooling_layers": [0, -1],
    "head_dropout": [2, "nan"],
    "head_hidden_sizes": [0, -5],
    "loss_margin": [0, "nan"],
    "logit_scale_init": ["inf", -1],
    "text_head_power": [0, "nan"],
    "hardest_warmup_steps": ["nan", "inf"],
    "lora_rank": [0, 10**6],
    "caption_bank_size": [-1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_their_bounds(call, tmp_path, name, value):
    refused(tmp_path, [f"--{name}", ": give "], lambda: call(run_xmatching, f"--{name}", value))


ARGUMENTS = {
    "unknown figure": ([*EVALUATED, "--metric_for_best_model", "accuracy"], ["accuracy", "hits@1"]),
    "best of no evaluations": (["--load_best_model_at_end", "true", "--save_strategy", "no"], "--eval_strategy"),
    "best, but which": ([*EVALUATED, "--save_strategy", "best"], "--metric_for_best_model"),
    "steps that do not fit": (
        [*EVALUATED, "--eval_steps", 2, "--save_steps", 3, "--load_best_model_at_end", "true"],
        "multiple",
    ),
    **{f"optimizer {name}": (["--optim", name], f"--optim {name} cannot work here") for name in (
        "galore_adamw", "lomo", "grokadamw", "schedule_free_adamw", "apollo_adamw", "stable_adamw", "adamw_torch_xla",
        "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit", "adamw_bnb_8bit",
    )},
    "optimizer's arguments": (["--optim", "sgd", "--optim_args", "fast"], "name=value"),
    "optimizer's number": (["--optim", "sgd", "--optim_args", "momentum=x"], "'x'"),
    **{f"schedule {name} alone": (["--lr_scheduler_type", name], f"--lr_scheduler_type {name}") for name in (
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    )},
    "schedule without evaluations": (["--lr_scheduler_type", "reduce_lr_on_plateau"], "eval strategy"),
    "schedule's unknown argument": (["--lr_scheduler_kwargs", '{"foo": 1}'], "foo"),
    "schedule's arguments are no mapping": (["--lr_scheduler_kwargs", "fast"], "give a mapping"),
    "schedule's arguments are broken": (["--lr_scheduler_kwargs", "{fast"], "not valid JSON"),
    "no deepspeed": (["--deepspeed", "{}"], "--deepspeed needs"),
    "no file of deepspeed": (["--deepspeed", "nowhere.json"], "nowhere.json cannot be read"),
    "no liger": (["--use_liger_kernel", "true"], "liger-kernel"),
    "one process shards": (["--fsdp", "full_shard"], "several processes"),
    "no file of fsdp": (["--fsdp_config", "nowhere.json"], "cannot be read"),
    "no such field": (["--accelerator_config", '{"foo": 1}'], "foo"),
    "noise": (["--neftune_noise_alpha", 5], "leave it out"),
    "layers looked into": (["--debug", "underflow_overflow"], "--debug"),
    "checkpointing": (["--activation_checkpointing_kwargs", '{"foo": 1}'], "'foo'"),
    "unknown compiler": (["--torch_compile_backend", "nope"], "give one of"),
    "unknown compiler's mode": (["--torch_compile", "true", "--torch_compile_mode", "nope"], "nope"),
    "helpers that stay": (["--dataloader_persistent_workers", "true"], "--dataloader_num_workers"),
    "helpers that spawn": (["--dataloader_multiprocessing_context", "spawn"], "--dataloader_num_workers"),
    "tracker": (["--report_to", "nope"], "nope"),
    "no folder": (["--output_dir", ""], "--output_dir is needed"),
    "baseline from nowhere": (["--baseline_text_encoder", "./nowhere"], "not a folder"),
    "head start alone": (["--head_start", "cca"], "--keep_states"),
    "unknown loss": (["--loss_type", "nope"], "invalid choice"),
    "pooling does not fit": (["--text_pooling", "pooler", "--text_pooling_layers", 2], "give 1"),
    "more layers than there are": (["--text_pooling_layers", 99], "has 1 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_cannot_work(call, tmp_path, case):
    flags, parts = ARGUMENTS[case]
    refused(tmp_path, parts, lambda: call(run_xmatching, *flags))


CONFIGS = {
    "a list": ([1], "must be a mapping"),
    "type is a number": ({"model_type": 5}, "model_type is 5"),
    "unknown type": ({"model_type": "nope"}, "nope"),
    "unknown field": (VIT | {"hiden_size": 3}, "did you mean hidden_size"),
    "negative size": (VIT | {"hidden_size": -5}, "--vision_config"),
    "no heads": (VIT | {"num_attention_heads": 0}, "no vit can be made of it"),
    "null": (VIT | {"num_hidden_layers": None}, "num_hidden_layers"),
    "huge picture": (VIT | {"image_size": 100_000}, "image_size 100000"),
    "huge": (VIT | {"hidden_size": 10**8}, "parameters"),
    "reads texts": (BERT, "a bert reads texts"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_towers_that_cannot_be_built(call, tmp_path, case):
    config, parts = CONFIGS[case]
    refused(tmp_path, parts, lambda: call(run_xmatching, "--vision_config", json.dumps(config)))


SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4}
TOO_SMALL = {  # (tower, pixels a side)
    "windows that do not fit": (SWIN | {"window_size": 7}, 48),
    "windows larger than the picture": (SWIN | {"window_size": 12}, 40),
    "one patch is larger": (VIT | {"patch_size": 64}, 48),
    "another size is said": (VIT | {"image_size": 32, "patch_size": 8}, 48),
    "layers halve it away": ({"model_type": "convnext", "hidden_sizes": [8] * 4, "depths": [1] * 4}, 20),
}
FITS = {
    "windows that fit": (SWIN | {"window_size": 4}, 48),
    "patches that leave an edge": (VIT | {"patch_size": 16}, 50),
    "whatever the size": ({"model_type": "resnet", "hidden_sizes": [8], "depths": [1], "embedding_size": 8}, 37),
}


@pytest.mark.parametrize("script", RECIPES)
@pytest.mark.parametrize("case", TOO_SMALL)
def test_a_tower_that_cannot_read_pictures_of_that_size(call, tmp_path, case, script):
    tower, side = TOO_SMALL[case]
    parts = ["--vision_config", f"this {tower['model_type']} cannot read pictures of {side}x{side} pixels"]
    refused(tmp_path, parts, lambda: call(script, vision_config=tower, image_size=side))


@pytest.mark.parametrize("case", FITS)
def test_a_tower_that_can(call, case):
    tower, side = FITS[case]
    with pytest.raises(CorpusReadError):
        call(run_xmatching, vision_config=tower, image_size=side)


def test_a_pretrained_tower_and_a_trained_model_with_another_image_processor(call, tmp_path, tiny_xmatching):
    ViTModel(ViTConfig(**{**VIT, "model_type": "vit"}, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    other = ["--image_processor_config", json.dumps({"size": {"height": 24, "width": 24}})]
    tower = {"vision_config": None, "image_size": None, "vision_model_name_or_path": str(tmp_path / "vit")}
    parts = ["--vision_model_name_or_path", "24x24 pixels"]
    refused(tmp_path, parts, lambda: call(run_xmatching, *other, **tower))
    whole = {"vision_config": None, "text_config": None, "image_size": None, "model_name_or_path": str(tiny_xmatching)}
    with pytest.raises(CorpusReadError):  # a ResNet
        call(run_xmatching, *other, **whole)


@pytest.mark.parametrize("missing", ["identifiers.json", "identifiers.safetensors", "both"])
@pytest.mark.parametrize("script", [run_dsi, run_image_indexing])
def test_a_model_without_its_identifiers_is_not_judged(call, tmp_path, script, missing):
    """Today's new ones would name nothing that it has learned."""
    model = tmp_path / "model"
    CodebookT5Config(vocab_size=20).save_pretrained(model)
    contents = {"identifiers.json": b"{}", "identifiers.safetensors": safetensors.numpy.save({})}
    for name in set() if missing == "both" else contents.keys() - {missing}:
        (model / name).write_bytes(contents[name])
    named = {
        "model_name_or_path": str(model),
        "model_type": None,
        "t5_config": None,
        "vision_config": None,
        "image_size": None,
    }
    parts = ["no identifiers.json" if missing == "both" else f"no {missing}", str(model)]
    refused(tmp_path, parts, lambda: call(script, **named, do_train=False))
    if missing == "both":
        with pytest.raises(CorpusReadError):  # it may learn new ones
            call(script, **named)
    else:
        refused(tmp_path, [f"no {missing}"], lambda: call(script, **named))


@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_no_compiler(call, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    refused(tmp_path, "needs a C++ compiler", lambda: call(run_xmatching, "--torch_compile", "true", "--use_cpu"))


def test_a_compilation_that_fails_is_one_line_and_other_errors_stay():
    def broken(graph, inputs):
        raise OSError("the compiler is not whole\n\nits headers are missing")

    asked = SimpleNamespace(torch_compile=True)
    with (
        pytest.raises(UserError, match="^--torch_compile does not work here: .*not whole.*; leave it out$"),
        compiled(asked),
    ):
        torch.compile(torch.nn.Linear(2, 2), backend=broken)(torch.ones(1, 2))
    with pytest.raises(OSError, match="elsewhere"), compiled(asked):
        raise OSError("elsewhere")


def test_fsdp_of_accelerate_on_a_cpu(call, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(tmp_path, ["FSDP", "on GPUs alone", "cpu_two_processes.yaml"], lambda: call(run_xmatching, "--use_cpu"))


GENERATIVE = {
    "beams": (run_dsi, ["--num_beams", 0], "--num_beams 0"),
    "many beams": (run_dsi, ["--num_beams", 10**9], "give 1 to"),
    "figure of the other": (
        run_image_indexing, [*EVALUATED, "--metric_for_best_model", "hits@1"], ["hits@1 is not measured", "memorised"]
    ),
    "T5 without heads": (run_dsi, ["--t5_config", json.dumps(T5 | {"num_heads": 0, "d_ff": -1})], "--t5_config"),
    "optimizer": (run_dsi, ["--optim", "lomo"], "--optim lomo"),
    "identifier levels": (run_dsi, ["--identifier_levels", 0], "--identifier_levels 0"),
    "ratio": (run_dsi, ["--indexing_ratio", "nan"], "--indexing_ratio nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATIVE)
def test_mistakes_with_generative_models(call, tmp_path, case):
    script, flags, parts = GENERATIVE[case]
    refused(tmp_path, parts, lambda: call(script, *flags))


RECIPE_TEXTS = {
    "empty": ("", "must be a mapping"),
    "a list": ("- max_steps: 2", "must be a mapping"),
    "a number as a name": ("5: 3", "has 5 where the name"),
    "a list as a name": ("[1]: 3", "not valid YAML"),
    "tabs": ("vision_config:\n\tmodel_type: vit", "not valid YAML"),
    "a name twice": ("max_steps: 1\nmax_steps: 2", "max_steps stands there twice"),
    "billion laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "write the value of *a out"),
    "deep": ("a: " + "[" * 5000, "nested too deeply"),
    "no date": ("run_name: 2001-99-99", "not valid YAML"),
    "not UTF-8": (b"max_steps: \xff", "not valid YAML"),
    "a list for a number": ("max_steps: [1]", "not a number"),
    "a share for a count": ("max_steps: 1.5", "not a whole number"),
    "a word for a switch": ("do_train: 'maybe'", "not true or false"),
    "a switch for a name": ("dataset_name: true", "not text"),
    "a mapping for a name": ("dataset_name: {a: 1}", "not text"),
    "a zero byte": ('image_dir: "a\\0b"', "not text"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPE_TEXTS)
def test_recipes_that_are_none(tmp_path, case):
    text, parts = RECIPE_TEXTS[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, parts, lambda: run_xmatching.main([str(path), "--output_dir", str(tmp_path / "out")]))


BROKEN = {
    "a list": b"[1]",
    "null": b"null",
    "a number": b"5",
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 99_999,
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_broken_files_of_saved_models(call, tmp_path, tiny_xmatching, name):
    model, queries = tmp_path / "model", tmp_path / "queries.txt"
    shutil.copytree(tiny_xmatching, model)
    queries.write_text("a red dog\n")
    common = ["--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    ask = [*common, "--image_dir", str(tmp_path / "pictures"), "--queries", str(queries)]
    train = [*common, "--dataset_name", "shape_scenes", "--do_train", "--report_to", "none"]
    for content in BROKEN.values():
        (model / name).write_bytes(content)
        for script, flags in ((run_retrieval, ask), (run_xmatching, train)):
            refused(tmp_path, ["--model_name_or_path", f"its {name} is broken"], lambda s=script, f=flags: s.main(f))


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "\x00"])
def test_a_broken_record_of_arguments(call, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run_arguments.json").write_text(content)
    with pytest.raises(UserError, match="has a broken run_arguments.json"):
        call(run_xmatching)
