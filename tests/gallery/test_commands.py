"""The commands as they are typed."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from imagedex import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def photos(tmp_path):
    for number, colour in enumerate(("red", "green", "blue", "white")):
        folder = tmp_path / "photos" / ("warm" if number == 0 else "cold")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    (tmp_path / "photos" / "phone.heic").write_bytes(b"x")
    return tmp_path / "photos"


@pytest.fixture
def run(capsys):
    def call(*words):
        status = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as exit:
            status = exit.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_index_search_and_export(run, photos, tiny_xmatching, tmp_path, caplog):
    there = ["--gallery", tmp_path / "g", "--device", "cpu"]
    status, out, _ = run("index", photos, *there, "--model", tiny_xmatching, "--num_workers", 0)
    assert status == 0 and out.startswith("4 added, 0 unchanged, 0 unreadable; 4 pictures")
    assert "1 pictures of phones (.heic) are passed over" in caplog.text
    status, out, _ = run("search", "two dogs", *there, "--top_k", 2)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2 and all(os.path.isfile(line.split("  ")[-1]) for line in lines)
    status, out, _ = run(
        "search", photos / "warm" / "red.png", "-", "snow", *there, "--json", "--where", "folder == 'cold'"
    )
    answer = json.loads(out)
    assert answer["query"].endswith("red.png - snow") and sorted(answer) == ["images", "query", "scores"]
    assert sorted(answer["images"]) == ["cold/blue.png", "cold/green.png", "cold/white.png"]
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    status, out, _ = run("search", "a dog", *there, "--where", "width > 1000")
    assert out == "no picture passes the filter\n"
    run("search", "a dog", *there, "--sheet", tmp_path / "sheet.jpg")
    assert Image.open(tmp_path / "sheet.jpg").size[0] > 400
    status, out, _ = run("export", *there, "--to", tmp_path / "v.parquet")
    assert status == 0 and out.startswith("4 pictures") and (tmp_path / "v.parquet").is_file()
    status, out, _ = run("index", photos, *there, "--json")
    assert json.loads(out)["unchanged"] == 4 and json.loads(out)["passed_over"] == {".heic": 1}


def test_remove_takes_out_what_is_named_and_what_a_filter_holds_for(run, photos, tiny_xmatching, tmp_path):
    there = ["--gallery", tmp_path / "g", "--device", "cpu"]
    run("index", photos, *there, "--model", tiny_xmatching)
    status, out, _ = run("remove", "cold/blue.png", *there, "--where", "folder == 'warm'", "--json")
    assert status == 0 and json.loads(out) == {"removed": ["cold/blue.png", "warm/red.png"], "pictures": 2}
    assert run("remove", "cold/green.png", *there)[1] == f"1 removed; 1 pictures in {tmp_path / 'g'}\n"
    assert json.loads(run("search", "a dog", *there, "--json")[1])["images"] == ["cold/white.png"]
    assert run("index", photos, *there)[1].startswith("3 added, 1 unchanged")  # the files stayed where they are
    assert run("remove", *there, "--where", f"root == '{photos}'")[1].startswith("4 removed; 0 pictures")


def test_nothing_is_removed_where_the_model_is_gone(run, photos, tiny_xmatching, tmp_path):
    model, there = shutil.copytree(tiny_xmatching, tmp_path / "model"), ["--gallery", tmp_path / "g", "--device", "cpu"]
    run("index", photos, *there, "--model", model)
    before = (tmp_path / "g" / "catalog.parquet").read_bytes()
    shutil.rmtree(model)
    status, out, err = run("remove", "warm/red.png", *there)
    assert (status, out) == (2, "") and str(model) in err
    assert (tmp_path / "g" / "catalog.parquet").read_bytes() == before


def test_photos_without_a_gallery_are_indexed_into_the_cache(run, photos, tiny_xmatching, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["search", "a dog", "--photos", photos, "--model", tiny_xmatching, "--device", "cpu"]
    first, again = run(*words), run(*words)
    assert first[0] == again[0] == 0 and first[1] == again[1] and len(first[1].splitlines()) == 4
    assert len(list((tmp_path / "cache" / "imagedex" / "galleries").iterdir())) == 1


@pytest.mark.parametrize(
    "words,says",
    [
        (["search"], "the following arguments are required: PART"),
        (["search", "dog"], "which pictures? Give --gallery or --photos"),
        (["search", "dog", "--gallery", "nowhere", "--model", "TINY"], "holds no picture"),
        (["search", "dog", "--gallery", "nowhere"], "--gallery nowhere: there is no gallery"),  # not: no such model
        (["serve", "--gallery", "G", "--second", "nowhere"], "--second nowhere: there is no gallery"),
        (["index", "nowhere", "--gallery", "new"], "there is no such folder or file"),
        (["search", "dog", "--photos", "nowhere"], "there is no such folder or file"),
        (["search", "dog", "--gallery", "G", "--top_k", "0"], "is no number from 1 on"),
        (["search", "dog", "--gallery", "G", "--photos", "P"], "give one or the other"),
        (["search", "-", "dog", "--gallery", "G"], "not only what is to be taken off"),
        (["search", "dog", "--gallery", "G", "--where", "foldr == 1"], "did you mean folder?"),
        (["search", "image:nothing.jpg", "--gallery", "G"], "there is no such file"),
        (["search", "dog", "--gallery", "G", "--sheet", "x.nonsense"], "cannot be written"),
        (["search", "dog", "--gallery", "G", "--model", "nowhere/at/all"], "not a folder"),
        (["index", "nowhere", "--gallery", "G"], "there is no such folder or file"),
        (["index", "P"], "which pictures? Give --gallery"),
        (["index", "P", "--gallery", "P"], "is not empty and no gallery"),
        (["index", "P", "--gallery", "G", "--vector_type", "float16"], "holds float32 vectors"),
        (["remove", "--gallery", "G"], "which pictures? Give their names, or --where"),
        (["remove", "warm/red.png", "nothing.png", "--gallery", "G"], "holds no picture nothing.png"),
        (["remove", "warm/red.png"], "which pictures? Give --gallery"),
        (["remove", "--where", "foldr == 1", "--gallery", "G"], "did you mean folder?"),
        (["export", "--gallery", "G"], "required: --to"),
        (["serve", "--gallery", "empty", "--model", "TINY"], ""),
        (["serch", "dog"], "did you mean search?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, photos, tiny_xmatching, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    run("index", photos, "--gallery", tmp_path / "G", "--model", tiny_xmatching, "--device", "cpu")
    names = {"TINY": tiny_xmatching, "P": photos, "G": tmp_path / "G"}
    status, out, err = run(*[names.get(word, word) for word in words])
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err


def test_a_search_reads_neither_datasets_nor_a_training(photos, tiny_xmatching, tmp_path):
    """They take longer to import than the answer takes."""
    code = "import sys; from imagedex import cli; cli.main(sys.argv[1:]); "
    code += "print([name for name in ('datasets', 'sklearn', 'gradio') if name in sys.modules], file=sys.stderr)"
    there = ["--gallery", str(tmp_path / "g"), "--device", "cpu"]
    command = [sys.executable, "-c", code]
    subprocess.run(
        [*command, "index", str(photos), *there, "--model", str(tiny_xmatching)], check=True, capture_output=True
    )
    found = subprocess.run([*command, "search", "a dog", *there], capture_output=True, text=True)
    assert found.returncode == 0 and found.stderr.splitlines()[-1] == "[]", found.stderr


def test_python_in_three_lines(photos, tiny_xmatching, tmp_path):
    from imagedex import Gallery

    g = Gallery.open(tmp_path / "g", model=str(tiny_xmatching))
    g.add(photos)
    assert len(g.search("two dogs on a beach", top_k=3)) == 3
    found = []  # a search is safe beside others
    threads = [threading.Thread(target=lambda: found.append(g.search("a dog", top_k=2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([one.image_id for one in answer] == [one.image_id for one in found[0]] for answer in found)


def test_a_search_imports_nothing_that_it_does_not_need(run, photos, tiny_xmatching, tmp_path):
    """Beyond what transformers brings with any model: pandas alone would take as long as the search."""
    run("index", photos, "--gallery", tmp_path / "g", "--device", "cpu", "--model", tiny_xmatching, "--num_workers", 0)
    code = (
        "import sys, torch, transformers.modeling_utils; before = set(sys.modules)\n"
        "from imagedex.cli import answer; answer(sys.argv[1:])\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}), file=sys.stderr)"
    )
    words = ["search", "two dogs", "--gallery", tmp_path / "g", "--device", "cpu"]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr
    imported = set(done.stderr.splitlines()[-1].split())
    assert "imagedex" in imported
    assert not imported & {"pandas", "datasets", "evaluate", "torchvision", "gradio", "sklearn", "scipy", "accelerate"}
