"""NQ10K from a sample in the real schema, against the original's steps done naively on the rows themselves."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from hub_server import HubServer
from natural_questions_sample import make_pages, write_pages
from pyarrow import parquet

from imagedex.corpora import is_text_corpus, load_text_corpus
from imagedex.corpora.documents import natural_questions
from imagedex.corpora.documents.natural_questions import HUB_ID, choose_rows, load_nq10k
from imagedex.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def by_hand(pages, num_train, num_held_out, max_words=512):
    """What DSI-transformers' script would write: texts, trained and held-out (id, question)."""
    random.seed(313)
    order = list(range(len(pages)))
    random.shuffle(order)
    titles, texts, train, held_out = set(), [], [], []
    for row in order:
        page = pages[row]
        if page["document"]["title"] in titles or len(texts) == num_train + num_held_out:
            continue
        titles.add(page["document"]["title"])
        tokens = page["document"]["tokens"]
        words = [word for word, is_html in zip(tokens["token"], tokens["is_html"], strict=True) if not is_html]
        (train if len(texts) < num_train else held_out).append((str(len(texts)), page["question"]["text"]))
        texts.append(" ".join(words[:max_words]))
    return texts, train, held_out


def rows(table):
    return list(zip(table["document_id"], table["question"], strict=True))


@pytest.fixture
def pages():
    return make_pages(50, titles=30)


@pytest.fixture
def folder(tmp_path, pages):
    return write_pages(tmp_path / "nq", pages)


def test_ten_thousand_documents_as_the_original_makes_them(tmp_path):
    pages = make_pages(26_000, titles=11_500, words=4)
    corpus = load_nq10k(write_pages(tmp_path / "nq", pages, row_group=1000))
    texts, train, held_out = by_hand(pages, 8000, 2000)
    assert (len(corpus.documents), len(corpus.train), len(corpus.evaluation)) == (10_000, 8_000, 2_000)
    assert corpus.documents["document_id"][:] == [str(number) for number in range(10_000)]
    assert corpus.documents["text"][:] == texts
    assert rows(corpus.train) == train and rows(corpus.evaluation) == held_out
    assert corpus.form == "NQ10K (seed 313)"


def test_the_train_split_alone_and_words_alone(folder, pages):
    corpus = load_nq10k(folder, num_train=12, num_held_out=5)
    texts, train, held_out = by_hand(pages, 12, 5)
    assert corpus.documents["text"][:] == texts
    assert rows(corpus.train) == train and rows(corpus.evaluation) == held_out
    assert not any("<" in text for text in texts)
    assert not any("validation split" in question for _, question in train + held_out)


def test_of_long_pages_the_first_words_are_kept(tmp_path):
    pages = make_pages(20, titles=15, words=900)
    folder = write_pages(tmp_path / "nq", pages)
    kept = load_nq10k(folder, num_train=8, num_held_out=2).documents["text"][:]
    assert kept == by_hand(pages, 8, 2)[0] and {len(text.split()) for text in kept} == {512}
    whole = load_nq10k(folder, num_train=8, num_held_out=2, max_words=10_000).documents["text"][:]
    assert whole == by_hand(pages, 8, 2, 10_000)[0] and len(whole[0].split()) > 512


def test_fewer_titles_than_asked_for_hold_out_fewer_questions(folder, pages, caplog):
    number = len({page["document"]["title"] for page in pages})
    corpus = load_nq10k(folder, num_train=number - 3, num_held_out=10)
    assert (len(corpus.documents), len(corpus.train), len(corpus.evaluation)) == (number, number - 3, 3)
    assert f"only {number} documents" in caplog.text and "3 of their questions are held out" in caplog.text
    corpus = load_text_corpus(str(folder))
    assert corpus.evaluation is None and len(corpus.documents) == len(corpus.train) == number


def test_order_of_rows():
    titles = ["a", "b", "a", "c", "b", "d"]
    chosen = choose_rows(titles, 6)
    assert sorted(titles[row] for row in chosen) == ["a", "b", "c", "d"]
    assert choose_rows(titles, 2) == chosen[:2]
    state = random.getstate()
    choose_rows(titles, 2)
    assert random.getstate() == state
    assert choose_rows(range(100), 100, seed=1) != choose_rows(range(100), 100, seed=313)


def test_built_once(folder, monkeypatch, own_cache):
    first = load_nq10k(folder, num_train=12, num_held_out=5)
    kept = [path.name for path in (own_cache / "imagedex_nq10k").iterdir() if path.is_dir()]
    assert len(kept) == 1 and "partial" not in kept[0]
    monkeypatch.setattr(natural_questions, "_build", lambda *args, **options: pytest.fail("built again"))
    again = load_nq10k(folder, num_train=12, num_held_out=5)
    assert again.documents[:] == first.documents[:] and rows(again.evaluation) == rows(first.evaluation)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", own_cache)
    assert len(load_nq10k(folder, num_train=12, num_held_out=4).documents) == 16


def test_other_pages_in_the_same_folder_are_read(folder):
    before = load_nq10k(folder, num_train=12, num_held_out=5)
    file = folder / "default" / "train-00000-of-00003.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table.slice(1), file)
    after = load_nq10k(folder, num_train=12, num_held_out=5)
    assert before.documents["text"][:] != after.documents["text"][:]


class Counted(io.FileIO):
    """A file that counts the bytes asked of it."""

    read_bytes = 0

    def read(self, size=-1):
        content = super().read(size)
        Counted.read_bytes += len(content)
        return content


def test_of_the_nested_columns_only_what_is_needed_is_read(tmp_path, monkeypatch):
    folder = write_pages(tmp_path / "nq", make_pages(60, titles=40, html_bytes=120_000), row_group=20)
    stored = sum(path.stat().st_size for path in folder.glob("default/train-*"))
    monkeypatch.setattr(Counted, "read_bytes", 0)
    monkeypatch.setattr(natural_questions, "_open", Counted)
    corpus = load_nq10k(folder, num_train=12, num_held_out=5)
    assert len(corpus.documents) == 17
    assert 0 < Counted.read_bytes < stored / 10


def test_an_interrupted_build_goes_on_where_it_stopped(folder, pages, monkeypatch):
    opened, real = [], natural_questions._open

    def broken(file):
        opened.append(Path(file).name)
        if len(opened) == 5:
            raise ConnectionResetError("the line is down")
        return real(file)

    monkeypatch.setattr(natural_questions, "_open", broken)
    with pytest.raises(
        UserError, match=r"stopped at file 2 of 3, .*: ConnectionResetError: the line is down; .* goes on"
    ):
        load_nq10k(folder, num_train=12, num_held_out=5)
    names = [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert opened == [*names, *names[:2]]
    opened.clear()
    corpus = load_nq10k(folder, num_train=12, num_held_out=5)
    assert opened == names[1:]  # titles of all and texts of the first are there
    assert corpus.documents["text"][:] == by_hand(pages, 12, 5)[0]


def test_recognised_in_folders(folder, tmp_path):
    assert is_text_corpus("nq10k") and is_text_corpus(HUB_ID) and is_text_corpus(str(folder))
    other = tmp_path / "other"
    other.mkdir()
    Dataset.from_dict({"document": ["a"], "question": ["b"]}).to_parquet(str(other / "train.parquet"))
    assert not is_text_corpus(str(other))
    (other / "train.parquet").write_bytes(b"no parquet")
    assert not is_text_corpus(str(other))


def test_another_schema_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"title": ["a"], "question": ["b"]}).to_parquet(str(tmp_path / "data" / "train.parquet"))
    with pytest.raises(UserError, match=r"no document.title, question.text, .*its columns are title, question"):
        load_nq10k(tmp_path)
    (tmp_path / "data" / "train.parquet").unlink()
    (tmp_path / "data" / "train.csv").write_text("title,question\na,b\n")
    with pytest.raises(UserError, match="no train split in parquet files"):
        load_nq10k(tmp_path)


def test_pseudo_queries_for_every_document(folder, tmp_path, pages):
    file = tmp_path / "queries.jsonl"
    number = len({page["document"]["title"] for page in pages})
    queries = [(str(document), f"pseudo {document}") for document in range(number)]
    lines = [{"document_id": document, "question": question} for document, question in queries]
    file.write_text("\n".join(map(json.dumps, lines)))
    corpus = load_text_corpus(str(folder), pseudo_queries_file=file)
    assert rows(corpus.train)[number:] == queries and corpus.num_pseudo_queries == number
    file.write_text(json.dumps({"document_id": number, "question": "of nothing"}))
    with pytest.raises(UserError, match=f"1 document that the corpus does not have: {number};"):
        load_text_corpus(str(folder), pseudo_queries_file=file)


def test_brings_its_own_split(folder):
    with pytest.raises(UserError, match="--held_out_images: this corpus brings its own"):
        load_text_corpus(str(folder), held_out_images=0.5)


PROGRAM = """
import json
from imagedex.corpora.documents.natural_questions import load_nq10k
from imagedex.errors import UserError
try:
    corpus = load_nq10k(num_train=12, num_held_out=5)
    print(json.dumps([corpus.documents["text"][:], corpus.train["question"][:], corpus.evaluation["question"][:]]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def in_a_process(environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_streamed_from_the_hub(tmp_path):
    pages = make_pages(50, titles=30, html_bytes=20_000)
    folder = write_pages(tmp_path / "nq", pages)
    texts, train, held_out = by_hand(pages, 12, 5)
    expected = [texts, [question for _, question in train], [question for _, question in held_out]]
    with HubServer() as hub:
        hub.add(HUB_ID, folder, "dataset")
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        environment["HF_DATASETS_CACHE"] = str(tmp_path / "home" / "datasets")
        assert in_a_process(environment) == expected
        assert not any("validation" in path for method, path in hub.requests if "/resolve/" in path and method == "GET")
    stored = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [path for path in stored if path.suffix == ".parquet"]
    assert (
        sum(path.stat().st_size for path in stored) < 100_000 < sum(p.stat().st_size for p in folder.rglob("*.parquet"))
    )
    # once it is built, the Hub is not needed
    assert in_a_process(environment | {"HF_HUB_OFFLINE": "1"}) == expected
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "empty")}
    assert "google-research-datasets/natural_questions cannot be read" in in_a_process(offline)
    assert "HF_HUB_OFFLINE is set" in in_a_process(offline)
