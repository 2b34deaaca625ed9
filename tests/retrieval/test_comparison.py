"""The table of several models: names, sizes, what is known of the data, figures of trained and added pictures apart."""

import json
import math

import pytest

from imagedex.corpora.shape_scenes import perfect_reader
from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking
from imagedex.evaluation.table import table
from imagedex.retrieval import comparison
from imagedex.retrieval.queries import Queries


def test_labels_tell_models_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/model", "b/model", "b/other"):
        (tmp_path / name).mkdir(parents=True)
    labels = comparison.model_labels(["a/model", "b/model", str(tmp_path / "b/other"), "openai/clip"])
    assert labels == {
        "a/model": "a/model",
        "b/model": "b/model",
        "other": str(tmp_path / "b/other"),
        "openai/clip": "openai/clip",
    }
    assert [comparison.folder_of(label) for label in labels] == ["a--model", "b--model", "other", "openai--clip"]
    assert comparison.model_labels(["a/model"]) == {"model": "a/model"}
    for twice in (["a/model", "a/model"], ["a/model", "a/../a/model"]):
        with pytest.raises(UserError, match="twice"):
            comparison.model_labels(twice)


def test_size_is_of_what_answers(tmp_path):
    model, index = tmp_path / "model", tmp_path / "index"
    for folder in (model, model / "checkpoint-1", index):
        folder.mkdir()
    sizes = {"model.safetensors": 1000, "identifiers.safetensors": 200, "identifiers.json": 30, "tokenizer.json": 4,
             "optimizer.bin": 9999, "trainer_state.json": 9999, "checkpoint-1/model.safetensors": 9999}  # fmt: skip
    for name, size in sizes.items():
        (model / name).write_bytes(b"x" * size)
    (index / "shard-0123456789abcdef.safetensors").write_bytes(b"x" * 50_000)
    assert comparison.size_on_disk(str(model)) == 1234
    assert comparison.size_on_disk(str(model), index) == 51_234
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert comparison.size_on_disk(str(model), tmp_path / "no index") == 1234


def test_baselines_are_shown_only_beside_the_queries_they_were_asked(tmp_path):
    (tmp_path / "eval_queries.csv").write_text('caption,image\n"a dog,  here",a.jpg\na cat,b.jpg\n')
    rows = {"BM25": {"hits@1": 0.5, "gallery_size": 7}, "caption vectors": {"hits@1": 0.75, "gallery_size": 7}}
    (tmp_path / "baselines.json").write_text(json.dumps(rows))
    gallery = {"image_id": list("abcdefg")}

    class Rows(dict):
        def __len__(self):
            return 7

    def shown(sentences, targets):
        queries = Queries(sentences, targets and [(target,) for target in targets])
        return comparison.reference_rows([str(tmp_path), "openai/clip"], queries, "flickr", None, Rows(gallery))

    assert shown(["a cat", "a dog, here"], ["b.jpg", "a.jpg"]) == rows
    assert shown(["a cat", "a dog, here"], ["a.jpg", "b.jpg"]) == {}
    assert shown(["a cat"], ["b.jpg"]) == {}
    assert shown(["a cat", "a dog, here"], None) == {}
    assert comparison.kept_baselines(tmp_path, Queries(["a cat", "a dog, here"], [("b.jpg",), ("a.jpg",)]), 8) == {}


def test_a_row_of_two_galleries_is_shown_beside_the_one_that_is_searched(tmp_path):
    (tmp_path / "eval_queries.csv").write_text("caption,image\na cat,b.jpg\n")
    row = {"hits@1": 0.5, "gallery_size": 9, "new_hits@1": 0.75, "new_gallery_size": 2, "possibly_trained_queries": 0}
    (tmp_path / "baselines.json").write_text(json.dumps({"clip": row}))
    queries = Queries(["a cat"], [("b.jpg",)])
    whole = {"hits@1": 0.5, "gallery_size": 9, "possibly_trained_queries": 0}
    assert comparison.kept_baselines(tmp_path, queries, 9) == {"clip": whole}
    assert comparison.kept_baselines(tmp_path, queries, 2) == {"clip": {"hits@1": 0.75, "gallery_size": 2}}
    assert comparison.kept_baselines(tmp_path, queries, 3) == {}


def test_the_ceiling_of_the_scenes_is_that_of_these_queries():
    from imagedex.corpora import load_corpus

    scenes = load_corpus("shape_scenes", "30").splits["train"]
    asked = [captions[0] for captions in scenes["captions"]]
    targets = [(image_id,) for image_id in scenes["image_id"]]
    rows = comparison.reference_rows([], Queries(asked, targets), "shape_scenes", "30", scenes)
    assert list(rows) == [comparison.CEILING]
    assert rows[comparison.CEILING] == perfect_reader(asked, n_scenes=30) | {"gallery_size": 30}
    foreign = Queries(["a photograph of a dog"], targets[:1])
    assert comparison.reference_rows([], foreign, "shape_scenes", "30", scenes) == {}


def test_the_table():
    rows = {
        "xmatching": {"hits@1": 0.5, "hits@10": 1.0, "mrr": 0.75, "ms_per_query": 1.25, "bytes": 12_345_678,
                      "gallery_size": 1200},
        "codebook_t5": {"identifiers": "rq", "ms_per_query": 20.0, "bytes": 1_000_000, "gallery_size": 1200},
    }  # fmt: skip
    assert table(rows, comparison.COLUMNS, "model").splitlines() == [
        "model        identifiers  Hits@1  Hits@10    MRR  ms a query  on disk  gallery",
        "xmatching    –             0.500    1.000  0.750         1.2  12.3 MB    1,200",
        "codebook_t5  rq                –        –      –        20.0   1.0 MB    1,200",
    ]


def test_intervals_stand_beside_their_figures():
    rows = {"a": {"hits@1": 0.5, "hits@1_low": 0.4449, "hits@1_high": 0.5551}, "b": {"hits@1": 0.125}}
    assert table(rows, {"hits@1": "Hits@1"}).splitlines() == [
        "                 Hits@1",
        "a  0.500 (0.44 to 0.56)",
        "b                 0.125",
    ]


def test_trained_and_added_pictures_are_judged_apart():
    ranks = {"old": [1, 2, math.inf], "new": [4, math.inf]}
    rankings = [Ranking("q", [], [], [target], rank) for target, own in ranks.items() for rank in own]
    groups = comparison.group_figures(rankings, {"new", "another"}, 10)
    assert groups["seen"] == {"hits@1": pytest.approx(1 / 3), "hits@5": pytest.approx(2 / 3), "median_rank": 2,
                              "hits@10": pytest.approx(2 / 3), "mrr": 0.5, "queries": 3, "pictures": 8}  # fmt: skip
    assert groups["new"] == {"hits@1": 0, "hits@5": 0.5, "hits@10": 0.5, "mrr": 0.125, "queries": 2, "pictures": 2}
    assert comparison.group_table(groups).splitlines() == [
        "      queries  pictures  Hits@1  Hits@5  Hits@10    MRR",
        "seen        3         8   0.333   0.667    0.667  0.500",
        "new         2         2   0.000   0.500    0.500  0.125",
    ]
    assert comparison.group_figures(rankings, set(), 10) == {}
    assert list(comparison.group_figures(rankings[:3], {"new"}, 10)) == ["seen"]
