"""A gallery through changes, against a dictionary of what lies on disk."""

import json
import os
import shutil
import tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imagedex.errors import UserError
from imagedex.files import Lock
from imagedex.gallery import compaction, looked, pictures, scanning
from imagedex.gallery import gallery as gallery_module
from imagedex.gallery.gallery import Gallery


def paint(path, number, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    for number in range(8):
        paint(tmp_path / "photos" / ("sea" if number % 2 else "wood") / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def gallery(tiny_xmatching, tmp_path):
    return Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu")


def ids(found):
    return [one.image_id for one in found]


def test_the_first_time_and_again(gallery, photos):
    changes = gallery.add(photos)
    assert (len(changes.added), changes.unchanged, len(gallery)) == (8, 0, 8)
    assert gallery.add(photos).unchanged == 8
    found = gallery.search("two dogs on a beach", top_k=3)
    assert len(found) == 3 and found[0].score >= found[1].score >= found[2].score
    assert ids(gallery.search("two dogs on a beach", top_k=8, where="folder == 'sea'")) == [
        one for one in ids(gallery.search("two dogs on a beach", top_k=8)) if one.startswith("sea/")
    ]
    with found[0].picture as picture:
        assert picture.size == (24, 16) and picture.mode == "RGB"
    assert found[0].row["width"] == 24 and found[0].row["folder"] in ("sea", "wood")


def test_a_picture_finds_itself_and_a_part_can_be_taken_off(gallery, photos):
    gallery.add(photos)
    asked = photos / "sea" / "3.png"
    assert ids(gallery.search(str(asked), top_k=1)) == ["sea/3.png"]
    sentence, picture = (gallery.query_vector([part]) for part in ("text:a dog", f"image:{asked}"))
    both = gallery.query_vector(["2:a dog", f"image:{asked}"])
    expected = 2 * sentence + picture
    assert np.allclose(both, expected / np.linalg.norm(expected), atol=1e-6)


def test_new_changed_renamed_and_removed_pictures(gallery, photos, monkeypatch):
    gallery.add(photos)
    paint(photos / "sea" / "new.png", 100)
    paint(photos / "wood" / "0.png", 101, size=(30, 20))
    (photos / "sea" / "1.png").unlink()
    (photos / "sea" / "3.png").rename(photos / "sea" / "renamed.png")
    seen = []
    real = Gallery._fill
    monkeypatch.setattr(
        Gallery, "_fill", lambda self, keys, *a: seen.append(len(self.store.missing(keys))) or real(self, keys, *a)
    )
    changes = gallery.add(photos)
    assert changes.added == ["sea/new.png", "sea/renamed.png"] and changes.changed == ["wood/0.png"]
    assert changes.removed == ["sea/1.png", "sea/3.png"] and changes.unchanged == 5
    assert seen == [2]  # the renamed one is known by its content
    again = Gallery.open(gallery.folder, device="cpu")
    there = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert sorted(ids(again.search("a dog", top_k=50))) == there


def test_what_cannot_be_read_is_counted_and_not_tried_again(gallery, photos, monkeypatch):
    (photos / "broken.jpg").write_bytes(b"no picture")
    whole = paint(photos / "cut.png", 5, size=(200, 200)).read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("x")
    changes = gallery.add(photos)
    assert set(changes.unreadable) == {"broken.jpg", "cut.png"} and changes.passed_over == {".txt": 1}
    assert len(gallery) == 8 and len(gallery.search("a dog", top_k=50)) == 8
    with monkeypatch.context() as patch:  # not looked at again, but said again
        patch.setattr(scanning, "describe", lambda place: pytest.fail("read again"))
        again = gallery.add(photos)
    assert set(again.unreadable) == {"broken.jpg", "cut.png"} and again.unchanged == 10
    (photos / "cut.png").write_bytes(whole)
    assert gallery.add(photos).changed == ["cut.png"] and len(gallery) == 9


def test_links_that_lead_back_and_hidden_files(gallery, photos):
    os.symlink("..", photos / "sea" / "up")
    os.symlink(".", photos / "here")
    os.symlink("nothing.png", photos / "gone.png")
    paint(photos / ".hidden" / "x.png", 50)
    changes = gallery.add(photos)
    assert len(changes.added) == 8 and changes.passed_over == {"(a link that leads nowhere)": 1}


def test_archives_lists_and_second_folders(gallery, photos, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for path in sorted(photos.rglob("*.png"))[:2]:
            archive.add(path, path.name)
        (tmp_path / "0.txt").write_text("a caption")
        archive.add(tmp_path / "0.txt", "1.txt")
    other = paint(tmp_path / "elsewhere" / "x.png", 60)
    (tmp_path / "list.txt").write_text(f"elsewhere/x.png\n{photos / 'sea' / '1.png'}\n")
    gallery.add(photos)
    gallery.add(tmp_path / "0.tar", tmp_path / "list.txt", other.parent)
    names = ids(gallery.search("a dog", top_k=50))
    assert {"elsewhere/x.png", "list.txt/elsewhere/x.png"} < set(names) and len(names) == 8 + 2 + 2 + 1
    in_archive = [one for one in gallery.search("a dog", top_k=50) if one.image_id.startswith("0.tar/")]
    assert sorted(one.row["captions"] for one in in_archive) == [[], ["a caption"]]
    assert in_archive[0].picture.size == (24, 16)
    shutil.rmtree(other.parent)
    other.parent.mkdir()
    assert gallery.add(other.parent).removed == ["elsewhere/x.png"]  # of that source alone
    assert len(gallery) == 12


def test_a_removed_picture_and_a_filter_to_remove_by(gallery, photos):
    gallery.add(photos)
    assert gallery.remove(["sea/1.png"]) == ["sea/1.png"]
    assert gallery.remove(where="folder == 'wood'") == ["wood/0.png", "wood/2.png", "wood/4.png", "wood/6.png"]
    assert sorted(ids(gallery.search("a dog", top_k=50))) == ["sea/3.png", "sea/5.png", "sea/7.png"]
    with pytest.raises(UserError, match="holds no picture sea/1.png"):
        gallery.remove(["sea/1.png"])
    gallery.add(photos)
    assert len(gallery) == 8


def test_a_kill_before_the_catalog_is_written_costs_nothing(gallery, photos, monkeypatch):
    from imagedex.gallery import catalog

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(catalog, "write", killed)
        gallery.add(photos)
    assert Gallery.open(gallery.folder, gallery.model.name, device="cpu").table.num_rows == 0
    seen = []
    monkeypatch.setattr(Gallery, "_fill", lambda *args: seen.append(args))
    assert len(gallery.add(photos).added) == 8 and not seen


def test_half_precision_takes_half_the_room(tiny_xmatching, photos, tmp_path):
    galleries = {}
    for kind in ("float32", "float16"):
        galleries[kind] = Gallery.open(tmp_path / kind, str(tiny_xmatching), device="cpu", vector_type=kind)
        galleries[kind].add(photos)
    half, whole = (galleries[kind].store.shards[0].fields["vectors"] for kind in ("float16", "float32"))
    assert half.dtype == np.float16 and np.abs(half.astype(np.float32) - whole).max() < 1e-3
    with pytest.raises(UserError, match="holds float16 vectors"):
        Gallery.open(tmp_path / "float16", str(tiny_xmatching), vector_type="float32")


def test_export_is_read_by_others(gallery, photos, tmp_path):
    gallery.add(photos)
    assert gallery.export(tmp_path / "v.parquet") == 8
    table = pd.read_parquet(tmp_path / "v.parquet").set_index("image_id")
    for image_id in table.index:
        own = gallery.query_vector([f"image:{photos / image_id}"])
        assert np.allclose(table.loc[image_id, "vector"], own, atol=1e-5)


def test_what_is_no_gallery_or_of_another_model(gallery, tiny_clip, photos, tmp_path):
    gallery.add(photos)
    for folder, model, says in (
        (photos, gallery.model.name, "is not empty and no gallery"),
        (photos / "sea" / "1.png", gallery.model.name, "is a file"),
        (gallery.folder, str(tiny_clip), "would see its pictures otherwise"),
    ):
        with pytest.raises(UserError, match=says):
            Gallery.open(folder, model, device="cpu")
    with pytest.raises(UserError, match="no such folder or file"):
        gallery.add(tmp_path / "nowhere")
    (gallery.folder / "catalog.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match="is broken"):
        Gallery.open(gallery.folder, device="cpu")


def test_two_processes_do_not_change_one_gallery_at_once(gallery, photos):
    gallery.folder.mkdir()
    with Lock(gallery.folder, "mine"), pytest.raises(UserError, match="--gallery .* another run is at work there"):
        gallery.add(photos)


def test_compaction_merges_what_many_updates_left(tmp_path):
    from imagedex.encoding.store import Store

    store, live, rng = Store(tmp_path, {"model": "x"}), {}, np.random.default_rng(0)
    for number in range(400):
        name = int(rng.integers(0, 60))
        key = rng.integers(0, 256, 16, dtype=np.uint8)
        live[name] = key.tobytes(), np.full(32, number, np.float32)
        store.write(key[None], vectors=live[name][1][None])
        store.reload()
        keys = np.frombuffer(b"".join(key for key, _ in live.values()), np.uint8).reshape(-1, 16)
        compaction.compact(store, keys)
        disk = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
        assert disk <= 1.2 * len(live) * (16 + 32 * 4) + 600
    assert np.array_equal(store.rows(keys).array("vectors"), np.stack([vector for _, vector in live.values()]))


def test_json_of_the_catalog_says_which_model(gallery, photos):
    import pyarrow.parquet as pq

    gallery.add(photos)
    record = json.loads(pq.read_schema(gallery.folder / "catalog.parquet").metadata[b"imagedex"])
    assert record["model"] == gallery.model.name and record["roots"] == {str(photos): ""}


def test_what_probably_does_not_match_is_left_out(tiny_xmatching, photos, tmp_path):
    import torch

    from imagedex.modeling.caption_bank import CaptionBank

    gallery = Gallery.open(tmp_path / "gallery", str(tiny_xmatching), device="cpu")
    encoder = gallery.model.encoder
    if encoder.bank is None:
        with pytest.raises(UserError, match="has kept no bank"):
            gallery.search("a dog", keep=0.9)
        generator = torch.Generator().manual_seed(0)
        width = gallery.query_vector(["a dog"]).shape[0]
        encoder.bank = CaptionBank(torch.nn.functional.normalize(torch.randn(30, width, generator=generator), dim=1))
    gallery.model.__dict__.pop("maker", None)
    gallery.add(photos)
    with pytest.raises(UserError, match="has no cut-off"):
        gallery.search("a dog", keep=0.9)
    every = gallery.search("a dog", top_k=8)
    asked = torch.from_numpy(gallery.query_vector(["a dog"]))[None]
    confidences = [one.score - encoder.bank.bias(asked).item() for one in every]
    encoder.bank.right_confidences = torch.tensor(sorted(confidences)).repeat_interleave(5)
    kept = gallery.search("a dog", top_k=8, keep=0.5)
    assert 0 < len(kept) < 8 and ids(kept) == ids(every)[: len(kept)]
    encoder.bank.right_confidences = torch.full((20,), 9.0)
    assert gallery.search("a dog", top_k=8, keep=0.9) == []
    with pytest.raises(UserError, match="no share between 0 and 1"):
        gallery.search("a dog", keep=1.5)


@pytest.mark.parametrize("part", ["whole", "damaged"])
def test_what_a_killed_update_has_read_is_not_read_again(gallery, photos, monkeypatch, part):
    monkeypatch.setattr(looked, "LEAST", 1)
    monkeypatch.setattr(looked, "AT_ONCE", 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gallery, "_encode", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        gallery.add(photos)
    parts = sorted(gallery.folder.glob(looked.PARTS))
    assert len(parts) == 3  # of eight files
    if part == "damaged":
        parts[0].write_bytes(parts[0].read_bytes()[:-9])
    paint(photos / "wood" / "0.png", 101, size=(30, 20))  # changed meanwhile
    (photos / "wood" / "2.png").unlink()
    read, real = [], scanning.describe
    monkeypatch.setattr(scanning, "describe", lambda place: read.append(place.image_id) or real(place))
    again = Gallery.open(gallery.folder, gallery.model.name, device="cpu")
    assert len(again.add(photos).added) == 7 and len(again.search("a dog")) == 7
    assert sorted(read) == (
        ["wood/0.png"] if part == "whole" else ["sea/1.png", "sea/3.png", "sea/5.png", "wood/0.png"]
    )
    assert not list(gallery.folder.glob(looked.PARTS))
    other = Gallery.open(gallery.folder.parent / "other", gallery.model.name, device="cpu")
    other.add(photos)
    assert again.table.equals(other.table)


def test_what_killed_processes_leave_is_removed(gallery, photos):
    gallery.add(photos)
    left = [
        gallery.folder / ".catalog.parquet.abcd_123.tmp",
        gallery.folder / "vectors" / ".shard-1.safetensors.x2345678.tmp",
    ]
    for path in left:
        path.write_bytes(b"half")
    assert gallery.add(photos).unchanged == 8
    assert not any(path.exists() for path in left)


def test_an_update_without_a_change_writes_nothing(gallery, photos):
    gallery.add(photos)
    before = {path: path.stat().st_ino for path in gallery.folder.rglob("*")}
    assert gallery.add(photos).unchanged == 8
    assert {path: path.stat().st_ino for path in gallery.folder.rglob("*")} == before


def test_a_few_changes_do_not_write_the_whole_store_anew(gallery, tmp_path, monkeypatch):
    """200 pictures in shards of 10: of those that hold nothing dead none is touched, and one change makes one small shard."""
    for module in (gallery_module, compaction):
        monkeypatch.setattr(module, "ROWS_PER_SHARD", 10)
    for number in range(200):
        paint(tmp_path / "p" / f"{number:03d}.png", number, size=(2, 2))
    gallery.add(tmp_path / "p")
    before = set((gallery.folder / "vectors").iterdir())
    paint(tmp_path / "p" / "000.png", 1000, size=(3, 3))
    gallery.add(tmp_path / "p")
    assert len(set((gallery.folder / "vectors").iterdir()) ^ before) == 1
    for number in range(45, 95):
        (tmp_path / "p" / f"{number:03d}.png").unlink()
    gallery.add(tmp_path / "p")
    after = set((gallery.folder / "vectors").iterdir())
    assert sum(len(shard.keys) for shard in gallery.store.shards) <= 1.03 * 150 + 1
    assert len(before & after) >= 14


def test_a_file_that_could_not_be_opened_is_tried_again(gallery, photos, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "content_of", refused)
        assert len(gallery.add(photos).unreadable) == 8 and len(gallery) == 0
    assert not gallery.add(photos).unreadable and len(gallery) == 8


def test_a_decoder_may_raise_what_it_likes(gallery, photos, monkeypatch):
    def broken(picture):
        if picture.size == (24, 16):
            raise RuntimeError("as some decoders do")
        return picture.convert("RGB")

    monkeypatch.setattr(pictures, "as_rgb", broken)
    paint(photos / "sea" / "1.png", 1, size=(30, 30))
    changes = gallery.add(photos)
    assert len(changes.unreadable) == 7 and set(changes.unreadable.values()) == {"its pixels cannot be decoded"}


def test_a_picture_that_changes_while_it_is_indexed_is_said(gallery, photos, monkeypatch):
    real = Gallery._encode

    def late(self, *args):
        paint(photos / "sea" / "1.png", 999)
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="1.png has changed while it was indexed"):
        patch.setattr(Gallery, "_encode", late)
        gallery.add(photos)
    assert len(gallery.add(photos).added) == 8


def test_two_pictures_of_one_name_are_refused_or_named_apart(gallery, tmp_path):
    paint(tmp_path / "a" / "hol" / "x.png", 1)
    paint(tmp_path / "b" / "hol" / "x.png", 2)
    gallery.add(tmp_path / "a", tmp_path / "b" / "hol")
    assert sorted(ids(gallery.search("a dog"))) == ["hol-2/x.png", "hol/x.png"]
    for source in (tmp_path / "a", tmp_path / "b" / "hol"):
        assert gallery.add(source).unchanged == 1 and len(gallery) == 2
    paint(tmp_path / "a" / "hol-2" / "x.png", 3)
    with pytest.raises(UserError, match="would both be called hol-2/x.png"):
        gallery.add(tmp_path / "a")
    assert len(gallery) == 2


@pytest.mark.parametrize("damage", ["cut", "head", "twice", "link", "name"])
def test_archives_that_are_not_whole_or_odd(gallery, tmp_path, damage):
    file = tmp_path / "0.tar"
    names = [paint(tmp_path / f"{number}.png", number) for number in range(4)]
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
        for path in names:
            archive.add(path, path.name)
        offset = archive.offset
        if damage == "twice":
            archive.add(names[0], "1.png")
        if damage == "link":
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.LNKTYPE, "0.png"
            archive.addfile(link)
        if damage == "name":
            archive.add(names[0], b"\xff.png".decode("utf-8", "surrogateescape"))
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:offset])
    elif damage == "head":
        content[offset // 2 + offset // 4 : offset // 2 + offset // 4 + 600] = b"?" * 600
        file.write_bytes(content)
    if damage in ("cut", "head"):
        with pytest.raises(UserError, match="is no whole tar archive"):
            gallery.add(file)
        return
    changes = gallery.add(file)
    assert len(changes.added) == 4 and sum(changes.passed_over.values()) == 1


def test_a_search_beside_a_change_by_another_process(gallery, photos):
    gallery.add(photos)
    other = Gallery.open(gallery.folder, device="cpu")
    assert len(other.search("a dog", top_k=20)) == 8
    gallery.remove(where="folder == 'sea'")
    other._searched = other._store = None
    assert sorted(ids(other.search("a dog", top_k=20))) == ["wood/0.png", "wood/2.png", "wood/4.png", "wood/6.png"]


def test_a_copy_of_the_model_is_the_same_model(gallery, photos, tiny_xmatching, tmp_path):
    gallery.add(photos)
    shutil.copytree(tiny_xmatching, tmp_path / "copy")
    again = Gallery.open(gallery.folder, str(tmp_path / "copy"), device="cpu")
    assert again.add(photos).unchanged == 8 and len(again.search("a dog")) == 8


def test_parts_are_as_on_the_command_line(gallery, photos):
    gallery.add(photos)
    both = gallery.query_vector(["a dog", "-", "a leash"])
    dog, leash = (gallery.query_vector([text]) for text in ("a dog", "a leash"))
    assert np.allclose(both, (dog - leash) / np.linalg.norm(dog - leash), atol=1e-5)


def test_a_gallery_that_is_deleted_meanwhile_is_said(gallery, photos):
    gallery.add(photos)
    other = Gallery.open(gallery.folder, gallery.model.name, device="cpu")
    shutil.rmtree(gallery.folder)
    with pytest.raises(UserError, match="lacks vectors of its pictures"):
        other.search("a dog")


def test_a_folder_named_twice_and_nothing_to_remove_from(gallery, photos):
    with pytest.raises(UserError, match="holds no picture"):
        gallery.remove(where="folder == 'sea'")
    assert not gallery.folder.exists()
    assert len(gallery.add(photos, photos, f"{photos}/sea/..").added) == 8 and len(gallery) == 8


def test_what_ends_in_an_error_changes_nothing(gallery, photos, tmp_path, monkeypatch):
    gallery.add(photos)
    paint(tmp_path / "other" / "x.png", 70)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Gallery, "_fill", lambda *args: (_ for _ in ()).throw(RuntimeError))
        gallery.add(tmp_path / "other")
    assert list(gallery.header.roots) == [str(photos)] and len(gallery.search("a dog", top_k=20)) == 8


def test_what_a_killed_change_was_writing_is_cleared_by_the_next(gallery, photos):
    gallery.add(photos)
    for place in (gallery.folder, gallery.folder / "vectors", photos):
        (place / ".x.json.ab_12xyz.tmp").write_text("half")
    (gallery.folder / ".notes.tmp").write_text("mine")
    gallery.add(photos)
    assert sorted(path.name for path in gallery.folder.rglob("*.tmp")) == [".notes.tmp"]
    assert (photos / ".x.json.ab_12xyz.tmp").exists()
