"""The way to the Hub and back, by the real command lines, against a small Hub on the loopback interface."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from elsewhere import PREAMBLE
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image as Pillow
from safetensors.torch import load as load_safetensors
from transformers import BertConfig, BertModel

from imagedex.modeling import GENERATIVE
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT_CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION_CONFIG = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
SENTENCES = ["red on the left and blue on the right", "a green half next to a yellow half"]
MODEL_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "README.md",
    "configuration_xmatching.py", "modeling_xmatching.py", "processing_retrieval.py", "picture_reading.py", "losses.py",
    "gathering.py", "towers.py", "two_towers.py", "sentence_transformers_files.py", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "saved_files.py", "caption_bank.py", "caption_bank.safetensors",
    "right_confidences.safetensors", "retrieval_pipeline.py",
}  # fmt: skip

ELSEWHERE = """
config = AutoConfig.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
batch = processor(text=json.loads(sys.argv[2]), images=[picture], padding=True, return_tensors="pt")
with torch.no_grad():
    text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    image = model.get_image_features(batch["pixel_values"]).pooler_output
print(json.dumps({"model_type": config.model_type, "text": text.tolist(), "image": image.tolist()}))
"""

# Many mistakes in one process, since most of a process's time is imports: (script, arguments) -> (status, last lines).
MISTAKES = """
import contextlib, io, json, sys
import run_retrieval, run_xmatching
from imagedex import command_line
for script, arguments in json.load(sys.stdin):
    error, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(error):
            command_line.run(lambda: {"run_xmatching": run_xmatching, "run_retrieval": run_retrieval}[script].main(arguments))
    except SystemExit as stopped:
        status = stopped.code
    print(json.dumps({"status": status, "error": error.getvalue().strip()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this file are: each in an empty folder, with one download cache."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder, flickr_folder):
    """A Hub with a tiny text tower, a dataset with embedded pictures, and what others keep private or gated."""
    tower = folder / "bert"
    tokenizer = train_tokenizer(SENTENCES * 3, 80)
    BertModel(BertConfig(**TEXT_CONFIG, vocab_size=len(tokenizer))).save_pretrained(tower)
    tokenizer.save_pretrained(tower)
    with HubServer() as hub:
        hub.add("someone/bert-tiny", tower)
        hub.add("someone/pictures", {"data/train-00000-of-00001.parquet": parquet(flickr_folder, folder)}, "dataset")
        for kind in ("model", "dataset"):
            hub.add("other/private", tower, kind, private=True, owner_reads=False)
            hub.add("other/gated", tower, kind).gated = True
        yield hub


def parquet(flickr_folder, folder) -> bytes:
    """The twelve pictures, embedded, each with a list of two captions."""
    names = sorted(os.listdir(flickr_folder / "images"))
    rows = {
        "image": [{"bytes": (flickr_folder / "images" / name).read_bytes(), "path": name} for name in names],
        "captions": [[f"{left} beside {right}", f"{left} left, {right} right"] for left, right in map(colours, names)],
    }
    features = Features({"image": Image(), "captions": List(Value("string"))})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return (folder / "train.parquet").read_bytes()


def colours(name: str) -> list[str]:
    return name.removesuffix(".jpg").split("_")


@pytest.fixture(scope="module")
def run(hub, folder):
    """run("script.py" or "-c", ...) -> CompletedProcess: a fresh process for which the server is the Hub."""

    def run(*command, cwd=folder, stdin=None, token=None, **env):
        if command[0] != "-c":
            command = (ROOT / command[0], *command[1:])
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1"} | hub.environment(folder / "home", token) | env
        command = [sys.executable, *map(str, command)]
        return subprocess.run(
            command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=300
        )

    return run


def training(flickr_folder, **flags) -> list[str]:
    """Arguments of a run of a second; None leaves one out."""
    flags = {
        "dataset_name": flickr_folder, "held_out_captions_per_image": 1, "text_model_name_or_path": "someone/bert-tiny",
        "vision_config": json.dumps(VISION_CONFIG), "image_size": 16, "text_pooling": "mean", "text_pooling_layers": 1,
        "text_head": "linear", "vision_head": "linear", "projection_dim": 16, "loss_type": "info_nce", "output_dir": "out",
        "num_train_epochs": 1, "per_device_train_batch_size": 12, "report_to": "none",
    } | flags  # fmt: skip
    given = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    return [*given, "--do_train", "--do_eval", "--use_cpu"]


@pytest.fixture(scope="module")
def pushed(run, hub, folder, flickr_folder):
    """someone/tiny, pushed at every epoch and at the end by a run with a text tower from the Hub; and the local folder."""
    flags = {
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "hub_strategy": "every_save",
        "hub_model_id": "someone/tiny",
    }
    arguments = training(flickr_folder, output_dir="tiny", hub_token=hub.token, hub_always_push="true", **flags)
    done = run("run_xmatching.py", *arguments, "--push_to_hub", token="")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.strip()][-1] == (
        f"model, processor, code and card: tiny and {hub.url}/someone/tiny"
    )
    return folder / "tiny"


def test_push_sends_the_model_whole_and_nothing_else(hub, pushed):
    files = hub.files("someone/tiny")
    figures = {"all_results.json", "eval_results.json", "train_results.json"}
    assert set(files) == MODEL_FILES | figures | {".gitattributes"}
    assert (pushed / "checkpoint-6" / "optimizer.pt").is_file() and (pushed / "eval_queries.csv").is_file()
    for name in MODEL_FILES | figures:
        assert files[name] == (pushed / name).read_bytes(), name
    assert json.loads(files["config.json"])["auto_map"] == {
        "AutoConfig": "configuration_xmatching.XMatchingConfig",
        "AutoModel": "modeling_xmatching.XMatchingModel",
    }
    assert "AutoProcessor" in json.loads(files["processor_config.json"])["auto_map"]
    for name, content in files.items():
        assert str(pushed.parent).encode() not in content, f"{name} names a folder of this machine"
    saved = load_safetensors(files["model.safetensors"])
    for name, value in XMatchingModel.from_pretrained(pushed).state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)


def test_the_card_on_the_hub_is_ours_with_the_figures(hub, pushed):
    card = ModelCard(hub.files("someone/tiny")["README.md"].decode())
    measured = json.loads((pushed / "eval_results.json").read_text())
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["hits@1"] == pytest.approx(measured["eval_hits@1"], abs=1e-4)
    assert figures["mrr"] == pytest.approx(measured["eval_mrr"], abs=1e-4)
    assert card.data.model_name == "tiny" and 'name = "someone/tiny"' in card.text and "bert-tiny" in card.text


def test_every_push_of_a_run_leaves_a_model_that_loads_and_no_token(hub, pushed):
    repository = hub.repositories["model", "someone/tiny"]
    first, *progress, last = repository.messages
    assert (first, last) == ("initial commit", "End of training")
    # pushes run beside training: one that has not begun when the next is due sends the newer files, or nothing new
    assert progress and set(progress) <= {"Training in progress, epoch 1", "Training in progress, epoch 2"}
    for _, files in repository.commits[1:]:
        late = (
            {"caption_bank.safetensors", "right_confidences.safetensors"}
            if files is not repository.commits[-1][1]
            else set()
        )  # made at the end
        assert {*MODEL_FILES} - {"README.md"} - late <= set(files)
        assert not any("optimizer" in name or name.startswith("checkpoint") for name in files)
        assert not any(hub.token.encode() in content for content in files.values())


def test_loads_from_the_hub_in_a_process_without_this_repository(run, pushed, tmp_path):
    done = run(
        "-c", PREAMBLE + ELSEWHERE, "someone/tiny", json.dumps(SENTENCES), cwd=tmp_path, HF_HOME=str(tmp_path / "fresh")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model_type"] == "xmatching"
    model, processor = XMatchingModel.from_pretrained(pushed).eval(), RetrievalProcessor.from_pretrained(pushed)
    picture = Pillow.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3))
    batch = processor(text=SENTENCES, images=[picture], padding=True, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        image = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.tensor(found["text"]), text)
    torch.testing.assert_close(torch.tensor(found["image"]), image)


PIPELINE = """
from transformers import pipeline
options = json.loads(sys.argv[2])
pipe = pipeline("text-to-image-retrieval", model=name, trust_remote_code=True, device="cpu", revision=options.pop("revision"))
print(json.dumps(pipe(options.pop("sentences"), **options)))
"""


def code_of(name: str, seen: frozenset = frozenset()) -> frozenset:
    """The file, those that it imports, and those that they import, by their syntax."""
    seen |= {name}
    for node in ast.walk(ast.parse((ROOT / "modeling" / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and f"{node.module}.py" not in seen:
            seen |= code_of(f"{node.module}.py", seen)
    return seen


def test_the_pipeline_from_the_hub(run, hub, pushed, flickr_folder, folder, save_generative, tmp_path):
    """At the commit that was named, though what came later is broken; both kinds of model."""
    paths = sorted(str(path) for path in (flickr_folder / "images").iterdir())
    names, found = [Path(path).name for path in paths], {}
    for kind in ("codebook_t5", "vision_grounded_t5"):
        writer = save_generative(tmp_path / kind, kind, "naive", names)
        code = {path.name for path in writer.glob("*.py")}
        assert code == code_of(f"modeling_{kind}.py") and code >= {"processing_retrieval.py", "retrieval_pipeline.py"}
    for name, source, options in (
        ("someone/dual", {n: hub.files("someone/tiny")[n] for n in MODEL_FILES}, {"images": paths}),
        ("someone/writer", writer, {}),
    ):
        hub.add(name, source)
        repository = hub.repositories["model", name]
        good, files = repository.commits[-1]
        repository.commit(files | {"retrieval_pipeline.py": b"raise SystemExit(3)"}, "broken")
        asked = {"sentences": SENTENCES, "top_k": 3, "revision": good} | options
        done = run("-c", PREAMBLE + PIPELINE, name, json.dumps(asked), cwd=tmp_path, HF_HOME=str(tmp_path / "fresh"))
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads(done.stdout.splitlines()[-1])
    expected = GENERATIVE["vision_grounded_t5"].from_pretrained(writer).retrieve(SENTENCES, k=3)
    for own, pairs in zip(found["someone/writer"], expected, strict=True):
        assert [one["image_id"] for one in own] == [image_id for image_id, _ in pairs]
    model, processor = XMatchingModel.from_pretrained(pushed).eval(), RetrievalProcessor.from_pretrained(pushed)
    batch = processor(text=SENTENCES, images=paths, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
        scores = model.search_scores(output.text_embeds, output.image_embeds)
    for own, row in zip(found["someone/dual"], scores, strict=True):
        best = row.sort(descending=True).values[:3].tolist()
        named = [row[paths.index(one["image"])].item() for one in own]
        assert [one["score"] for one in own] == pytest.approx(best, abs=1e-4)
        assert named == pytest.approx(best, abs=1e-4)


def test_retrieval_with_model_and_gallery_from_the_hub(run, pushed, flickr_folder, folder):
    """The answers are those of the local model; `image_id` is the stored file name."""
    (folder / "queries.csv").write_text("caption,image\nred beside blue,red_blue.jpg\ngreen beside red,green_red.jpg\n")
    where = ("--model_name_or_path", "someone/tiny", "--dataset_name", "someone/pictures", "--queries", "queries.csv")
    done = run("run_retrieval.py", *where, "--output_dir", "answers", "--device", "cpu", "--contact_sheet_queries", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((folder / "answers" / "metrics.json").read_text())
    assert metrics["gallery_size"] == 12 and metrics["model"] == "someone/tiny"

    model, processor = XMatchingModel.from_pretrained(pushed).eval(), RetrievalProcessor.from_pretrained(pushed)
    names = sorted(os.listdir(flickr_folder / "images"))
    pictures = [Pillow.open(flickr_folder / "images" / name) for name in names]
    batch = processor(text=["red beside blue", "green beside red"], images=pictures, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
        scores = model.search_scores(output.text_embeds, output.image_embeds)
    for line, row in zip((folder / "answers" / "rankings.jsonl").read_text().splitlines(), scores, strict=True):
        found = json.loads(line)
        expected = {name: score.item() for name, score in zip(names, row, strict=True)}
        assert found["scores"] == pytest.approx(sorted(expected.values(), reverse=True)[:10], abs=1e-4)
        assert found["scores"] == pytest.approx([expected[name] for name in found["images"]], abs=1e-4)


def test_a_dataset_from_the_hub_is_a_corpus(run, folder):
    code = (
        "from imagedex.corpora import load_corpus; import json\n"
        "c = load_corpus('someone/pictures'); t = c.splits['train']\n"
        "rows = {r['image_id']: [r['captions'], list(r['image'].size), list(r['image'].getpixel((2, 2)))] for r in t}\n"
        "print(json.dumps([c.form, list(c.splits), t.column_names, rows]))"
    )
    done = run("-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    form, splits, columns, rows = json.loads(done.stdout.splitlines()[-1])
    assert form == "dataset someone/pictures" and splits == ["train"] and len(rows) == 12
    assert columns == ["image_id", "image", "captions", "source_id"]
    captions, size, pixel = rows["blue_yellow.jpg"]
    assert captions == ["blue beside yellow", "blue left, yellow right"] and size == [32, 24]
    assert pixel == pytest.approx([50, 70, 220], abs=20)


def mistakes(flickr_folder, folder):
    """name -> (script, arguments, what the line says)."""
    nowhere, private, absent = "someone/nowhere", "other/private", "no such {} on the Hub"
    (folder / "queries.txt").write_text("a red half\n")

    def train(message, **flags):
        return "run_xmatching", training(flickr_folder, output_dir=str(folder / "never"), **flags), message

    def ask(message, **flags):
        asked = {
            "queries": folder / "queries.txt",
            "output_dir": folder / "never",
            "image_dir": flickr_folder / "images",
        }
        return (
            "run_retrieval",
            [str(x) for name, value in (asked | flags).items() for x in (f"--{name}", value)],
            message,
        )

    whole = {"text_model_name_or_path": None, "vision_config": None, "image_size": None}
    model, dataset = absent.format("model"), absent.format("dataset")
    return {
        "tower nowhere": train(model, text_model_name_or_path=nowhere),
        "tower private": train(model, text_model_name_or_path=private),
        "vision tower nowhere": train(model, vision_model_name_or_path=nowhere, vision_config=None),
        "model nowhere": train(model, model_name_or_path=nowhere, **whole),
        "tower gated": train("the model is gated", text_model_name_or_path="other/gated"),
        "dataset gated": train("the dataset is gated", dataset_name="other/gated"),
        "dataset nowhere": train(dataset, dataset_name=nowhere),
        "dataset private": train(dataset, dataset_name=private),
        "retrieval model nowhere": ask(model, model_name_or_path=nowhere),
        "retrieval model private": ask(model, model_name_or_path=private),
        "someone else's namespace": train(
            "nobody/tiny cannot be made: You don't have the rights", push_to_hub="true", hub_model_id="nobody/tiny"),
        "no name": train("give owner/name", push_to_hub="true", hub_model_id="a/b/c"),
    }  # fmt: skip


def run_mistakes(run, cases, **env) -> list[dict]:
    given = json.dumps([case[:2] for case in cases])
    done = run("-c", MISTAKES, stdin=given, PYTHONPATH=str(ROOT), **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"status"')]


def test_what_the_hub_refuses_is_one_line_and_status_2(run, hub, folder, flickr_folder):
    cases = mistakes(flickr_folder, folder)
    before = len(hub.requests)
    for (name, case), found in zip(cases.items(), run_mistakes(run, cases.values()), strict=True):
        lines = found["error"].splitlines()
        assert found["status"] == 2 and lines[-1].startswith("error: ") and case[2] in lines[-1], (name, found)
        assert sum(line.startswith("error: ") for line in lines) == 1 and "Retrying" not in found["error"], (
            name,
            found,
        )
    assert not (folder / "never").exists(), "something was written"
    asked = [path for _, path in hub.requests[before:] if "nowhere" in path or "private" in path]
    assert asked and max(map(asked.count, asked)) <= 8, "a refused name is asked for again and again"


@pytest.mark.parametrize("token", ["", "hf_wrong"], ids=["no token", "wrong token"])
def test_without_a_good_token_too(run, folder, flickr_folder, token):
    cases = mistakes(flickr_folder, folder)
    names = ["tower private", "dataset private", "retrieval model private", "someone else's namespace"]
    message = "does not accept the token" if token else "; "
    for name, found in zip(names, run_mistakes(run, [cases[name] for name in names], token=token), strict=True):
        lines = found["error"].splitlines()
        assert found["status"] == 2 and lines[-1].startswith("error: ") and "hf auth login" in lines[-1], (name, found)
        assert message in lines[-1] and len(lines[-1]) < 250, (name, found)
    assert not (folder / "never").exists(), "something was written"


@pytest.mark.slow
def test_a_push_that_fails_at_the_end_says_where_the_model_is(run, hub, folder, flickr_folder):
    arguments = [*training(flickr_folder, output_dir="late", hub_model_id="late"), "--push_to_hub"]
    hub.refuse_commits = True
    try:
        done = run("run_xmatching.py", *arguments)
    finally:
        hub.refuse_commits = False
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the model is in late, but someone/late did not take it: ") and "quota" in error
    assert set(os.listdir(folder / "late")) >= MODEL_FILES and set(hub.files("someone/late")) == {".gitattributes"}

    again = run("run_xmatching.py", *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert set(hub.files("someone/late")) >= MODEL_FILES
    assert 'name = "someone/late"' in hub.files("someone/late")["README.md"].decode()


def test_a_finished_run_is_pushed_afterwards_as_it_is(run, hub, folder, flickr_folder):
    arguments = training(flickr_folder, output_dir="later")
    done = run("run_xmatching.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "later").iterdir() if path.is_file()}
    pushed = run("run_xmatching.py", *arguments, "--push_to_hub", "--hub_model_id", "someone/afterwards")
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert "training loss" not in pushed.stdout and "trained 3 steps" not in pushed.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "later").iterdir() if path.is_file()}
    assert {name for name in before if after[name] != before[name]} == {"README.md"}  # which names the model on the Hub
    files = hub.files("someone/afterwards")
    assert set(files) >= MODEL_FILES and "finished.json" not in files
    assert 'name = "someone/afterwards"' in files["README.md"].decode()
