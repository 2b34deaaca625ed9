"""Searches that are stopped at any write, or find the disk full: nothing is broken, and the same command ends as it should."""

import csv
import errno
import fcntl
import json
import os
import shutil

import pytest

import run_retrieval
from imagedex import files
from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images
from imagedex.errors import UserError
from imagedex.evaluation.rankings import Ranking, read_rankings
from imagedex.retrieval import unfinished
from imagedex.retrieval.gallery import read_gallery
from imagedex.retrieval.generative import GenerativeRetriever
from imagedex.retrieval.retriever import Retriever, VectorRetriever
from imagedex.retrieval.unfinished import Unfinished

SENTENCES = ["a red dog", "the blue half is on the left side", "yellow", "dog runs in the grass", "a green side of"]


@pytest.fixture(autouse=True)
def two_at_once(monkeypatch):
    for retriever in (Retriever, GenerativeRetriever):
        monkeypatch.setattr(retriever, "queries_at_once", 2)


@pytest.fixture(scope="module")
def searches(tiny_xmatching, tiny_clip, save_generative, gallery_ids, picture_folder, tmp_path_factory):
    """name -> the flags of a search; each kind of model, each form of rankings."""
    folder = tmp_path_factory.mktemp("searches")
    encoder = load_dual_encoder(str(tiny_xmatching))
    vectors = encode_images(encoder.model, encoder.image_processor, read_gallery(str(picture_folder)))
    t5 = save_generative(folder / "t5", "t5", "naive", gallery_ids)
    codebook = save_generative(folder / "codebook", "codebook_t5", "rq", gallery_ids, vectors, "xmatching")
    grounded = save_generative(folder / "grounded", "vision_grounded_t5", "naive", gallery_ids)
    for extension, images in (("csv", [gallery_ids[row] for row in (0, 4, 20, 22, 17)]), ("txt", None)):
        with open(folder / f"queries.{extension}", "w", newline="") as file:
            rows = [[sentence] for sentence in SENTENCES] if images is None else zip(SENTENCES, images, strict=True)
            csv.writer(file).writerows([*([["caption", "image"]] if images else []), *rows])
    asked, gallery = ["--queries", folder / "queries.csv"], ["--image_dir", picture_folder, "--top_k", 4]
    plain = ["--queries", folder / "queries.txt"]
    return {
        "xmatching": ["--model_name_or_path", tiny_xmatching, *asked, *gallery],
        "clip, parquet": ["--model_name_or_path", tiny_clip, *plain, *gallery, "--output_format", "parquet"],
        "codebook_t5, tsv": ["--model_name_or_path", codebook, *asked, *gallery, "--output_format", "tsv"],
        "vision_grounded_t5": ["--model_name_or_path", grounded, *plain, *gallery],
        "t5, parquet": ["--model_name_or_path", t5, *asked, *gallery, "--output_format", "parquet"],
        "reranked": ["--model_name_or_path", codebook, *asked, *gallery, "--rerank_with", tiny_xmatching],
        "two models": ["--model_name_or_path", tiny_xmatching, t5, *asked, *gallery],
    }


def search(flags, output_dir, *more):
    command = [*flags, "--output_dir", output_dir, "--device", "cpu", "--contact_sheet_queries", 2, *more]
    run_retrieval.main([str(part) for part in command])


TIMES = ("ms_per_query",)


def content_of(folder):
    """Every file of an output folder, with what it says; times are put aside."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name in ("metrics.json", "comparison.json"):
            content = json.loads(content)
            for row in (content, *content.get("models", {}).values()):
                for name in TIMES:
                    row.pop(name, None)
        found[path.relative_to(folder).as_posix()] = content
    return found


class Disk:
    """`os` with a disk that fails at the n-th write: before a file is renamed, or when half of a block is appended."""

    def __init__(self, fails_at, error):
        self.left, self.error = fails_at, error

    def __getattr__(self, name):
        return getattr(os, name)

    def _write(self):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def replace(self, source, target):
        self._write()
        os.replace(source, target)

    def fsync(self, handle):
        try:
            self._write()
        except BaseException:
            os.truncate(handle, max(0, os.fstat(handle).st_size - 3))
            raise
        os.fsync(handle)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def undisturbed(searches, tmp_path_factory):
    """undisturbed(name): the content of the folder of a search that nothing stopped."""
    kept = {}

    def run(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("undisturbed") / "out"
            search(searches[name], folder)
            kept[name] = content_of(folder)
        return kept[name]

    return run


ALL = ["xmatching", "clip, parquet", "codebook_t5, tsv", "vision_grounded_t5", "t5, parquet", "reranked", "two models"]


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(name, searches, undisturbed, tmp_path, monkeypatch):
    """Each run of a chain has room for one more write than the one before."""
    expected, out, failures = undisturbed(name), tmp_path / "out", 0
    while True:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for module in (files, unfinished):
            monkeypatch.setattr(module, "os", Disk(2 + failures, error))
        try:
            search(searches[name], out)
            break
        except UserError as said:
            assert "No space left on device" in str(said) and "\n" not in str(said)
            failures += 1
        assert failures < 40, "it does not get on"
    assert failures >= 2 and content_of(out) == expected


@pytest.mark.parametrize("name", ["xmatching", "codebook_t5, tsv", "t5, parquet", "two models"])
def test_a_search_stopped_at_any_write_ends_as_if_it_had_not_been(name, searches, undisturbed, tmp_path, monkeypatch):
    expected, stops = undisturbed(name), 0
    for write in range(0, 60, 3):
        out = tmp_path / str(write)
        for module in (files, unfinished):
            monkeypatch.setattr(module, "os", Disk(write, Killed()))
        try:
            search(searches[name], out)
        except Killed:
            stops += 1
        monkeypatch.setattr(files, "os", os)
        monkeypatch.setattr(unfinished, "os", os)
        search(searches[name], out)
        assert content_of(out) == expected, write
        if stops <= write // 3:
            break
    assert stops >= 3


def test_what_was_answered_is_not_asked_again(searches, undisturbed, tmp_path, monkeypatch):
    asked, honest = [], VectorRetriever.search

    def counts(self, queries, *arguments):
        asked.append(len(queries))
        if len(asked) == 3:
            raise Killed
        return honest(self, queries, *arguments)

    monkeypatch.setattr(VectorRetriever, "search", counts)
    with pytest.raises(Killed):
        search(searches["xmatching"], tmp_path / "out")
    assert read_rankings(tmp_path / "out/unfinished/rankings.jsonl")[3].query == SENTENCES[3]
    search(searches["xmatching"], tmp_path / "out")
    assert asked == [2, 2, 1, 1] and content_of(tmp_path / "out") == undisturbed("xmatching")


def test_two_models_of_which_one_had_answered(searches, undisturbed, tmp_path, monkeypatch):
    asked, honest = [], VectorRetriever.search
    monkeypatch.setattr(VectorRetriever, "search", lambda self, *rest: asked.append(1) or honest(self, *rest))
    with monkeypatch.context() as patch:
        patch.setattr(GenerativeRetriever, "search", lambda self, *rest: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            search(searches["two models"], tmp_path / "out")
    assert len(asked) == 3
    search(searches["two models"], tmp_path / "out")
    assert len(asked) == 3 and content_of(tmp_path / "out") == undisturbed("two models")


@pytest.mark.parametrize("change", ["queries", "model", "gallery"])
def test_answers_to_another_question_are_not_gone_on_with(
    change, tiny_clip, picture_folder, tmp_path, monkeypatch, capsys
):
    """Each is changed under its name between the stop and the continuation."""
    model, gallery, queries = tmp_path / "model", tmp_path / "pictures", tmp_path / "q.txt"
    shutil.copytree(tiny_clip, model)
    shutil.copytree(picture_folder, gallery)
    queries.write_text("\n".join(SENTENCES))
    flags = ["--model_name_or_path", model, "--image_dir", gallery, "--queries", queries, "--top_k", 3]
    out, honest, asked = tmp_path / "out", VectorRetriever.search, []

    def dies(self, *arguments):
        asked.append(arguments)
        if len(asked) == 3:
            raise Killed
        return honest(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(VectorRetriever, "search", dies)
        with pytest.raises(Killed):
            search(flags, out)
    assert json.loads((out / "unfinished/progress.json").read_text())["done"] == 4
    if change == "queries":
        queries.write_text("\n".join(reversed(SENTENCES)))
    elif change == "model":
        config = json.loads((model / "tokenizer.json").read_text())
        config["normalizer"] = None
        (model / "tokenizer.json").write_text(json.dumps(config))
    else:
        (gallery / "picture 0.png").unlink()
    capsys.readouterr()
    search(flags, out)
    assert "begun anew" in capsys.readouterr().err
    search(flags, tmp_path / "fresh")
    rankings = [tmp_path / name / "rankings.jsonl" for name in ("out", "fresh")]
    assert rankings[0].read_bytes() == rankings[1].read_bytes()


def test_two_runs_in_one_folder_and_a_folder_that_is_deleted(searches, tmp_path, monkeypatch):
    out = tmp_path / "out"
    search(searches["xmatching"], out)
    before = content_of(out)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process at work there
    with pytest.raises(UserError, match="another run is at work there"):
        search(searches["xmatching"], out)
    os.close(handle)
    assert content_of(out) == before

    honest = VectorRetriever.search

    def deletes(self, *arguments):
        shutil.rmtree(out, ignore_errors=True)
        return honest(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(VectorRetriever, "search", deletes)
        with pytest.raises(UserError, match="is gone: it was deleted or moved"):
            search(searches["xmatching"], out)
    search(searches["xmatching"], out)
    assert content_of(out) == before


def answers(first, last):
    return [Ranking(f"q{n}", ["a.jpg", f"{n}.jpg"], [0.5, -n], f"{n}.jpg", n + 1) for n in range(first, last)]


@pytest.mark.parametrize("torn", [b"", b'{"query": "ha', b"x\n" * 100])
def test_torn_ends_are_cut_back(tmp_path, torn):
    found = Unfinished(tmp_path, "jsonl", "f", {1, 4})
    for first, last in ((0, 3), (3, 5)):
        found.append(answers(first, last), 0.5)
    for name in ("rankings.jsonl", "judged.jsonl"):
        with open(tmp_path / "unfinished" / name, "ab") as file:
            file.write(torn)
    again = Unfinished(tmp_path, "jsonl", "f", {1, 4})
    assert again.done == 5 and again.seconds == 1.0
    again.append(answers(5, 6), 0)
    assert [ranking.rank for ranking in again.judged()] == [1, 2, 3, 4, 5, 6]
    shown = [ranking for ranking in again.judged() if ranking.query]
    assert [ranking.query for ranking in shown] == ["q1", "q4"] and shown[1].images == ["a.jpg", "4.jpg"]
    assert [ranking.query for ranking in read_rankings(again.finish())] == [f"q{n}" for n in range(6)]
    again.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["rankings.jsonl"]


def test_files_that_are_shorter_than_they_should_be_are_begun_anew(tmp_path, caplog):
    found = Unfinished(tmp_path, "tsv", "f")
    found.append(answers(0, 3), 0)
    os.truncate(tmp_path / "unfinished" / "rankings.tsv", 5)
    assert Unfinished(tmp_path, "tsv", "f").done == 0
    (tmp_path / "unfinished" / "progress.json").write_text('{"fingerprint": "f", "reach": 3')
    assert Unfinished(tmp_path, "tsv", "f").done == 0 and "progress.json is damaged" in caplog.text


def test_memory_does_not_hold_the_queries(tmp_path):
    """A block is gone when the next is asked for."""
    from imagedex.retrieval.queries import open_queries

    (tmp_path / "q.txt").write_text("".join(f"sentence {n}\n" for n in range(1000)))
    queries = open_queries(tmp_path / "q.txt")
    assert len(queries) == 1000 and next(queries.blocks(7, 990)).sentences[0] == "sentence 990"
    assert [len(block) for block in queries.blocks(300)] == [300, 300, 300, 100]
    assert sum(1 for _ in queries) == 1000


@pytest.mark.parametrize("name", ["reranked", "two models"])
def test_what_a_killed_search_was_writing_is_cleared_by_the_next(name, searches, undisturbed, tmp_path, monkeypatch):
    """Each write is the last in its turn, and nobody clears up after it."""
    left = []
    for write in range(0, 60, 4):
        out = tmp_path / str(write)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Disk(write, Killed()))
            patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
            try:
                search(searches[name], out)
                break
            except Killed:
                left += out.rglob("*.tmp")
        mine = {".notes.tmp": b"mine"} if (out / "retrieval_arguments.json").exists() else {}
        for path, content in mine.items():
            (out / path).write_bytes(content)
        search(searches[name], out)
        assert content_of(out) == undisturbed(name) | mine, write
    assert len({path.parent.name for path in left}) >= 3  # in the output folder, an index, the unfinished rankings
