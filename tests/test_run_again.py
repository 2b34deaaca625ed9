"""A training's log, line by line, and the same command again: a finished run stays as it is, what is missing is done."""

import hashlib
import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.training.tokenizer import train_tokenizer

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
       "patch_size": 8}  # fmt: skip
STRICT = {"PYTHONWARNINGS": "error::FutureWarning,error::DeprecationWarning"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
NUMBER = r"-?\d+\.\d{3}"
RETRIEVAL = rf"loss {NUMBER}  Hits@1 {NUMBER}  Hits@10 {NUMBER}  MRR {NUMBER}"
MEMORISED = rf"memorised {NUMBER}"


def documents(folder):
    folder.mkdir()
    animals = ["otter", "heron", "badger", "lynx"]
    rows = {
        "documents": [{"id": f"d{i}", "text": f"The {name} lives by the water."} for i, name in enumerate(animals)],
        "train": [{"document_id": f"d{i}", "question": f"where lives the {name}"} for i, name in enumerate(animals)],
        "validation": [{"document_id": f"d{i}", "question": f"who saw the {name}"} for i, name in enumerate(animals)],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture
def commands(flickr_folder, tmp_path, text_config, vision_config):
    """name -> (script, arguments, what an evaluation's line says)."""
    common = ["--do_train", "--do_eval", "--use_cpu", "--output_dir", "out", "--report_to", "none", "--max_steps", 4,
              "--per_device_train_batch_size", 6, "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps",
              "--save_steps", 2, "--save_total_limit", 1, "--logging_steps", 2, "--learning_rate", "1e-3"]  # fmt: skip
    pictures = ["--dataset_name", flickr_folder, "--held_out_captions_per_image", 1, "--image_size", 16, *common]
    t5, vision = ["--t5_config", json.dumps(T5)], ["--vision_config", json.dumps(VIT)]
    towers = ["--text_config", json.dumps(text_config), "--vision_config", json.dumps(vision_config)]
    more = ["--compare_with_baselines", "--do_predict", *pictures]
    return {
        "xmatching": ("run_xmatching.py", [*towers, "--projection_dim", 16, *more], RETRIEVAL),
        "dsi": ("run_dsi.py", ["--model_type", "codebook_t5", *t5, *vision, *more], f"{RETRIEVAL}  {MEMORISED}"),
        "indexing": ("run_image_indexing.py", ["--model_type", "vision_grounded_t5", *t5, *vision, *pictures],
                     f"loss {NUMBER}  {MEMORISED}"),
        "documents": ("run_dsi.py", ["--model_type", "t5", *t5, "--dataset_name", documents(tmp_path / "documents"),
                                   *[word for word in common if word != "--use_cpu"]],
                      f"{RETRIEVAL}  {MEMORISED}"),
    }  # fmt: skip


def contents(folder):
    """path -> (hash of the bytes, time of the last change) of every file."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), os.stat(path).st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def said(done):
    """The lines, of a run that went well and said nothing on standard error."""
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == "", done.stderr
    return done.stdout.splitlines()


def after_log(lines):
    return [line for line in lines if not line.startswith(("I ", "W "))]


@pytest.mark.parametrize("name", ["xmatching", "dsi", "indexing", "documents"])
def test_one_line_an_evaluation_and_a_finished_run_stays_as_it_is(launch, commands, tmp_path, name):
    script, arguments, figures = commands[name]
    lines = said(launch(script, *arguments, **STRICT))
    evaluations = [line for line in lines if "  loss " in line]
    places = [rf"I step {step}/4, epoch \d+\.\d\d  " for step in (2, 4)] + ["I evaluation  "]
    assert len(evaluations) == 3
    for line, place in zip(evaluations, places, strict=True):
        assert re.fullmatch(rf"{place}{figures}  \d+\.\d s", line), line
    assert (
        sum(bool(re.fullmatch(rf"I step \d/4, epoch \d+\.\d\d  training loss {NUMBER}", line)) for line in lines) == 2
    )
    assert not [line for line in lines if "{'" in line or "it/s" in line]
    measured = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert f"loss {measured['eval_loss']:.3f}" in evaluations[-1]

    before = contents(tmp_path / "out")
    again = said(launch(script, *arguments, **STRICT))
    assert contents(tmp_path / "out") == before
    assert after_log(again) == after_log(lines) and "nothing is done again" in again[0]


@pytest.mark.parametrize("name", ["xmatching", "dsi", "indexing"])
def test_what_is_missing_of_a_finished_run_is_done_and_nothing_else(launch, commands, tmp_path, name):
    script, arguments, _ = commands[name]
    out = tmp_path / "out"
    lines = said(launch(script, *arguments))
    before, measured = contents(out), json.loads((out / "eval_results.json").read_text())
    for gone in ("eval_results.json", "README.md"):
        (out / gone).unlink()
    again = said(launch(script, *arguments))
    after, found = contents(out), json.loads((out / "eval_results.json").read_text())
    assert not [line for line in again if "training loss" in line]
    assert after_log(again) == after_log(lines)
    assert after.keys() == before.keys()
    assert after["README.md"][0] == before["README.md"][0]
    for name, value in measured.items():
        if not name.endswith(("runtime", "per_second", "ms_per_query")):
            assert found[name] == pytest.approx(value), name
    changed = {path for path in before if after[path] != before[path]}
    evaluated = {"eval_results.json", "all_results.json", "right_confidences.safetensors"}
    assert changed <= {"README.md", "finished.json", *evaluated}


def test_a_part_of_the_model_that_is_missing_is_written_again(launch, commands, tmp_path):
    script, arguments, _ = commands["xmatching"]
    out = tmp_path / "out"
    said(launch(script, *arguments))
    before = contents(out)
    (out / "tokenizer.json").unlink()
    said(launch(script, *arguments))
    after = contents(out)
    assert after.keys() == before.keys()
    other = {path for path in before if after[path][0] != before[path][0]}
    assert other <= {"training_args.bin"}  # which names the run by the time it began


def test_two_processes_leave_a_finished_run_alone_too(launch, commands, tmp_path):
    script, arguments, _ = commands["xmatching"]
    first = launch(script, *arguments, launcher=TORCHRUN)
    assert first.returncode == 0, first.stderr[-3000:]
    before = contents(tmp_path / "out")
    again = launch(script, *arguments, launcher=TORCHRUN)
    assert again.returncode == 0, again.stderr[-3000:]
    assert contents(tmp_path / "out") == before
    assert after_log(again.stdout.splitlines()) == after_log(first.stdout.splitlines())


def test_a_model_that_finds_less_than_a_baseline_says_so(launch, commands, tmp_path):
    """One step from random weights, against BM25 over captions that name every shape."""
    script, arguments, _ = commands["xmatching"]
    scenes = ["--dataset_name", "shape_scenes", "--dataset_config_name", 20, "--max_steps", 1]
    lines = said(launch(script, *arguments, *scenes))
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_hits@1"]
    best = json.loads((tmp_path / "out" / "baselines.json").read_text())["BM25"]["hits@1"]
    assert found < best
    sentence = f"This model finds less than BM25 over the trained captions (Hits@1 {found:.3f} against {best:.3f})."
    assert sentence in lines and sentence in (tmp_path / "out" / "README.md").read_text()


def test_a_training_that_begins_again_forgets_how_the_earlier_one_ended(launch, commands, tmp_path):
    """Killed after its new model is written, the old figures would otherwise be taken for those of that model."""
    script, arguments, _ = commands["xmatching"]
    out = tmp_path / "out"
    said(launch(script, *arguments))
    arguments = [*arguments, "--resume_from_checkpoint", out / "checkpoint-4"]
    killed = "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
    killed += "from imagedex.training.saving import SavingMixin; SavingMixin.save_state = lambda self: os._exit(9); "
    killed += "runpy.run_path(sys.argv[0], run_name='__main__')"
    assert launch(script, *arguments, launcher=(sys.executable, "-c", killed)).returncode == 9
    assert (out / "model.safetensors").exists()
    assert not {"finished.json", "trainer_state.json", "eval_results.json", "README.md"} & set(os.listdir(out))
    (out / "trainer_state.json").write_text("")  # cut off while it was written
    lines = said(launch(script, *arguments[:-2]))
    assert "going on from out/checkpoint-4" in lines[0] and (out / "finished.json").exists()


def test_a_model_that_is_only_judged_is_measured_anew_each_time(launch, commands, tmp_path):
    script, arguments, _ = commands["xmatching"]
    said(launch(script, *arguments))
    data = arguments[arguments.index("--dataset_name") :][:4]
    judge = [
        "--model_name_or_path",
        "out",
        *data,
        "--do_eval",
        "--use_cpu",
        "--output_dir",
        "judged",
        "--report_to",
        "none",
    ]
    said(launch(script, *judge))
    before = json.loads((tmp_path / "judged" / "eval_results.json").read_text())["eval_loss"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, tmp_path / "out" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    said(launch(script, *judge))
    assert json.loads((tmp_path / "judged" / "eval_results.json").read_text())["eval_loss"] != before


def test_a_pretrained_t5_goes_on_with_the_words_it_was_given(launch, commands, tmp_path):
    """Its folder lacks the tokens of the identifiers, its checkpoints have them."""
    script, arguments, _ = commands["documents"]
    tokenizer = train_tokenizer(["The otter lives by the water. who saw the heron"], 100)
    T5ForConditionalGeneration(
        T5Config(**{name: value for name, value in T5.items() if name != "model_type"}, vocab_size=len(tokenizer),
                 decoder_start_token_id=tokenizer.pad_token_id)
    ).save_pretrained(tmp_path / "t5")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "t5")
    place = arguments.index("--t5_config")
    arguments = ["--text_model_name_or_path", tmp_path / "t5", *arguments[:place], *arguments[place + 2 :]]
    arguments += ["--identifier_scheme", "atomic", "--save_total_limit", 2]
    said(launch(script, *arguments))
    out = tmp_path / "out"
    (out / "README.md").unlink()
    said(launch(script, *arguments))
    assert (out / "README.md").exists()
    for name in ("model.safetensors", "trainer_state.json", "finished.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-4")
    assert "going on from out/checkpoint-2" in "\n".join(said(launch(script, *arguments)))
