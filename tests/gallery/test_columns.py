"""Columns of the user's: of which types and names they may be, and what filters make of them."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from imagedex.errors import UserError
from imagedex.gallery import columns, filters

ODD = {
    "class": [1, 2],
    "a b": [1.5, None],
    "path": ["p", "q"],
    "path_": ["r", "s"],
    "price": [decimal.Decimal("1.5"), None],
    "day": [datetime.date(2024, 1, 2), None],
    "moment": pa.array([datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC)] * 2, pa.timestamp("us", "UTC")),
    "label": pa.array(["u", "v"]).dictionary_encode(),
    "large": pa.array([2**63 + 1, 1], pa.uint64()),
    "word": pa.array(["é", "漢"], pa.large_string()),
    "vector": [1, 2],
    "ﬁ": [1, 2],
    "tags": [["a", "b"], None],
    "half": pa.array(np.array([1, 2], np.float16)),
    "yes": [True, None],
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("class_ == 2", [False, True]),
        ("a_b > 1", [True, False]),
        ("path_ == 'p' and path__2 == 'r'", [True, False]),
        ("price >= 1", [True, False]),
        ("day < '2024-05-01'", [True, False]),
        ("moment >= '2023-01-01'", [True, True]),
        ("label == 'v'", [False, True]),
        ("large > 5", [True, False]),
        ("word == '漢'", [False, True]),
        ("vector_ == 1", [True, False]),
        ("fi == 2", [False, True]),
        ("'a' in tags", [True, False]),
        ("half < 2", [True, False]),
        ("yes", [True, False]),
        ("not yes", [False, False]),  # a missing value is neither
    ],
)
def test_odd_names_and_types(where, expected):
    assert filters.allowed(columns.of_user(pa.table(ODD), "here"), where).tolist() == expected


def test_what_filters_cannot_compare_is_left_out_and_said(caplog):
    odd = {
        "n": [1],
        "vector_of": [[1.0]],
        "map": [{"x": 1}],
        "none": pa.nulls(1),
        "raw": [b"1"],
        "hour": [datetime.time(1)],
    }
    assert columns.of_user(pa.table(odd), "here").column_names == ["n"]
    assert all(name in caplog.text for name in odd if name != "n")


def test_cells_of_text_files():
    assert columns.with_types(["1", " 2 ", "", None]).to_pylist() == [1, 2, None, None]
    assert columns.with_types(["1", "2.5", "-1e3"]).to_pylist() == [1.0, 2.5, -1000.0]
    assert columns.with_types(["True", "false"]).to_pylist() == [True, False]
    for texts in (["007", "1"], ["00.5"], ["1", "x"], ["9" * 30, "a"], ["nan"], ["1_000"]):
        assert columns.with_types(texts).to_pylist() == texts


def test_rows_of_several_kinds_and_tables_of_several_types(caplog):
    assert columns.of_rows([{"a": 1}, {"a": "x", "b": True}]).to_pylist() == [
        {"a": "1", "b": None},
        {"a": "x", "b": True},
    ]
    parts = [
        pa.table({"a": [1], "b": [1]}),
        pa.table({"a": [2.5], "c": ["z"]}),
        pa.table({"a": pa.nulls(1), "b": [["x", "y"]]}),
    ]
    rows = columns.joined(parts).to_pylist()
    assert [row["a"] for row in rows] == [1.0, 2.5, None] and [row["b"] for row in rows] == ["1", None, "x; y"]
    assert "column b is" in caplog.text


def test_two_columns_of_one_name(tmp_path):
    from imagedex.gallery import tables

    with pytest.raises(UserError, match="several columns 'n'"):
        tables.check_names(["image", "n", "n"], "x.parquet")
