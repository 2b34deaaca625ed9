"""The real command line of run_dsi.py: pictures and documents from data to rankings, resuming, and wrong uses."""

import csv
import json
import os
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import run_dsi
import run_image_indexing
import run_xmatching
from imagedex import command_line
from imagedex.errors import UserError
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.processing_retrieval import SentenceProcessor

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
       "patch_size": 8}  # fmt: skip
ANIMALS = ["otter", "heron", "badger", "lynx", "salmon", "falcon"]


@pytest.fixture
def common(tmp_path):
    """What every run here has; later flags override earlier ones."""
    return [
        "--output_dir", tmp_path / "out", "--do_train", "--do_eval", "--use_cpu", "--num_train_epochs", 2,
        "--per_device_train_batch_size", 12, "--learning_rate", "3e-3", "--report_to", "none", "--disable_tqdm", "true",
        "--save_strategy", "epoch",
    ]  # fmt: skip


@pytest.fixture
def arguments(common, flickr_folder):
    """A CodebookT5 of a few seconds."""
    towers = ["--t5_config", json.dumps(T5), "--vision_config", json.dumps(VIT), "--image_size", 16]
    data = ["--dataset_name", flickr_folder, "--held_out_captions_per_image", 1]
    return ["--model_type", "codebook_t5", *data, *towers, *common]


@pytest.fixture
def documents(tmp_path):
    """Six documents, two trained questions and a held-out one of each."""
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = {
        "documents": [{"id": f"d{i}", "text": f"The {name} lives by the water."} for i, name in enumerate(ANIMALS)],
        "train": [{"document_id": f"d{i}", "question": f"{ask} the {name}"}
                  for i, name in enumerate(ANIMALS) for ask in ("where lives", "what is")],
        "validation": [{"document_id": f"d{i}", "question": f"who saw the {name}"} for i, name in enumerate(ANIMALS)],
    }  # fmt: skip
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def run(script, arguments, *more):
    script.main(list(map(str, [*arguments, *more])))


def results_of(folder):
    return json.loads((folder / "eval_results.json").read_text())


def test_train_evaluate_save_and_go_on(launch, arguments, tmp_path):
    out = tmp_path / "out"
    first = launch("run_dsi.py", *arguments, "--compare_with_baselines", "--eval_strategy", "epoch",
                   "--load_best_model_at_end", "--metric_for_best_model", "hits@1")  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    results = results_of(out)
    measured = {"eval_hits@1", "eval_hits@5", "eval_hits@10", "eval_mrr", "eval_memorised", "eval_ms_per_query"}
    assert measured <= set(results)
    assert (results["eval_gallery_size"], results["eval_queries"], results["eval_memorised_samples"]) == (12, 12, 12)
    assert {"README.md", "config.json", "model.safetensors", "modeling_codebook_t5.py", "identifiers.json", "tokenizer.json",
            "identifiers.safetensors", "eval_queries.csv", "run_arguments.json",
            "baselines.json"} <= set(os.listdir(out))  # fmt: skip
    assert f"{results['eval_hits@1']:.3f}" in (out / "README.md").read_text()
    last = [line for line in first.stdout.splitlines() if line.strip()][-1]
    assert last == "model, processor, identifiers, code and card: out"
    assert "BM25" in first.stdout and "memorised: " in first.stdout

    # the same arguments again: nothing left to do, the same figures
    again = launch("run_dsi.py", *arguments, "--compare_with_baselines", "--eval_strategy", "epoch",
                   "--load_best_model_at_end", "--metric_for_best_model", "hits@1")  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert "this run is finished" in again.stdout and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    for name in ("eval_mrr", "eval_memorised", "eval_loss"):
        assert results_of(out)[name] == pytest.approx(results[name])

    # the trained model is judged alike by a run of its own
    judged = launch("run_dsi.py", "--model_name_or_path", out, "--dataset_name", arguments[3], "--do_eval", "--do_predict",
                    "--held_out_captions_per_image", 1, "--output_dir", "judged", "--use_cpu")  # fmt: skip
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert results_of(tmp_path / "judged")["eval_mrr"] == pytest.approx(results["eval_mrr"])
    rankings = [json.loads(line) for line in (tmp_path / "judged" / "rankings.jsonl").read_text().splitlines()]
    with open(out / "eval_queries.csv", newline="") as file:
        asked = list(csv.DictReader(file))
    assert [ranking["query"] for ranking in rankings] == [row["caption"] for row in asked]
    known = set(Identifiers.from_pretrained(out).image_ids)
    for ranking in rankings:
        assert len(ranking["images"]) == len(set(ranking["images"])) == 10 and set(ranking["images"]) <= known
        assert ranking["scores"] == sorted(ranking["scores"], reverse=True)
    hits = [row["image"] == ranking["images"][0] for ranking, row in zip(rankings, asked, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(results["eval_hits@1"])


def test_with_nothing_held_out_evaluation_is_off_whatever_the_recipe_says(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("eval_strategy: epoch\nload_best_model_at_end: true\nmetric_for_best_model: hits@1\n")
    run(run_dsi, [recipe, *arguments], "--held_out_captions_per_image", 0, "--num_train_epochs", 1)
    assert "nothing is held out: evaluation and the choice of the best checkpoint are off" in capfd.readouterr().out
    assert not (tmp_path / "out" / "eval_results.json").exists()
    assert "Nothing was held out" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["inputs2targets", "targets2inputs", "bidirectional"])
@pytest.mark.parametrize("scheme", ["atomic", "naive", "semantic", "rq"])
def test_documents_and_questions(common, documents, tmp_path, monkeypatch, capfd, strategy, scheme):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_type", "t5", "--dataset_name", documents, "--t5_config", json.dumps(T5), *common]
    flags = ["--indexing_strategy", strategy, "--identifier_scheme", scheme, "--num_train_epochs", 1]
    run(run_dsi, arguments, *flags, "--compare_with_baselines", "--do_predict", "--max_text_length", 32)
    results = results_of(tmp_path / "out")
    assert (results["eval_queries"], results["eval_gallery_size"], results["eval_memorised_samples"]) == (6, 6, 6)
    assert Identifiers.from_pretrained(tmp_path / "out").scheme == scheme
    # "lives by the water" is in all of them; the animal tells
    assert json.loads((tmp_path / "out" / "baselines.json").read_text())["BM25"]["hits@1"] == 1.0
    assert "6 held-out questions, a gallery of 6 documents" in capfd.readouterr().out
    # every document once and every question once: 6 + 12, or 6 + 6 + 12 in both directions, in batches of 12
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_documents_are_learned(common, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_type", "t5", "--dataset_name", documents, "--t5_config", json.dumps(T5), *common]
    run(run_dsi, arguments, "--num_train_epochs", 120, "--lr_scheduler_type", "constant", "--save_strategy", "no")
    results = results_of(tmp_path / "out")
    assert results["eval_memorised"] == 1.0 and results["eval_hits@1"] >= 5 / 6
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (
        model.config.vocab_size
        == len(json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]) + 6
    )


def test_the_second_step_goes_on_from_the_first(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments[1] = "vision_grounded_t5"
    run(
        run_image_indexing,
        arguments,
        "--output_dir",
        "indexed",
        "--identifier_scheme",
        "semantic",
        "--num_train_epochs",
        1,
    )
    start = arguments.index("--t5_config")
    second = arguments[2:start] + arguments[start + 6 :] + ["--model_name_or_path", "indexed"]
    run(run_dsi, second, "--indexing_ratio", 0.5)
    for name in ("identifiers.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "indexed" / name).read_bytes()
    results = results_of(tmp_path / "out")
    assert {"eval_hits@1", "eval_memorised"} <= set(results), "what the first step knew is still measured"
    # 36 trained captions and 18 pictures in batches of 12, two epochs
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 10


def test_captions_alone_are_a_plain_t5s(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments[1] = "t5"
    start = arguments.index("--vision_config")
    arguments = arguments[:start] + arguments[start + 4 :]
    run(run_dsi, arguments, "--caption_prompt", "", "--clean_captions", "true", "--identifier_scheme", "semantic")
    results = results_of(tmp_path / "out")
    assert "eval_memorised" not in results and results["eval_queries"] == 12
    source = Identifiers.from_pretrained(tmp_path / "out").source
    assert source["vectors"] == "text"
    processor = SentenceProcessor.from_pretrained(tmp_path / "out")
    assert (processor.prompt, processor.clean_text, processor.max_text_length) == ("", True, 75)
    # who judges it later asks as it was taught
    run(run_dsi, ["--model_name_or_path", "out", *arguments[2:6], "--do_eval", "--use_cpu", "--output_dir", "judged"])
    assert results_of(tmp_path / "judged")["eval_loss"] == pytest.approx(results["eval_loss"])


def test_identifiers_from_an_xmatching_model_of_the_same_split(
    arguments, tmp_path, monkeypatch, text_config, vision_config
):
    monkeypatch.chdir(tmp_path)
    encoder = [
        *arguments[2:6], "--text_config", json.dumps(text_config), "--vision_config", json.dumps(vision_config), "--image_size",
        16, "--text_pooling_layers", 1, "--projection_dim", 8, "--loss_type", "info_nce", "--do_train", "--use_cpu",
        "--num_train_epochs", 1, "--output_dir", "encoder", "--report_to", "none",
    ]  # fmt: skip
    run(run_xmatching, encoder)
    flags = ["--identifier_scheme", "rq", "--identifier_vectors_from", "encoder", "--num_train_epochs", 1]
    run(run_dsi, arguments, *flags)
    identifiers = Identifiers.from_pretrained(tmp_path / "out")
    assert identifiers.source["vectors"] == "xmatching" and identifiers.quantizer.width == 8
    with pytest.raises(UserError, match="another split.*split_seed"):
        run(run_dsi, arguments, *flags, "--split_seed", 5, "--output_dir", "other")
    assert not (tmp_path / "other").exists()


def test_kept_words_change_nothing_but_the_work(arguments, tmp_path, monkeypatch):
    """Both directions of indexing, random patches drawn in training: every weight ends where it does from pixels."""
    monkeypatch.chdir(tmp_path)
    more = [
        "--indexing_strategy",
        "bidirectional",
        "--t5_start",
        "lexical",
        "--num_visual_tokens",
        3,
        "--num_train_epochs",
        1,
    ]
    weights = []
    for keep in ("false", "true"):
        run(run_dsi, arguments, *more, "--keep_states", keep, "--keep_dir", tmp_path / "kept", "--output_dir", keep)
        weights.append(CodebookT5.from_pretrained(keep).state_dict())
    assert list((tmp_path / "kept").rglob("*.safetensors"))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    first, second = (results_of(tmp_path / keep) for keep in ("false", "true"))
    assert {k: v for k, v in first.items() if "hits" in k or "memorised" in k or "loss" in k} == {
        k: v for k, v in second.items() if "hits" in k or "memorised" in k or "loss" in k
    }


def test_held_out_pictures_are_indexed_or_not(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--held_out_captions_per_image",
        0,
        "--held_out_images",
        0.3,
        "--num_train_epochs",
        1,
        "--indexing_ratio",
        1,
    ]
    run(run_dsi, arguments, *flags)
    run(run_dsi, arguments, *flags, "--index_held_out_images", "false", "--output_dir", "seen")
    whole, seen = results_of(tmp_path / "out"), results_of(tmp_path / "seen")
    assert whole["eval_gallery_size"] == seen["eval_gallery_size"] == 12, "all have identifiers and can be found"
    assert whole["eval_memorised_samples"] == 12
    assert seen["eval_memorised_samples"] == 12 - whole["eval_queries"] / 4


def wrong_uses():
    """name -> (change the folder, flags, what the line says)."""

    def other_model(folder):
        tiny = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
        )
        BertModel(tiny).save_pretrained(folder / "bert")

    def bare_t5(folder):
        T5ForConditionalGeneration(T5Config(**T5 | {"vocab_size": 9})).save_pretrained(folder / "t5")

    wide = json.dumps(VIT | {"hidden_size": 64})
    return {
        "no model": (None, ["--model_type", ""], "invalid choice: ''"),
        "a second step without a first": (None, ["--model_type", "vision_grounded_t5"], "this is the second step"),
        "widths that differ": (None, ["--vision_config", wide], "--codebook_projection_dim"),
        "no T5": (None, ["--t5_config", ""], "t5_config"),
        "a T5 of another kind": (None, ["--t5_config", json.dumps(VIT)], "model_type vit; it must be t5"),
        "misspelt field of a T5": (None, ["--t5_config", json.dumps(T5 | {"depth": 1})], "a t5 config has no 'depth'"),
        "a field of another model": (None, ["--vision_projection", "true"], "a codebook_t5 has no such field"),
        "checkpoint of another model": (other_model, ["--model_name_or_path", "{}/bert"], "is a bert model"),
        "towers beside a checkpoint": (bare_t5, ["--model_name_or_path", "{}/t5"], "but --model_type says codebook_t5"),
        "a scheme that needs vectors without a source": (
            None,
            ["--identifier_scheme", "semantic", "--held_out_captions_per_image", 0, "--held_out_images", 0.3],
            "needs vectors and there are none: 3 of 12 pictures have no trained caption"),
        "vectors nobody uses": (None, ["--identifier_vectors_from", "{}"], "atomic identifiers use no vectors"),
        "vectors from nowhere": (
            None, ["--identifier_scheme", "rq", "--identifier_vectors_from", "{}/x"], "there is no such folder"),
        "vectors of a model that is no encoder": (
            bare_t5, ["--identifier_scheme", "rq", "--identifier_vectors_from", "{}/t5"], "is a t5 model"),
        "negative ratio": (None, ["--indexing_ratio", -1], "give 0 to 1000"),
        "no beam": (None, ["--num_beams", 0], "give 1 to 10000"),
        "streaming": (None, ["--streaming"], "unknown argument --streaming"),
        "nothing to do": (None, ["--do_train", "false", "--do_eval", "false"], "nothing to do"),
        "misspelt scheme": (None, ["--identifier_scheme", "atomi"], "invalid choice: 'atomi'"),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_uses())
def test_wrong_use_is_one_line_and_status_2(arguments, flickr_folder, tmp_path, monkeypatch, capfd, name):
    change, flags, message = wrong_uses()[name]
    folder = tmp_path / "corpus"
    shutil.copytree(flickr_folder, folder)
    if change:
        change(tmp_path)
    arguments[3] = folder
    flags = [str(flag).format(tmp_path) if "{}" in str(flag) else flag for flag in flags]
    message_of_stop = stopped_with(run_dsi, [*arguments, *flags], monkeypatch, tmp_path, capfd)
    assert message in message_of_stop
    assert not (tmp_path / "out").exists(), "something was written"


def stopped_with(script, arguments, monkeypatch, tmp_path, capfd):
    """The one line that the script ends with, exit status 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: script.main(list(map(str, arguments))))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_identifiers_of_another_gallery_are_refused(arguments, flickr_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run(run_dsi, arguments, "--num_train_epochs", 1)
    other = tmp_path / "other"
    shutil.copytree(flickr_folder, other)
    lines = (other / "captions.txt").read_text().splitlines()
    (other / "captions.txt").write_text("\n".join(line for line in lines if not line.startswith("red_blue")))
    judge = ["--model_name_or_path", "out", "--do_eval", "--use_cpu", "--output_dir", "judged"]
    judge += ["--held_out_captions_per_image", 1]
    capfd.readouterr()
    line = stopped_with(run_dsi, [*judge, "--dataset_name", other], monkeypatch, tmp_path, capfd)
    assert "these identifiers belong to another gallery" in line and "red_blue.jpg" in line
    line = stopped_with(
        run_dsi, [*judge, "--dataset_name", flickr_folder, "--identifier_scheme", "rq"], monkeypatch, tmp_path, capfd
    )
    assert "brings atomic identifiers" in line
    assert not (tmp_path / "judged").exists()


def test_documents_and_models_that_read_pictures_do_not_meet(
    arguments, common, documents, tmp_path, monkeypatch, capfd
):
    flags = ["--dataset_name", documents, "--held_out_captions_per_image", 0]
    assert "holds documents" in stopped_with(run_dsi, [*arguments, *flags], monkeypatch, tmp_path, capfd)
    plain = ["--model_type", "t5", *arguments[2:6], "--t5_config", json.dumps(T5), *common]
    for more in (["--indexing_ratio", 1], ["--indexing_strategy", "bidirectional"]):
        line = stopped_with(run_dsi, [*plain, *more], monkeypatch, tmp_path, capfd)
        assert "a t5 reads no pictures" in line
    line = stopped_with(run_dsi, [*plain, "--vision_config", json.dumps(VIT)], monkeypatch, tmp_path, capfd)
    assert "a t5 reads no pictures" in line


def test_help_explains_every_argument(launch):
    done = launch("run_dsi.py", "--help")
    assert done.returncode == 0
    for name in ("dataset_name", "identifier_scheme", "indexing_strategy", "caption_mixing", "num_beams", "t5_config"):
        assert f"--{name}" in done.stdout
