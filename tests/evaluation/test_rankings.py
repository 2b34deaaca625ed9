"""Ranking files read back, also by other readers than ours."""

import json

import numpy as np
import pandas
import pytest

from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking, check_names, rankings_path, read_rankings, short_float, write_rankings

RANKINGS = [
    Ranking('zwei Hunde, "laut"\u2028 und schnell', ["dogs/größe 1.jpg", "b.png"], [0.75, -0.5], "b.png", 2),
    Ranking("nothing like it", [], []),
    Ranking("one", ["b.png"], [short_float(np.float32(0.3))]),
]


def plain(rankings):
    return [(ranking.query, ranking.images, ranking.scores) for ranking in rankings]


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_round_trip(tmp_path, output_format):
    path = write_rankings(RANKINGS, rankings_path(tmp_path, output_format))
    assert path == tmp_path / f"rankings.{output_format}"
    assert plain(read_rankings(path)) == plain(RANKINGS)


def test_jsonl_has_the_three_agreed_fields(tmp_path):
    path = write_rankings(RANKINGS, tmp_path / "rankings.jsonl")
    rows = [json.loads(line) for line in path.read_bytes().decode().strip("\n").split("\n")]
    assert [list(row) for row in rows] == [["query", "images", "scores"]] * 3
    assert rows[2]["scores"] == [0.3] and "0.30000001" not in path.read_text()
    assert "größe" in path.read_text(encoding="utf-8")


def test_parquet_is_read_by_pandas(tmp_path):
    table = pandas.read_parquet(write_rankings(RANKINGS, tmp_path / "rankings.parquet"))
    assert table["query"].tolist() == [ranking.query for ranking in RANKINGS]
    assert [list(images) for images in table["images"]] == [ranking.images for ranking in RANKINGS]


def test_tsv_is_one_line_of_file_names_a_query(tmp_path):
    path = write_rankings(RANKINGS, tmp_path / "rankings.tsv")
    assert path.read_bytes().decode() == "dogs/größe 1.jpg\tb.png\n\nb.png\n"
    assert [ranking.images for ranking in read_rankings(path)] == [ranking.images for ranking in RANKINGS]


def test_tsv_refuses_names_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="2 pictures have a tab"):
        check_names(["a\tb.jpg", "c.jpg", "d\n.jpg"], "tsv")
    check_names(["a\tb.jpg"], "jsonl")
    with pytest.raises(UserError):
        write_rankings([Ranking("q", ["a\tb.jpg"], [1.0])], tmp_path / "rankings.tsv")
    assert not list(tmp_path.iterdir())


def test_another_extension_is_refused(tmp_path):
    with pytest.raises(UserError, match=".jsonl, .parquet, .tsv"):
        write_rankings(RANKINGS, tmp_path / "rankings.csv")


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.0625, 1e-9, 12345.678])
def test_short_floats_are_the_same_float32(value):
    assert np.float32(short_float(np.float32(value))) == np.float32(value)
