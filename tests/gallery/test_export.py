"""What a gallery writes for others, read by these others."""

import importlib.util
import json

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagedex import cli
from imagedex.errors import UserError
from imagedex.gallery.engines import milvus
from imagedex.gallery.gallery import Gallery

needs_milvus = pytest.mark.skipif(
    importlib.util.find_spec("milvus_lite") is None, reason="milvus-lite is not installed"
)


def paint(folder, names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def photos(tmp_path):
    return paint(tmp_path / "photos", ["a.png", 'b "c".png', "d'ö.png", "e.png", "f.png"])


@pytest.fixture
def gallery(tiny_xmatching, photos, tmp_path):
    gallery = Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu")
    gallery.add(photos)
    return gallery


def test_parquet_is_read_by_duckdb_pandas_and_arrow(gallery, tmp_path):
    file = tmp_path / "it's here.parquet"
    assert gallery.export(file) == 5
    query = gallery.query_vector(["text:a dog"])
    expected = [(one.image_id, one.score) for one in gallery.search_vectors(query[None], 5)[0]]
    biased = "bias" in gallery.store.shards[0].fields
    asked = "SELECT image_id, list_dot_product(vector::FLOAT[], $2::FLOAT[]){} AS score FROM read_parquet($1) ORDER BY score DESC"
    rows = duckdb.execute(asked.format(" - bias" if biased else ""), [str(file), query.tolist()]).fetchall()
    assert [row[0] for row in rows] == [image_id for image_id, _ in expected]
    assert np.allclose([row[1] for row in rows], [score for _, score in expected], atol=1e-5)
    wide = duckdb.execute("SELECT image_id FROM read_parquet($1) WHERE width > 26 AND folder = ''", [str(file)])
    assert sorted(wide.fetchall()) == [("e.png",), ("f.png",)]
    by_pandas, by_arrow = pd.read_parquet(file).set_index("image_id"), pq.read_table(file).to_pylist()
    for row in by_arrow:
        own = gallery.query_vector([f"image:{row['path']}"])
        assert np.allclose(row["vector"], own, atol=1e-5)
        assert np.allclose(by_pandas.loc[row["image_id"], "vector"], own, atol=1e-5)


def test_a_bias_is_exported_where_there_is_one(gallery, tmp_path):
    gallery.export(tmp_path / "v.parquet")
    names = pq.read_schema(tmp_path / "v.parquet").names
    assert ("bias" in names) == (gallery.model.encoder.bank is not None)
    rows = gallery._searchable()[1]
    keys = np.frombuffer(b"".join(pq.read_table(tmp_path / "v.parquet")["key"].to_pylist()), np.uint8).reshape(-1, 16)
    store = type(gallery.store)(tmp_path / "biased", {"model": "x"})
    bias = np.arange(5, dtype=np.float32)
    store.write(keys, vectors=rows.array("vectors"), bias=bias)
    store.reload()
    gallery._searched = (*gallery._searched[:1], store.rows(keys), gallery._searched[2], "bias")
    gallery.export(tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet")["bias"].to_pylist() == bias.tolist()


def test_a_name_that_is_no_parquet_file(gallery, tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    for name in ("vectors.csv", "folder.parquet"):
        with pytest.raises(UserError, match="name of a .parquet file, or milvus:URI"):
            gallery.export(tmp_path / name)


@needs_milvus
def test_a_collection_of_milvus_is_the_gallery_however_often_it_is_written(
    gallery, photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(milvus, "ROWS_AT_ONCE", 2)
    place = tmp_path / "out.db"
    with monkeypatch.context() as patch:  # stopped on the way
        patch.setattr("imagedex.gallery.engines.milvus.all_ids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            gallery.export(f"milvus:{place}")
    assert gallery.export(f"milvus:{place}") == 5
    (photos / "a.png").unlink()
    gallery.add(photos)
    words = ["export", "--gallery", str(gallery.folder), "--device", "cpu", "--to", f"milvus:{place}"]
    cli.main(words)
    assert capsys.readouterr().out == f"4 pictures: milvus:{place}\n"
    client = milvus.connected(str(place))
    assert client.list_collections() == ["pictures_gallery"]
    fields = ["id", "vector", "path", "width", "date", "captions", "key"]
    rows = {row["id"]: row for row in client.query("pictures_gallery", filter="", limit=50, output_fields=fields)}
    said = {row["image_id"]: row for row in gallery.table.to_pylist()}
    assert rows.keys() == said.keys() and len(rows) == 4
    for image_id, row in rows.items():
        assert np.allclose(row["vector"], gallery.query_vector([f"image:{row['path']}"]), atol=1e-5)
        assert (row["width"], row["path"]) == (said[image_id]["width"], said[image_id]["path"])
        assert bytes.fromhex(row["key"]) == said[image_id]["key"] and row["date"][:4] == str(said[image_id]["date"])[:4]
    query = gallery.query_vector(["text:a dog"])
    hits = client.search("pictures_gallery", data=[query], limit=5, filter="width >= 26", output_fields=["path"])[0]
    assert {hit["id"] for hit in hits} == {name for name, row in said.items() if row["width"] >= 26}


@pytest.fixture
def with_columns(gallery, photos):
    """A gallery whose pictures have columns with the names of what `export` adds."""
    said = {"bias": "of mine", "id": 7, "id_": 8, "gallery": "Uffizi", "vector": 9}
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | said))
    gallery.add(photos)
    return gallery


def test_columns_of_the_user_stay_beside_those_of_export(with_columns, tmp_path):
    with_columns.export(tmp_path / "v.parquet")
    rows = {row["image_id"]: row for row in pq.read_table(tmp_path / "v.parquet").to_pylist()}
    assert len(rows["a.png"]["vector"]) > 1 and rows["a.png"].get("bias") != "of mine"
    kept = {name: rows["a.png"][name] for name in ("bias_", "id", "id_", "gallery", "vector_")}
    assert kept == {"bias_": "of mine", "id": 7, "id_": 8, "gallery": "Uffizi", "vector_": 9}


@needs_milvus
def test_columns_of_the_user_stay_beside_those_of_milvus(with_columns, tmp_path, caplog):
    with_columns.export(f"milvus:{tmp_path / 'out.db'}")
    fields = ["id__2", "id_", "gallery_"]
    row = milvus.connected(str(tmp_path / "out.db")).get("pictures_gallery", ids=["a.png"], output_fields=fields)[0]
    assert [row[name] for name in fields] == [7, 8, "Uffizi"]
    assert "the column id is called id__2" in caplog.text


@needs_milvus
def test_a_collection_of_somebody_else_is_left_alone(gallery, tiny_xmatching, photos, tmp_path):
    place = tmp_path / "out.db"
    gallery.export(f"milvus:{place}#mine")
    other = Gallery.open(tmp_path / "other", str(tiny_xmatching), device="cpu")
    with pytest.raises(UserError, match="holds no picture"):
        other.export(f"milvus:{place}#empty")
    other.add(paint(tmp_path / "more", ["z.png"]))
    with pytest.raises(UserError, match="mine is of another gallery or model; name another: milvus:URI#NAME"):
        other.export(f"milvus:{place}#mine")
    other.export(f"milvus:{place}#theirs")
    client = milvus.connected(str(place))
    counts = {
        name: client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"] for name in ("mine", "theirs")
    }
    assert counts == {"mine": 5, "theirs": 1}
    client.create_collection("plain", dimension=3)
    with pytest.raises(UserError, match="plain is of another"):
        gallery.export(f"milvus:{place}#plain")


@pytest.mark.parametrize("name", ["faiss", "milvus"])
def test_a_gallery_keeps_its_engine_and_the_command_names_another(
    name, photos, tiny_xmatching, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("faiss")
    pytest.importorskip("milvus_lite")
    monkeypatch.setattr("imagedex.gallery.engines.index.Index.few", 0)
    there = ["--gallery", str(tmp_path / "g"), "--device", "cpu"]
    cli.main(["index", str(photos), *there, "--model", str(tiny_xmatching), "--num_workers", "0", "--engine", name])
    made = {"faiss": tmp_path / "g" / "faiss" / "index", "milvus": tmp_path / "g" / "milvus.db"}[name]
    assert made.exists() and Gallery.open(tmp_path / "g").searcher.engine == name
    (photos / "a.png").unlink()
    cli.main(["index", str(photos), *there, "--num_workers", "0"])
    capsys.readouterr()
    answers = []
    for engine in ([], ["--engine", "exact"], ["--engine", "auto"]):
        cli.main(["search", "two dogs", *there, "--json", *engine])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == answers[2] and len(answers[0]["images"]) == 4
    opened = Gallery.open(tmp_path / "g", device="cpu")
    opened.remove([answers[0]["images"][0]])
    assert [one.image_id for one in opened.search("two dogs")] == answers[0]["images"][1:]


@needs_milvus
def test_a_cluster_that_does_not_answer_is_said_before_anything_is_encoded(
    photos, tiny_xmatching, tmp_path, monkeypatch
):
    monkeypatch.setattr(milvus, "PATIENCE", 1)
    gallery = Gallery.open(tmp_path / "g", str(tiny_xmatching), device="cpu", engine="milvus:http://127.0.0.1:9")
    with pytest.raises(UserError, match="Milvus at http://127.0.0.1:9"):
        gallery.add(photos)
    assert not (tmp_path / "g" / "vectors").exists()
