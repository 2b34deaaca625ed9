"""The real command line, as a user types it, with tiny random models."""

import base64
import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel

import run_retrieval
from imagedex.errors import UserError
from imagedex.evaluation.rankings import read_rankings
from imagedex.metrics.hits_at_k.hits_at_k import summarize_ranks
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.retrieval import answering
from imagedex.retrieval.gallery import read_gallery
from imagedex.retrieval.retriever import Retriever

SENTENCES = ["a red dog", "the blue half is on the left side", "yellow", "dog runs in the grass", "a green side of"]


@pytest.fixture
def queries(tmp_path, picture_folder):
    """Five sentences with a right picture each; two of them ask for the picture that has a copy."""
    images = ["picture 0.png", "dogs/picture 1.jpg", "dogs/running/picture 2.jpg", "copy.png", "picture 3.jpg"]
    assert all((picture_folder / image).is_file() for image in images)
    with open(tmp_path / "queries.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        writer.writerows(zip(SENTENCES, images, strict=True))
    return tmp_path / "queries.csv"


@pytest.fixture
def ask(launch, picture_folder):
    """ask(model, queries, output_dir, *flags) in a fresh process, as a user does."""

    def run(model, queries, output_dir, *flags):
        command = ["--model_name_or_path", model, "--image_dir", picture_folder, "--queries", queries]
        return launch("run_retrieval.py", *command, "--output_dir", output_dir, "--device", "cpu", *flags)

    return run


@pytest.fixture
def ask_here(picture_folder, capsys):
    """The same in this process, which spares seconds of imports; returns what it printed. Raises `UserError`."""

    def run(model, queries, output_dir, *flags, gallery=None):
        command = ["--model_name_or_path", model, "--image_dir", gallery or picture_folder, "--queries", queries]
        command += ["--output_dir", output_dir, "--device", "cpu", *flags]
        run_retrieval.main([str(part) for part in command])
        shown = capsys.readouterr()
        return shown.out + shown.err

    return run


def refused(ask_here, *arguments, parts, **options):
    with pytest.raises(UserError) as raised:
        ask_here(*arguments, **options)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert str(part) in str(raised.value)


def by_hand(folder, sentences, pictures):
    """Cosines of every sentence with every picture, one at a time, through the models' own classes."""
    classes = (XMatchingModel, RetrievalProcessor) if folder.name == "tiny_xmatching" else (AutoModel, AutoProcessor)
    model, processor = (part.from_pretrained(folder) for part in classes)
    model.eval()
    padding = {"padding": "max_length", "max_length": 16} if model.config.model_type == "siglip" else {}
    with torch.no_grad():
        texts = [
            model.get_text_features(**processor.tokenizer([s], return_tensors="pt", **padding)).pooler_output[0]
            for s in sentences
        ]
        images = []
        for picture in pictures:
            pixels = processor.image_processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")
            images.append(model.get_image_features(**pixels).pooler_output[0])
    unit = [torch.nn.functional.normalize(torch.stack(vectors).double(), dim=1) for vectors in (texts, images)]
    return (unit[0] @ unit[1].T).numpy()


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_siglip", "tiny_xmatching"])
def test_everything_is_answered_and_written(name, request, ask, queries, picture_folder, tmp_path):
    model, out = request.getfixturevalue(name), tmp_path / "out"
    done = ask(model, queries, out, "--top_k", 7, "--num_workers", 2, "--batch_size", 5)
    assert done.returncode == 0, done.stderr

    image_ids = sorted(
        p.relative_to(picture_folder).as_posix() for p in picture_folder.rglob("*") if p.suffix in (".png", ".jpg")
    )
    cosines = by_hand(model, SENTENCES, [picture_folder / image_id for image_id in image_ids])
    rankings = read_rankings(out / "rankings.jsonl")
    assert [ranking.query for ranking in rankings] == SENTENCES
    for ranking, scores in zip(rankings, cosines, strict=True):
        assert len(set(ranking.images)) == 7
        found = [scores[image_ids.index(image_id)] for image_id in ranking.images]
        np.testing.assert_allclose(ranking.scores, found, atol=2e-6)
        np.testing.assert_allclose(found, np.sort(scores)[::-1][:7], atol=2e-6)

    with open(queries, newline="") as file:
        targets = [image_ids.index(row["image"]) for row in csv.DictReader(file)]
    own = cosines[np.arange(5), targets][:, None]
    ranks = (cosines >= own - 1e-6).sum(1)  # a picture and its copy tie
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["hits@1"] == np.mean(ranks <= 1) and metrics["hits@10"] == np.mean(ranks <= 10)
    assert metrics["mrr"] == pytest.approx(np.mean(1 / ranks))
    assert metrics["gallery_size"] == 23 and metrics["queries"] == 5 and metrics["model"] == name
    assert ranks[0] >= 2 and ranks[3] >= 2

    last = done.stdout.strip().splitlines()[-1]
    for path in ("rankings.jsonl", "metrics.json", "contact_sheet.jpg", "contact_sheet.html"):
        assert str(out / path) in last
    redrawn = np.random.default_rng(0).integers(5, size=(4000, 5))  # every sentence asks for a picture of its own
    for figure, values in (("mrr", 1 / ranks), ("hits@10", ranks <= 10)):
        low, high = np.percentile(values[redrawn].mean(1), [2.5, 97.5])
        assert [metrics[f"{figure}_low"], metrics[f"{figure}_high"]] == pytest.approx([low, high], abs=0.03)
        assert f"({metrics[f'{figure}_low']:.2f} to {metrics[f'{figure}_high']:.2f})" in done.stdout
    assert f"mrr {metrics['mrr']:.3f}" in done.stdout and "gallery of 23 pictures" in done.stdout
    assert "encoding pictures" in done.stderr  # a progress bar
    assert "Loading weights" not in done.stderr and "Generating" not in done.stderr  # the libraries' in a moment's work
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
    page = (out / "contact_sheet.html").read_text(encoding="utf-8")
    assert all(sentence in page for sentence in SENTENCES) and page.count("<use ") >= 35
    assert page.count(";base64,") <= 23  # each picture of the gallery once at most
    base64.b64decode(page.split("base64,")[1].split('"')[0], validate=True)


def test_queries_that_another_model_was_trained_on_are_said(ask_here, tiny_clip, queries, tmp_path):
    """Two copies of a model: one held these queries out, the other has held out two of them and one that is not asked."""
    with open(queries, newline="") as file:
        asked = list(csv.reader(file))
    own = {"mine": (0, asked), "other": (1, [*asked[:3], ["another", asked[1][1]]])}
    for name, (seed, held_out) in own.items():
        shutil.copytree(tiny_clip, tmp_path / name)
        split = {"do_train": True, "dataset_name": "photos", "held_out_captions_per_image": 1, "split_seed": seed}
        (tmp_path / name / "run_arguments.json").write_text(json.dumps(split))
        with open(tmp_path / name / "eval_queries.csv", "w", newline="") as file:
            csv.writer(file).writerows(held_out)
    mine, other = tmp_path / "mine", tmp_path / "other"

    shown = ask_here(mine, mine / "eval_queries.csv", tmp_path / "alone")
    assert "may have been trained" not in shown
    assert json.loads((tmp_path / "alone" / "metrics.json").read_text())["possibly_trained_queries"] == 0

    shown = ask_here(mine, queries, tmp_path / "both", "--model_name_or_path", mine, other)
    assert shown.count("may have been trained") == 1
    assert f"{other} may have been trained on 3 of the 5 captions asked" in shown
    assert "(split_seed (1 there, 0 here))" in shown
    rows = json.loads((tmp_path / "both" / "comparison.json").read_text())["models"]
    assert [rows[name]["possibly_trained_queries"] for name in ("mine", "other")] == [0, 3]
    assert json.loads((tmp_path / "both" / "other" / "metrics.json").read_text())["possibly_trained_queries"] == 3

    # the file in the folder of the run that held them out says it, without its model in the comparison
    shown = ask_here(other, mine / "eval_queries.csv", tmp_path / "one")
    assert "may have been trained on 3 of the 5" in shown
    # nobody knows these to be captions of the corpus
    shown = ask_here(tiny_clip, queries, tmp_path / "clip")
    assert "may have been" not in shown
    assert "possibly_trained_queries" not in json.loads((tmp_path / "clip" / "metrics.json").read_text())


def test_text_queries_without_right_pictures(ask_here, tiny_clip, tmp_path):
    (tmp_path / "q.txt").write_text("a dog\n\nthe red side\n")
    out = tmp_path / "out"
    shown = ask_here(tiny_clip, tmp_path / "q.txt", out, "--top_k", 100, "--contact_sheet_queries", 0)
    assert "the gallery has 23 pictures, so rankings have 23 places, not 100" in shown
    assert [len(ranking.images) for ranking in read_rankings(out / "rankings.jsonl")] == [23, 23]
    assert sorted(path.name for path in out.iterdir()) == ["index", "rankings.jsonl", "retrieval_arguments.json"]


@pytest.mark.parametrize("output_format", ["parquet", "tsv"])
def test_other_formats(ask_here, tiny_clip, queries, tmp_path, output_format):
    ask_here(tiny_clip, queries, tmp_path / "out", "--output_format", output_format, "--top_k", 3)
    rankings = read_rankings(tmp_path / "out" / f"rankings.{output_format}")
    assert [len(ranking.images) for ranking in rankings] == [3] * 5


def test_a_recipe_and_a_corpus(tiny_clip, flickr_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"model_name_or_path": str(tiny_clip), "dataset_name": str(flickr_folder), "top_k": 4, "device": "cpu"}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "q.jsonl").write_text('{"text": "red beside blue", "image": "red_blue.jpg"}\n')
    flags = ["--queries", "q.jsonl", "--query_column", "text", "--output_dir", "out", "--top_k", "2"]
    run_retrieval.main(["recipe.json", *flags])
    assert len(read_rankings(tmp_path / "out" / "rankings.jsonl")[0].images) == 2
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["gallery_size"] == 12


def test_the_same_arguments_go_on_and_others_are_refused(ask_here, tiny_clip, tiny_siglip, queries, tmp_path):
    out = tmp_path / "out"
    ask_here(tiny_clip, queries, out)
    (vectors,) = (out / "index").glob("shard-*.safetensors")
    first, written = (out / "rankings.jsonl").read_bytes(), vectors.stat().st_mtime_ns
    (out / "rankings.jsonl").unlink()
    assert "are in" in ask_here(tiny_clip, queries, out, "--batch_size", 3, "--num_workers", 1)
    assert vectors.stat().st_mtime_ns == written
    assert (out / "rankings.jsonl").read_bytes() == first

    refused(ask_here, tiny_clip, queries, out, "--top_k", 3, parts=["top_k (10 then, 3 now)", out])
    refused(ask_here, tiny_siglip, queries, out, parts=["model_name_or_path"])

    model = tmp_path / "model"  # the same name, trained on in between
    shutil.copytree(tiny_clip, model)
    ask_here(model, queries, tmp_path / "moved")
    shutil.rmtree(model)
    shutil.copytree(tiny_siglip, model)
    refused(ask_here, model, queries, tmp_path / "moved", parts=["index of another model"])


def test_wrong_uses_are_answered_with_one_line_before_anything_is_written(ask_here, tiny_clip, queries, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "q.csv").write_text("caption,image\na dog,nowhere.jpg\na cat,picture 0.png\n")
    (tmp_path / "blank.txt").write_text("\n")
    bert = tmp_path / "bert"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(bert)

    def wrong(*parts, model=tiny_clip, asked=queries, flags=(), **options):
        refused(ask_here, model, asked, out, *flags, parts=parts, **options)

    wrong("--model_name_or_path", "is not a folder", model=tmp_path / "gone" / "model")
    wrong("is a bert model (BertModel)", model=bert)
    wrong("gone.csv does not exist", asked=tmp_path / "gone.csv")
    wrong("holds no queries", asked=tmp_path / "blank.txt")
    wrong("no column 'text'; it has 'caption', 'image'", flags=["--query_column", "text"])
    wrong("1 of 2 queries", "nowhere.jpg", asked=tmp_path / "q.csv")
    wrong("the folder is empty", gallery=tmp_path / "empty")
    wrong("--top_k 0: give 1 or more", flags=["--top_k", 0])
    wrong("--device toaster", flags=["--device", "toaster"])
    wrong("unknown argument --topk", "--top_k", flags=["--topk", 3])
    wrong("output_format", flags=["--output_format", "xml"])
    wrong("--queries is needed", asked="")
    wrong("--dataset_split test", flags=["--dataset_split", "test"])
    with pytest.raises(UserError, match="no gallery: .* --image_dir.* --dataset_name"):
        run_retrieval.main(["--model_name_or_path", "m", "--queries", "q.txt", "--output_dir", str(out)])
    assert not out.exists()

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    refused(ask_here, tiny_clip, queries, tmp_path / "foreign", parts=["not empty"])
    refused(ask_here, tiny_clip, queries, tmp_path / "q.csv" / "out", parts=["cannot be written"])
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]


def test_a_mistake_ends_the_process_with_status_2_and_one_line(ask, tiny_clip, tmp_path):
    done = ask(tiny_clip, "gone.csv", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: the queries file gone.csv does not exist"
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read(ask_here, tiny_clip, picture_folder, tmp_path):
    gallery = tmp_path / "gallery"
    shutil.copytree(picture_folder, gallery)
    (gallery / "broken.jpg").write_bytes((gallery / "copy.png").read_bytes()[:60])
    (tmp_path / "q.txt").write_text("a dog\n")
    asked, out = (tiny_clip, tmp_path / "q.txt"), tmp_path / "out"
    refused(ask_here, *asked, out, gallery=gallery, parts=["broken.jpg", "--unreadable_images skip"])
    assert not out.exists()
    flags = ("--unreadable_images", "skip", "--top_k", 50)
    assert "broken.jpg" in ask_here(*asked, out, *flags, gallery=gallery)
    assert len(read_rankings(out / "rankings.jsonl")[0].images) == 23
    refused(ask_here, *asked, gallery / "out", *flags, gallery=gallery, parts=["lies inside --image_dir"])
    assert not (gallery / "out").exists()


def test_a_stale_metrics_file_goes_when_the_right_pictures_are_no_longer_known(ask_here, tiny_clip, queries, tmp_path):
    out = tmp_path / "out"
    ask_here(tiny_clip, queries, out)
    assert (out / "metrics.json").exists()
    queries.write_text("caption\na dog\n")
    ask_here(tiny_clip, queries, out)
    assert not (out / "metrics.json").exists()


def test_a_median_rank_that_does_not_exist_is_null(tmp_path):
    """A generative model may not find the right picture for most queries; JSON has no infinity."""

    class Nothing(Retriever):
        def search(self, queries, k, targets=None):
            return []

        def fingerprint(self):
            return ""

    metrics = summarize_ranks([1, math.inf, math.inf])
    path = answering.write_metrics(metrics, Nothing("none", ["a.jpg"]), 3, tmp_path / "metrics.json")

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=no_constants)["median_rank"] is None


def test_help_explains_each_argument(capsys):
    with pytest.raises(SystemExit) as ended:
        run_retrieval.main(["--help"])
    assert ended.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines, also at hyphens
    groups = (run_retrieval.RetrievalArguments, run_retrieval.GenerativeArguments)
    for field in (field for group in groups for field in dataclasses.fields(group)):
        assert f"--{field.name}" in shown and "".join(field.metadata["help"].split()) in shown


@pytest.mark.parametrize("name", ["tiny_clip", "tiny_xmatching"])
def test_of_several_right_pictures_the_best_counts(name, request, ask_here, picture_folder, tmp_path):
    """Against every cosine by hand; other right pictures stand before nothing."""
    model, rng = request.getfixturevalue(name), np.random.default_rng(0)
    image_ids = sorted(read_gallery(str(picture_folder))["image_id"])
    right = [rng.choice(image_ids, count, replace=False).tolist() for count in (2, 3, 1, 5, len(image_ids))]
    rows = [{"caption": sentence, "image": own + own[:1]} for sentence, own in zip(SENTENCES, right, strict=True)]
    queries, out = tmp_path / "several.jsonl", tmp_path / "out"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask_here(model, queries, out, "--top_k", 3)

    cosines, ranks = by_hand(model, SENTENCES, [picture_folder / image_id for image_id in image_ids]), []
    for scores, own in zip(cosines, right, strict=True):
        best = max(scores[image_ids.index(image_id)] for image_id in own)
        wrong = [score for image_id, score in zip(image_ids, scores, strict=True) if image_id not in own]
        ranks.append(1 + sum(score >= best - 1e-6 for score in wrong))
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["hits@1"] == np.mean(np.array(ranks) <= 1) and metrics["hits@5"] == np.mean(np.array(ranks) <= 5)
    assert metrics["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert ranks[-1] == 1 and max(ranks) > 1
    page = (out / "contact_sheet.html").read_text(encoding="utf-8")
    found = [
        set(ranking.images) & set(own)
        for ranking, own in zip(read_rankings(out / "rankings.jsonl"), right, strict=True)
    ]
    assert page.count(">the right picture</span>") == sum(map(len, found)) > 2
