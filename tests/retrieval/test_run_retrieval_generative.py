"""The command line of run_retrieval.py with models that write identifiers, alone and beside others."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from PIL import Image
from torch.nn import functional as F

import run_retrieval
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images, encode_texts
from imagedex.errors import UserError
from imagedex.evaluation.rankings import read_rankings
from imagedex.identifiers import new_pictures
from imagedex.identifiers.generative_model import load_generative
from imagedex.modeling.constrained_decoding import score_identifiers
from imagedex.modeling.identifiers import Identifiers
from imagedex.retrieval.gallery import read_gallery

SENTENCES = ["a red dog", "the blue half is on the left side", "yellow", "dog runs in the grass", "a green side of"]


@pytest.fixture(scope="module")
def rows(picture_folder):
    return read_gallery(str(picture_folder))


@pytest.fixture(scope="module")
def encoder(tiny_xmatching):
    return load_dual_encoder(str(tiny_xmatching))


@pytest.fixture(scope="module")
def vectors(rows, encoder):
    return encode_images(encoder.model, encoder.image_processor, rows)


@pytest.fixture(scope="module")
def models(save_generative, gallery_ids, vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generative")
    return {
        "t5": save_generative(folder / "t5", "t5", "atomic", gallery_ids),
        "codebook_t5": save_generative(folder / "codebook_t5", "codebook_t5", "rq", gallery_ids, vectors, "xmatching"),
        "vision_grounded_t5": save_generative(
            folder / "vision_grounded_t5", "vision_grounded_t5", "semantic", gallery_ids, vectors, "xmatching"
        ),
        "of eighteen": save_generative(
            folder / "of_eighteen", "codebook_t5", "rq", gallery_ids[:18], vectors[:18], "xmatching"
        ),
    }


@pytest.fixture
def targets(gallery_ids):
    return [gallery_ids[row] for row in (0, 4, 20, 22, 17)]


@pytest.fixture
def queries(tmp_path, targets):
    with open(tmp_path / "queries.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        writer.writerows(zip(SENTENCES, targets, strict=True))
    return tmp_path / "queries.csv"


@pytest.fixture
def ask(picture_folder, queries, capsys):
    """ask(model(s), output_dir, *flags) in this process, without contact sheets, which take longer than these models; returns
    what was printed. Raises `UserError`."""

    def run(models, output_dir, *flags, asked=None, gallery=None):
        names = models if isinstance(models, list) else [models]
        command = ["--model_name_or_path", *names, "--queries", asked or queries, "--output_dir", output_dir]
        if "--dataset_name" not in flags:
            command += ["--image_dir", gallery or picture_folder]
        command += ["--device", "cpu", "--contact_sheet_queries", 0, *flags]
        run_retrieval.main([str(part) for part in command])
        shown = capsys.readouterr()
        return shown.out + shown.err

    return run


def refused(ask, *arguments, parts, **options):
    with pytest.raises(UserError) as raised:
        ask(*arguments, **options)
    assert "\n" not in str(raised.value)
    for part in parts:
        assert str(part) in str(raised.value)


def exhaustive(folder, image_ids):
    """(5, N): every sentence's score of every identifier."""
    parts = load_generative(str(folder))
    scores = []
    for sentence in SENTENCES:  # they are clean already
        inputs = parts.processor.tokenizer("question: " + sentence, return_tensors="pt")
        rows = [parts.identifiers.row(image_id) for image_id in image_ids]
        scores.append(score_identifiers(parts.model, parts.identifiers, dict(inputs), rows)[0])
    return torch.stack(scores).numpy()


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", ["t5", "codebook_t5", "vision_grounded_t5"])
def test_each_model_answers_from_its_folder(models, name, ask, gallery_ids, targets, tmp_path):
    out = tmp_path / "out"
    shown = ask(models[name], out, "--num_beams", 23, "--top_k", 6)
    scores = exhaustive(models[name], gallery_ids)
    for ranking, own in zip(read_rankings(out / "rankings.jsonl"), scores, strict=True):
        best = np.argsort(-own)[:6]
        assert ranking.images == [gallery_ids[row] for row in best]
        np.testing.assert_allclose(ranking.scores, own[best], atol=1e-4)
    right = np.array([gallery_ids.index(target) for target in targets])
    ranks = 1 + (scores > scores[np.arange(5), right][:, None]).sum(1)
    metrics = metrics_of(out)
    assert metrics["mrr"] == pytest.approx(np.mean(1 / ranks)) and metrics["hits@10"] == np.mean(ranks <= 10)
    scheme = {"t5": "atomic", "codebook_t5": "rq", "vision_grounded_t5": "semantic"}[name]
    assert (metrics["model"], metrics["identifiers"], metrics["gallery_size"]) == (name, scheme, 23)
    assert metrics["num_beams"] == 23 and "seen" not in metrics and metrics["ms_per_query"] > 0
    assert f"mrr {metrics['mrr']:.3f}" in shown and "answering queries" in shown
    files = ["metrics.json", "rankings.jsonl", "retrieval_arguments.json"]
    assert sorted(path.name for path in out.iterdir()) == files  # no picture had to be encoded

    before = (out / "rankings.jsonl").read_bytes()
    ask(models[name], out, "--num_beams", 23, "--top_k", 6)
    assert (out / "rankings.jsonl").read_bytes() == before
    refused(ask, models[name], out, "--num_beams", 5, "--top_k", 6, parts=["num_beams (23 then, 5 now)"])


def test_beams_that_are_fewer_than_k_are_said(models, ask, tmp_path):
    shown = ask(models["t5"], tmp_path / "out", "--num_beams", 3)
    assert "3 beams find at most 3 pictures, fewer than --top_k 10" in shown
    assert [len(ranking.images) for ranking in read_rankings(tmp_path / "out" / "rankings.jsonl")] == [3] * 5


def test_a_gallery_that_is_a_part_of_theirs(models, ask, gallery_ids, picture_folder, queries, tmp_path):
    for image_id in gallery_ids[:7]:
        (tmp_path / "some" / image_id).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture_folder / image_id, tmp_path / "some" / image_id)
    (tmp_path / "q.txt").write_text("\n".join(SENTENCES))
    shown = ask(models["codebook_t5"], tmp_path / "out", asked=tmp_path / "q.txt", gallery=tmp_path / "some")
    assert "the gallery holds 7 of the 23 pictures that have identifiers" in shown
    scores = exhaustive(models["codebook_t5"], gallery_ids[:7])
    for ranking, own in zip(read_rankings(tmp_path / "out" / "rankings.jsonl"), scores, strict=True):
        assert ranking.images == [gallery_ids[row] for row in np.argsort(-own)]


@pytest.mark.parametrize("name", ["tiny_xmatching", "tiny_clip"])
def test_beams_are_reranked_by_a_dual_encoder(models, name, request, ask, rows, gallery_ids, targets, tmp_path):
    folder = request.getfixturevalue(name)
    ask(models["codebook_t5"], tmp_path / "beams", "--num_beams", 8, "--top_k", 8)
    ask(models["codebook_t5"], tmp_path / "out", "--num_beams", 8, "--top_k", 3, "--rerank_with", folder)
    encoder = load_dual_encoder(str(folder))
    images = encode_images(encoder.model, encoder.image_processor, rows)
    cosines = F.linear(encode_texts(encoder.model, encoder.tokenizer, SENTENCES), images)
    ranks = []
    both = (read_rankings(tmp_path / name / "rankings.jsonl") for name in ("beams", "out"))
    for number, (beams, reranked) in enumerate(zip(*both, strict=True)):
        own = {image_id: cosines[number, gallery_ids.index(image_id)].item() for image_id in beams.images}
        assert len(reranked.images) == 3 and set(reranked.images) <= set(own)
        np.testing.assert_allclose(reranked.scores, sorted(own.values(), reverse=True)[:3], atol=1e-5)
        np.testing.assert_allclose(reranked.scores, [own[image_id] for image_id in reranked.images], atol=1e-5)
        right = own.get(targets[number], -2)
        ranks.append(sum(cosine >= right - 1e-6 for cosine in own.values()) if right > -2 else np.inf)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert metrics["model"] == f"codebook_t5 reranked by {folder.name}"


def test_new_pictures_are_found_and_judged_apart(models, ask, tiny_xmatching, gallery_ids, targets, tmp_path):
    out = tmp_path / "out"
    refused(ask, models["of eighteen"], out, parts=["identifiers of 18 pictures, but 5 of the 23", "--add_new_images"])
    flags = ("--add_new_images", "--identifier_vectors_from", tiny_xmatching, "--num_beams", 23)
    shown = ask(models["of eighteen"], out, *flags)
    assert "5 pictures have got rq identifiers without training, beside the 18" in shown
    extended = Identifiers.from_pretrained(out)
    assert extended.added_image_ids == gallery_ids[18:]

    parts = load_generative(str(models["of eighteen"]))
    new = [target in extended.added_image_ids for target in targets]
    assert sum(new) == 2
    scores, ranks = [], []
    for sentence, target in zip(SENTENCES, targets, strict=True):
        inputs = parts.processor.tokenizer("question: " + sentence, return_tensors="pt")
        scores = score_identifiers(parts.model, extended, dict(inputs))[0]
        ranks.append(1 + int((scores > scores[extended.row(target)]).sum()))
    metrics = metrics_of(out)
    for group, wanted, size in (("seen", False, 18), ("new", True, 5)):
        own = [rank for rank, is_new in zip(ranks, new, strict=True) if is_new == wanted]
        assert metrics[group]["mrr"] == pytest.approx(np.mean([1 / rank for rank in own]))
        assert metrics[group]["hits@10"] == np.mean([rank <= 10 for rank in own])
        assert (metrics[group]["queries"], metrics[group]["pictures"]) == (len(own), size)
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks])) and metrics["gallery_size"] == 23
    table = [line.split() for line in shown.splitlines() if line.startswith(("seen ", "new "))]
    assert [line[:3] for line in table] == [["seen", "3", "18"], ["new", "2", "5"]]
    assert table[1][-1] == f"{metrics['new']['mrr']:.3f}"

    # the extended identifiers serve from then on, without the flag
    grown = shutil.copytree(models["of eighteen"], tmp_path / "grown")
    for name in ("identifiers.json", "identifiers.safetensors"):
        shutil.copy(out / name, grown)
    ask(grown, tmp_path / "again", "--num_beams", 23)
    again = metrics_of(tmp_path / "again")
    assert {name: again[name] for name in ("seen", "new")} == {name: metrics[name] for name in ("seen", "new")}


@pytest.mark.parametrize("given", [True, False], ids=["vectors of an XMatchingModel", "its own tower's"])
def test_new_pictures_of_atomic_identifiers_get_tokens_and_the_grown_model_is_kept(
    ask, save_generative, tiny_xmatching, gallery_ids, targets, tmp_path, monkeypatch, given
):
    monkeypatch.setattr(
        new_pictures, "LEAST_PREDICTED", -1.0
    )  # the rows of a model with random weights follow from nothing
    folder = save_generative(tmp_path / "atomic", "codebook_t5", "atomic", gallery_ids[:18])
    before = load_generative(str(folder))
    flags = ["--add_new_images", "--num_beams", 23, *(["--identifier_vectors_from", tiny_xmatching] if given else [])]
    shown = ask(folder, tmp_path / "out", *flags)
    assert "5 pictures have got tokens without training, beside the 18" in shown
    grown = load_generative(str(tmp_path / "out"))
    assert grown.identifiers.added_image_ids == gallery_ids[18:]
    old, new = (part.model.shared.weight for part in (before, grown))
    torch.testing.assert_close(new[: len(old)], old, msg="nothing that was there changes")
    tokens = [grown.identifiers.sequence(name)[0] for name in gallery_ids]
    assert len(set(tokens)) == 23
    rows = new[tokens].detach()
    centre = rows[:18].mean(0)
    usual = 0.9 * (rows[:18] - centre).norm(dim=1).mean()
    torch.testing.assert_close(
        (rows[18:] - centre).norm(dim=1), usual.expand(5), msg="as far from the mean as old rows"
    )
    ranks = []
    for sentence, target in zip(SENTENCES, targets, strict=True):
        inputs = grown.processor.tokenizer("question: " + sentence, return_tensors="pt")
        scores = score_identifiers(grown.model, grown.identifiers, dict(inputs))[0]
        ranks.append(1 + int((scores > scores[grown.identifiers.row(target)]).sum()))
    metrics = metrics_of(tmp_path / "out")
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    ask(tmp_path / "out", tmp_path / "again", "--num_beams", 23)
    again = metrics_of(tmp_path / "again")
    assert {name: again[name] for name in ("seen", "new")} == {name: metrics[name] for name in ("seen", "new")}


def test_rows_are_predicted_from_trained_pictures_alone(save_generative, tmp_path, gallery_ids, monkeypatch):
    """A picture that was added before has a row that was guessed itself."""
    folder = save_generative(tmp_path / "atomic", "codebook_t5", "atomic", gallery_ids[:18])
    parts = load_generative(str(folder))
    parts.identifiers.source["first_pictures"] = 12
    gallery = Dataset.from_dict({"image_id": gallery_ids})
    adder = new_pictures.NewPictures(None, "images", gallery)
    assert adder.trained(parts.identifiers) == gallery_ids[:12]
    few = new_pictures.NewPictures(None, "images", gallery.select(range(5)))
    with pytest.raises(UserError, match="the gallery holds 5 that it was trained on, and from fewer than 8"):
        few.identifiers(parts, ["new.jpg"])


def test_captions_of_new_pictures_come_without_held_out_ones(
    save_generative, flickr_folder, tiny_xmatching, encoder, ask, tmp_path
):
    rows = read_gallery(dataset_name=str(flickr_folder), held_out=(1, 3))
    every = read_gallery(dataset_name=str(flickr_folder))
    vectors = encode_images(encoder.model, encoder.image_processor, rows)
    names = rows["image_id"][:]
    model = save_generative(tmp_path / "model", "codebook_t5", "semantic", names[:9], vectors[:9], "xmatching")
    with open(tmp_path / "q.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        for name, kept, own in zip(names, rows["captions"], every["captions"], strict=True):
            writer.writerows([caption, name] for caption in own if caption not in kept)
    flags = ("--dataset_name", flickr_folder, "--add_new_images", "--identifier_vectors_from", tiny_xmatching)
    captions = (*flags, "--new_image_vectors", "captions", "--held_out_captions_per_image", 1, "--split_seed", 3)
    shown = ask(model, tmp_path / "out", *captions, asked=tmp_path / "q.csv")
    assert "3 pictures have got semantic identifiers" in shown and "asked as queries" not in shown
    shown = ask(model, tmp_path / "forgot", *flags, "--new_image_vectors", "captions", asked=tmp_path / "q.csv")
    assert "3 captions of new pictures are asked as queries, and are not used" in shown
    kept, dropped = Identifiers.from_pretrained(tmp_path / "out"), Identifiers.from_pretrained(tmp_path / "forgot")
    assert kept.tokens.tolist() == dropped.tokens.tolist()


def test_a_reranker_that_was_trained_on_the_queries_is_said(models, ask, tiny_xmatching, queries, tmp_path):
    reranker = shutil.copytree(tiny_xmatching, tmp_path / "reranker")
    shutil.copy(queries, tmp_path / "eval_queries.csv")  # left by a run that held one caption out
    split = {"do_train": True, "dataset_name": "photos", "split_seed": 0}
    (tmp_path / "run_arguments.json").write_text(json.dumps(split | {"held_out_captions_per_image": 1}))
    (reranker / "run_arguments.json").write_text(json.dumps(split | {"held_out_captions_per_image": 0}))
    flags = ("--rerank_with", reranker, "--num_beams", 10)
    shown = ask(models["t5"], tmp_path / "out", *flags, asked=tmp_path / "eval_queries.csv")
    assert f"{reranker} may have been trained on 5 of the 5 captions asked" in shown
    assert "held_out_captions_per_image (0 there, 1 here)" in shown
    assert metrics_of(tmp_path / "out")["possibly_trained_queries"] == 5


def test_several_models_are_compared(models, ask, tiny_xmatching, queries, gallery_ids, tmp_path):
    xmatching = shutil.copytree(tiny_xmatching, tmp_path / "xmatching")  # with what its training run left beside it
    shutil.copy(queries, xmatching / "eval_queries.csv")
    bm25 = {"BM25": {"hits@1": 0.25, "hits@10": 0.5, "mrr": 0.375, "gallery_size": 23}}
    (xmatching / "baselines.json").write_text(json.dumps(bm25))
    out, names = tmp_path / "out", [xmatching, models["codebook_t5"], models["t5"]]
    flags = ("--top_k", 5, "--contact_sheet_queries", 2)
    shown = ask(names, out, *flags)

    record = json.loads((out / "comparison.json").read_text())
    assert "possibly_trained_queries" not in record["models"]["xmatching"], "no record says what it was trained on"
    assert (record["queries"], record["gallery_size"], record["references"]) == (5, 23, bm25)
    for name, scheme in (("xmatching", None), ("codebook_t5", "rq"), ("t5", "atomic")):
        row, own = record["models"][name], metrics_of(out / name)
        assert row.get("identifiers") == scheme
        assert all(
            row[figure] == own[figure] for figure in ("hits@1", "hits@10", "mrr", "ms_per_query", "gallery_size")
        )
    for name, model in (("xmatching", xmatching), ("codebook_t5", models["codebook_t5"])):  # as each alone
        ask(model, tmp_path / "alone" / name, "--top_k", 5)
        rankings = ((folder / name / "rankings.jsonl").read_bytes() for folder in (out, tmp_path / "alone"))
        assert next(rankings) == next(rankings)
        beside, alone = metrics_of(out / name), metrics_of(tmp_path / "alone" / name)
        timeless = {figure: value for figure, value in alone.items() if figure != "ms_per_query"}
        assert beside.items() >= timeless.items()
    kept = [*(out / "xmatching" / "index").iterdir(), *(xmatching / f for f in ("model.safetensors", "tokenizer.json"))]
    assert record["models"]["xmatching"]["bytes"] == sum(path.stat().st_size for path in kept)

    low, high = (record["models"]["codebook_t5"][f"mrr_{end}"] for end in ("low", "high"))
    assert f"({low:.2f} to {high:.2f})" in shown
    lines = [re.sub(r" \([\d.]+ to [\d.]+\)", "", line).split() for line in shown.splitlines()]
    head = next(number for number, line in enumerate(lines) if line[:2] == ["model", "identifiers"])
    table = lines[head + 1 : head + 5]
    assert [line[0] for line in table] == ["xmatching", "codebook_t5", "t5", "BM25"]
    assert table[1][1:5] == ["rq", *(f"{record['models']['codebook_t5'][f]:.3f}" for f in ("hits@1", "hits@10", "mrr"))]
    assert table[3] == ["BM25", "–", "0.250", "0.500", "0.375", "–", "–", "23"]
    assert "\n5 queries answered by 3 models from 23 pictures: " in shown

    page = (out / "contact_sheet.html").read_text(encoding="utf-8")
    assert [page.count(f"<h3>{name}</h3>") for name in ("xmatching", "codebook_t5", "t5")] == [2] * 3
    with Image.open(out / "contact_sheet.jpg") as sheet:
        assert sheet.format == "JPEG"
    assert not (out / "rankings.jsonl").exists() and not (out / "metrics.json").exists()
    refused(ask, names[:2], out, *flags, parts=["model_name_or_path"])


def test_a_comparison_without_right_pictures(models, ask, tiny_clip, tmp_path):
    (tmp_path / "q.txt").write_text("\n".join(SENTENCES))
    names, flags = [tiny_clip, models["t5"]], ("--rerank_with", tiny_clip)
    shown = ask(names, tmp_path / "out", *flags, asked=tmp_path / "q.txt")
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(record["models"]) == ["tiny_clip", "t5 reranked by tiny_clip"] and record["references"] == {}
    assert "mrr" not in record["models"]["tiny_clip"] and "–" in shown
    assert record["models"]["t5 reranked by tiny_clip"]["bytes"] > record["models"]["tiny_clip"]["bytes"]


def test_documents_are_found_too(save_generative, ask, tiny_clip, models, tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, content in (
        (
            "documents",
            [{"id": f"d{row}", "text": f"the {word} dog"} for row, word in enumerate(("red", "green", "blue"))],
        ),
        ("train", [{"document_id": f"d{row}", "question": "who is it?"} for row in range(3)]),
        ("validation", [{"document_id": f"d{row}", "question": "which dog?"} for row in range(3)]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    model = save_generative(tmp_path / "model", "t5", "naive", ["d0", "d1", "d2"])
    (tmp_path / "q.csv").write_text("caption,image\nwhich dog is red,d0\n")
    flags, out = ("--dataset_name", folder, "--contact_sheet_queries", 5), tmp_path / "out"
    ask(model, out, *flags, asked=tmp_path / "q.csv")
    assert set(read_rankings(out / "rankings.jsonl")[0].images) == {"d0", "d1", "d2"}
    assert not (out / "contact_sheet.jpg").exists() and metrics_of(out)["gallery_size"] == 3
    (tmp_path / "q.txt").write_text("which dog\n")
    for name, more, part in (
        (tiny_clip, (), "holds documents"),
        (models["t5"], (), "identifiers of 23 documents, and not one of the 3"),
        (model, ("--rerank_with", tiny_clip), "--rerank_with"),
    ):
        refused(ask, name, tmp_path / "no", *flags, *more, asked=tmp_path / "q.txt", parts=[part])


def test_wrong_uses_are_answered_with_one_line_before_anything_is_written(
    models, ask, tiny_clip, tiny_xmatching, picture_folder, tmp_path
):
    out = tmp_path / "out"
    t5, codebook = models["t5"], models["codebook_t5"]
    nameless = shutil.copytree(t5, tmp_path / "nameless")
    (nameless / "identifiers.json").unlink()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(picture_folder, elsewhere / "below")
    (tmp_path / "q.txt").write_text("a dog\n")

    def wrong(names, *flags, parts, **options):
        refused(ask, names, out, *flags, parts=parts, **options)

    wrong(nameless, parts=["brings no identifiers.json", "run_dsi.py"])
    wrong(t5, parts=["identifiers of 23 pictures, and not one of the 23", "same root"], gallery=elsewhere,
          asked=tmp_path / "q.txt")  # fmt: skip
    wrong(tiny_clip, "--num_beams", 5, parts=["--num_beams is for models that write identifiers", "is a clip model"])
    wrong(tiny_clip, "--rerank_with", tiny_xmatching, parts=["--rerank_with is for"])
    wrong(codebook, "--rerank_with", t5, parts=[f"--rerank_with {t5} is a t5 model"])
    wrong(codebook, "--rerank_with", tmp_path / "q.txt", parts=["--rerank_with", "is not a folder"])
    wrong(t5, "--num_beams", 0, parts=["--num_beams 0: give 1 to 10000"])
    wrong(t5, "--identifier_vectors_from", tiny_xmatching, parts=["give --add_new_images"])
    wrong(models["of eighteen"], "--add_new_images", parts=["--identifier_vectors_from"])
    wrong([t5, t5], parts=["twice"])
    wrong([t5, tmp_path / "gone" / "model"], parts=["is not a folder"])
    wrong([t5, models["of eighteen"]], parts=["5 of the 23 in the gallery have none"])
    assert not out.exists()


def test_models_from_the_hub(models, tiny_clip, launch, picture_folder, queries, ask, tmp_path):
    codebook = models["codebook_t5"]
    nameless = shutil.copytree(codebook, tmp_path / "nameless", ignore=shutil.ignore_patterns("identifiers.*"))
    with HubServer() as hub:
        for name, folder in (("codebook", codebook), ("clip", tiny_clip), ("nameless", nameless)):
            hub.add(f"someone/{name}", folder)
        environment = hub.environment(tmp_path / "home")
        common = ["--image_dir", picture_folder, "--queries", queries, "--device", "cpu", "--contact_sheet_queries", 0]
        common += ["--output_dir", "out", "--model_name_or_path"]
        refused = launch("run_retrieval.py", *common, "someone/nameless", **environment)
        assert refused.returncode == 2 and "someone/nameless brings no identifiers.json" in refused.stderr
        assert refused.stderr.count("Traceback") == 0 and not (tmp_path / "out").exists()
        done = launch("run_retrieval.py", *common, "someone/codebook", "someone/clip", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    record = json.loads((out / "comparison.json").read_text())["models"]
    assert list(record) == ["someone/codebook", "someone/clip"]
    kept = ["model.safetensors", "tokenizer.json", "identifiers.json", "identifiers.safetensors"]
    assert record["someone/codebook"]["bytes"] == sum((codebook / name).stat().st_size for name in kept)
    ask(codebook, tmp_path / "local")
    local = (tmp_path / "local" / "rankings.jsonl").read_bytes()
    assert (out / "someone--codebook" / "rankings.jsonl").read_bytes() == local
