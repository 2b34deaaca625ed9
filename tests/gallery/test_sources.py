"""Galleries from tables, data sets and metadata, against the pictures that were put into them."""

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imagedex import cli
from imagedex.errors import UserError
from imagedex.gallery import rows, scanning
from imagedex.gallery.gallery import Gallery


def picture(number, size=(24, 16)):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(number, size=(24, 16)):
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).tobytes()


@pytest.fixture
def gallery(tiny_xmatching, tmp_path):
    return Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu")


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        path = tmp_path / "photos" / ("sea" if number % 2 else "wood") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "photos"


def everything(gallery, **options):
    """image_id -> what was found."""
    return {one.image_id: one for one in gallery.search("text:a dog", top_k=1000, **options)}


def embedded(contents, names=None):
    return [
        {"bytes": content, "path": name}
        for content, name in zip(contents, names or [None] * len(contents), strict=True)
    ]


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_with_pictures_and_columns(gallery, tmp_path):
    names = [f"n{number}.jpg" for number in range(7)]
    file = write(tmp_path / "p.parquet", {
        "image": embedded([png(number) for number in range(7)], names),
        "caption": [[f"a number {number}", ""] for number in range(7)],
        "stars": pa.array([1, 2, None, 4, 5, 6, 7], pa.int16()),
        "path": ["x"] * 7,
        "my title": ["a", "b", "c", "d", "e", "f", None],
        "embedding": [[0.5, 0.5]] * 7,
    }, row_group_size=3)  # fmt: skip
    changes = gallery.add(file)
    assert sorted(changes.added) == names and not changes.unreadable
    found = everything(gallery)
    assert all(pixels(found[name].picture) == pixels(picture(number)) for number, name in enumerate(names))
    assert found["n3.jpg"].row["captions"] == ["a number 3"] and found["n3.jpg"].row["path_"] == "x"
    assert found["n3.jpg"].row["bytes"] == len(png(3)) and found["n3.jpg"].row["width"] == 24
    assert sorted(everything(gallery, where="stars > 4 and my_title != 'e'")) == ["n5.jpg"]
    assert sorted(everything(gallery, where="'number 2' in captions")) == ["n2.jpg"]
    assert "embedding" not in found["n3.jpg"].row
    with pytest.raises(UserError, match="no column is called embedding"):
        gallery.search("a dog", where="embedding == 1")
    again = Gallery.open(gallery.folder, device="cpu")
    assert again.add(file).unchanged == 7
    assert gallery.export(tmp_path / "out.parquet") == 7
    assert pq.read_table(tmp_path / "out.parquet")["stars"].to_pylist() == [1, 2, None, 4, 5, 6, 7]


def test_only_what_is_new_is_encoded_and_what_is_gone_leaves(gallery, tmp_path, monkeypatch):
    file = tmp_path / "p.parquet"
    write(file, {"image": embedded([png(n) for n in range(5)], [f"{n}.png" for n in range(5)])})
    gallery.add(file)
    with monkeypatch.context() as patch:  # a file of the same time is not read
        patch.setattr(rows, "content_at", lambda *a: pytest.fail("read again"))
        patch.setattr(scanning, "content_of", lambda *a: pytest.fail("read again"))
        assert gallery.add(file).unchanged == 5
    seen = []
    real = Gallery._fill
    monkeypatch.setattr(
        Gallery, "_fill", lambda self, keys, *a: seen.append(len(self.store.missing(keys))) or real(self, keys, *a)
    )
    numbers = {"0.png": 0, "1.png": 11, "3.png": 3, "new.png": 20, "moved.png": 4}
    write(file, {"image": embedded([png(n) for n in numbers.values()], list(numbers))})
    changes = gallery.add(file)
    assert (changes.added, changes.changed) == (["moved.png", "new.png"], ["1.png"])
    assert changes.removed == ["2.png", "4.png"] and changes.unchanged == 2 and seen == [2]
    found = everything(gallery)
    assert {name: pixels(one.picture) for name, one in found.items()} == {
        n: pixels(picture(i)) for n, i in numbers.items()
    }


def test_raw_bytes_null_rows_and_broken_pictures(gallery, tmp_path):
    file = write(
        tmp_path / "p.parquet", {"jpg": pa.array([png(0), None, b"no picture", png(3)], pa.binary()), "n": [0, 1, 2, 3]}
    )
    changes = gallery.add(file)
    assert set(changes.unreadable) == {"00000001", "00000002"} and len(gallery) == 2
    assert "holds no picture" in changes.unreadable["00000001"]
    found = everything(gallery, where="n == 3")
    assert pixels(found["00000003"].picture) == pixels(picture(3))


def test_names_that_tell_nothing_apart_are_numbers(gallery, tmp_path):
    shards = tmp_path / "set" / "data"
    shards.mkdir(parents=True)
    for shard in range(2):
        contents = [png(10 * shard + number) for number in range(3)]
        write(shards / f"train-{shard:05d}.parquet", {"image": embedded(contents, ["image.png"] * 3), "n": [shard] * 3})
    gallery.add(tmp_path / "set")
    found = everything(gallery)
    assert sorted(found) == [f"train-{shard:05d}/{row:08d}" for shard in range(2) for row in range(3)]
    assert pixels(found["train-00001/00000002"].picture) == pixels(picture(12))
    assert found["train-00001/00000002"].row["folder"] == "train-00001"


def test_a_column_of_paths(gallery, photos, tmp_path):
    names = ["sea/1.png", "wood/2.png", "sea/1.png", "gone.png"]
    file = write(
        photos / "pairs.parquet", {"file_name": names, "caption": ["one", "two", "again", "x"], "k": [1, 2, 3, 4]}
    )
    changes = gallery.add(file)
    assert sorted(changes.added) == ["sea/1.png", "wood/2.png"]
    assert changes.passed_over == {"(a row whose picture is not there)": 1}
    found = everything(gallery)
    assert found["sea/1.png"].row["captions"] == ["one", "again"] and found["sea/1.png"].row["k"] == 1
    elsewhere = write(tmp_path / "elsewhere.parquet", {"file_name": names[:2], "k": [8, 9]})
    with pytest.raises(UserError, match="--image_dir"):
        gallery.add(elsewhere)
    other = Gallery.open(tmp_path / "other", gallery.model.name, device="cpu")
    assert len(other.add(elsewhere, image_dir=str(photos)).added) == 2


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "a/../../secret.png"])
def test_rows_do_not_reach_outside_their_folder(gallery, tmp_path, name):
    picture(1).save(tmp_path / "secret.png")
    name = name.format(folder=tmp_path)
    (tmp_path / "set").mkdir()
    file = write(tmp_path / "set" / "p.parquet", {"file_name": [name]})
    with pytest.raises(UserError, match="not below"):
        gallery.add(file)
    held = write(tmp_path / "set" / "p.parquet", {"image": embedded([None, png(0)], [name, "b.png"])})
    with pytest.raises(UserError, match="not below"):
        gallery.add(held)
    picture(2).save(tmp_path / "set" / "in.png")
    (tmp_path / "set" / "p.parquet").unlink()
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "secret": 1}) + "\n")
    changes = gallery.add(tmp_path / "set")
    assert changes.added == ["in.png"] and changes.passed_over == {"(a row whose picture is not there)": 1}
    assert not gallery.folder.joinpath("secret.png").exists()


def test_addresses_are_not_fetched(gallery, tmp_path):
    file = write(tmp_path / "p.parquet", {"image": ["https://example.org/a.jpg"]})
    with pytest.raises(UserError, match="none is fetched from the network"):
        gallery.add(file)


def test_saved_data_sets_and_their_records(gallery, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    parts = {
        split: datasets.Dataset.from_dict(
            {"image": [picture(start + n) for n in range(3)], "label": [0, 1, 1]}, features=features
        )
        for split, start in (("train", 0), ("test", 10))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(gallery.add(tmp_path / "saved").added) == 6
    assert len(everything(gallery, where="label == 'dog'")) == 4
    shown = {pixels(one.picture) for one in everything(gallery).values()}
    assert shown == {pixels(picture(n)) for n in (0, 1, 2, 10, 11, 12)}
    assert gallery.add(tmp_path / "saved").unchanged == 6
    record = tmp_path / "saved" / "train" / "state.json"
    record.write_text(record.read_text().replace("data-0", "../../data-0"))
    with pytest.raises(UserError, match="outside"):
        gallery.add(tmp_path / "saved")


def test_data_set_objects(gallery, tmp_path):
    made = datasets.Dataset.from_dict(
        {"image": [picture(n) for n in range(5)], "n": list(range(5))},
        features=datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")}),
    )
    changes = gallery.add(made)
    assert len(changes.added) == 5 and gallery.add(made).unchanged == 5
    assert {one.row["n"]: pixels(one.picture) for one in everything(gallery).values()} == {
        n: pixels(picture(n)) for n in range(5)
    }
    made.save_to_disk(tmp_path / "saved")
    chosen = datasets.load_from_disk(str(tmp_path / "saved")).filter(lambda row: row["n"] % 2 == 1)
    other = Gallery.open(tmp_path / "other", gallery.model.name, device="cpu")
    other.add(chosen)
    assert {one.row["n"]: pixels(one.picture) for one in everything(other).values()} == {
        n: pixels(picture(n)) for n in (1, 3)
    }
    assert not (tmp_path / "other" / ".tables").exists()  # its pictures lie in the saved files
    with pytest.raises(UserError, match="is no source"):
        gallery.add(datasets.DatasetDict({"train": made}))


def test_data_sets_whose_rows_name_files(gallery, photos, tmp_path):
    made = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="not below"):
        gallery.add(made)
    gallery.add(made, image_dir=str(photos))
    assert sorted(everything(gallery)) == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))


def test_a_data_set_of_the_hub(gallery, tmp_path, monkeypatch):
    asked = []
    made = datasets.Dataset.from_dict({"image": [picture(1)]}, features=datasets.Features({"image": datasets.Image()}))
    made.save_to_disk(tmp_path / "saved")
    stored = datasets.load_from_disk(str(tmp_path / "saved"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or stored)
    gallery.add("hf:someone/pictures:small:train")
    assert asked == [(("someone/pictures", "small"), {"split": "train"})] and len(gallery) == 1
    assert gallery.add("hf:someone/pictures:small:train").unchanged == 1
    with pytest.raises(UserError, match="give hf:"):
        gallery.add("hf:a:b:c:d")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_metadata_beside_pictures(gallery, photos, form):
    said = [
        {"file_name": "1.png", "caption": "the sea", "stars": 5, "wet": True, "zip": "007"},
        {"file_name": "3.png", "caption": "waves", "stars": None, "wet": True, "zip": "12"},
        {"file_name": "3.png", "caption": "more waves", "stars": 2, "wet": True, "zip": "12"},
        {"file_name": "none.png", "caption": "x", "stars": 1, "wet": False, "zip": "1"},
    ]
    file = photos / "sea" / f"metadata.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(said), file)
    elif form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in said))
    else:
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in said]
        file.write_text("\n".join([",".join(said[0]), *lines]) + "\n")
    changes = gallery.add(photos)
    assert changes.passed_over == {"(a row whose picture is not there)": 1} and len(gallery) == 6
    found = everything(gallery)
    assert found["sea/3.png"].row["captions"] == ["waves", "more waves"] and found["sea/3.png"].row["stars"] is None
    assert found["sea/5.png"].row["stars"] is None and found["wood/0.png"].row["captions"] == []
    assert sorted(everything(gallery, where="stars >= 4")) == ["sea/1.png"]
    assert sorted(everything(gallery, where="wet and zip == '007'")) == ["sea/1.png"]
    assert sorted(everything(gallery, where="not stars >= 4")) == []
    assert gallery.add(photos).unchanged == 6
    file.write_bytes(file.read_bytes()) if form == "parquet" else file.write_text(
        file.read_text().replace("waves", "water")
    )
    changes = gallery.add(photos)
    assert changes.changed == ([] if form == "parquet" else ["sea/3.png"])  # said anew, and not encoded
    file.unlink()
    assert gallery.add(photos).changed == ["sea/1.png", "sea/3.png"]
    with pytest.raises(UserError, match="no column is called stars"):
        gallery.search("a dog", where="stars == 1")


def test_archives_of_img2dataset(gallery, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for number in range(3):
            said = {"caption": f"number {number}", "similarity": number / 2, "width": 1, "tags": ["a"], "exif": None}
            files = {
                "png": png(number),
                "json": json.dumps(said).encode() if number < 2 else b"{",
                "txt": b"in words\nmore",
            }
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    changes = gallery.add(tmp_path / "00000.tar")
    assert changes.passed_over == {"(a json that is no JSON object)": 1}
    found = everything(gallery)
    assert found["00001.png"].row["captions"] == ["in words", "more", "number 1"]
    assert found["00001.png"].row["width"] == 24 and found["00001.png"].row["width_"] == 1
    assert sorted(everything(gallery, where="similarity > 0.2")) == ["00001.png"]


def test_columns_of_several_sources(gallery, photos, tmp_path, caplog):
    write(
        tmp_path / "a.parquet",
        {"image": embedded([png(20)], ["a.png"]), "stars": [3], "size": ["big"], "odd": [{"x": 1}]},
    )
    (photos / "metadata.csv").write_text("file_name,stars,size\nsea/1.png,4.5,7\n")
    gallery.add(photos, tmp_path / "a.parquet")
    assert sorted(everything(gallery, where="stars >= 3")) == ["a.parquet/a.png", "sea/1.png"]
    assert sorted(everything(gallery, where="size in ['7', 'big']")) == ["a.parquet/a.png", "sea/1.png"]
    assert "size is string in one source and int64 in another" in caplog.text or "text in the gallery" in caplog.text
    assert "odd (struct" in caplog.text
    assert everything(gallery)["wood/0.png"].row["stars"] is None


def test_what_was_found_in_a_table_or_an_archive_is_asked_with(gallery, photos, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(photos / "wood" / "4.png", "x.png")
    gallery.add(write(tmp_path / "p.parquet", {"image": embedded([png(n) for n in range(3)])}), tmp_path / "s.tar")
    for one in gallery.search("text:a dog", top_k=4):
        assert gallery.search(one.path, top_k=1)[0].image_id == one.image_id
        assert gallery.search(f"2:image:{one.path}", top_k=1)[0].image_id == one.image_id


def test_a_picture_that_is_named_twice(gallery, photos, tmp_path, caplog):
    """The first row's columns count, and the log says so; rows that say captions alone are many a picture."""
    (photos / "metadata.csv").write_text("file_name,stars,text\nsea/1.png,3,a\nsea/1.png,4,b\n")
    gallery.add(photos)
    one = everything(gallery, where="stars == 3")["sea/1.png"]
    assert one.row["captions"] == ["a", "b"] and caplog.text.count("1 rows name a picture for the second time") == 1
    write(tmp_path / "p.parquet", {"image": ["photos/sea/1.png"] * 3, "stars": [5, 6, 7]})
    gallery.add(tmp_path / "p.parquet")
    assert "2 rows name a picture for the second time" in caplog.text
    caplog.clear()
    write(tmp_path / "p.parquet", {"image": ["photos/sea/1.png"] * 2, "captions": ["c", "d"]})
    gallery.add(tmp_path / "p.parquet")
    assert "second time" not in caplog.text


def test_what_a_source_says_again_is_not_new(gallery, tmp_path):
    """Though a row cannot be read, a value is no number, or a column became text for the sake of another source."""
    one, two, three = (
        {"image": embedded([png(10 * n + m) for m in range(2)], [f"{m}.png" for m in range(2)]), "caption": ["a", "b"]}
        for n in range(3)
    )
    one |= {"number": [1, 2], "share": [float("nan"), 0.5], "day": pa.array([1, 2], pa.timestamp("s"))}
    one["image"][1] = {"bytes": None, "path": None}
    files = [write(tmp_path / "one.parquet", one), write(tmp_path / "two.parquet", two | {"number": ["x", "2"]})]
    files.append(write(tmp_path / "three.parquet", three))
    gallery.add(*files)
    for again in (files, files[:1], files[1:]):
        assert (changes := gallery.add(*again)).changed == [] and changes.unchanged == 2 * len(again)
    write(tmp_path / "one.parquet", one)  # its time is another
    assert gallery.add(files[0]).changed == []
    write(files[1], two)
    assert len(gallery.add(*files).changed) == 2  # nothing is said any more
    assert sorted(everything(gallery, where="number > 0")) == ["0.png"]  # and numbers are numbers again


def test_what_is_no_table_of_pictures(gallery, tmp_path):
    with pytest.raises(UserError, match="no image column"):
        gallery.add(write(tmp_path / "p.parquet", {"x": [1]}))
    with pytest.raises(UserError, match="holds no pictures"):
        gallery.add(tmp_path / "p.parquet", image_column="x")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read"):
        gallery.add(tmp_path / "p.parquet")
    (tmp_path / "p.arrow").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        gallery.add(tmp_path / "p.arrow")
    assert len(gallery) == 0
    shutil.rmtree(gallery.folder, ignore_errors=True)


def test_rows_are_read_in_any_order(tmp_path):
    file = write(
        tmp_path / "p.parquet", {"jpg": pa.array([bytes([n]) * 50 for n in range(200)], pa.binary())}, row_group_size=70
    )
    for row in (0, 1, 69, 70, 5, 199, 140, 139, 3):
        assert rows.content_at(str(file), rows.place_of(row, "jpg")) == bytes([row]) * 50
    with pytest.raises(OSError, match="no row 200"):
        rows.content_at(str(file), rows.place_of(200, "jpg"))


def test_the_command_takes_tables(tiny_xmatching, photos, tmp_path, capsys):
    write(tmp_path / "p.parquet", {"where": ["sea/1.png", "wood/0.png"], "stars": [1, 5]})
    there = ["--gallery", str(tmp_path / "g"), "--device", "cpu"]
    options = [
        "--image_column",
        "where",
        "--image_dir",
        str(photos),
        "--num_workers",
        "0",
        "--model",
        str(tiny_xmatching),
    ]
    cli.main(["index", str(tmp_path / "p.parquet"), *there, *options])
    assert capsys.readouterr().out.startswith("2 added")
    cli.main(["search", "text:a dog", *there, "--where", "stars > 2", "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == ["wood/0.png"]
    with pytest.raises(SystemExit):
        cli.main(["index", str(photos), *there, "--image_dir", str(photos)])
    assert "are for tables" in capsys.readouterr().err
