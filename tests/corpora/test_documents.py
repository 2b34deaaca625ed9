"""Documents and questions in JSONL and in the files of DSI-transformers: what is read, how it is split, what is refused."""

import json

import pytest
from datasets import Features, Value

from imagedex.corpora import is_text_corpus, load_text_corpus
from imagedex.corpora.splits import hash_fraction
from imagedex.errors import UserError

DOCUMENTS = [{"document_id": f"d{n}", "text": f"a page about thing {n}"} for n in range(8)]
QUESTIONS = [{"document_id": f"d{n % 8}", "question": f"what is {n}"} for n in range(24)]


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Makes a corpus: folder(documents=[...], train=[...], ...) -> its path as text."""

    def make(**files):
        for name, rows in files.items():
            write(tmp_path / "corpus" / f"{name}.jsonl", rows)
        return str(tmp_path / "corpus")

    return make


def rows(table):
    return list(zip(table["document_id"], table["question"], strict=True))


def pairs(questions):
    return [(row["document_id"], row["question"]) for row in questions]


def test_train_and_validation_files(folder):
    name = folder(documents=DOCUMENTS, train=QUESTIONS[:10], validation=QUESTIONS[10:])
    assert is_text_corpus(name)
    corpus = load_text_corpus(name)
    assert corpus.documents.features == Features({"document_id": Value("string"), "text": Value("string")})
    assert corpus.documents.to_list() == DOCUMENTS
    assert corpus.train.to_list() == QUESTIONS[:10] and corpus.evaluation.to_list() == QUESTIONS[10:]
    assert corpus.form == "JSONL documents and questions" and corpus.num_pseudo_queries == 0


def test_questions_alone_are_trained(folder):
    corpus = load_text_corpus(folder(documents=DOCUMENTS, questions=QUESTIONS))
    assert corpus.train.to_list() == QUESTIONS and corpus.evaluation is None


def test_test_split_on_request(folder):
    name = folder(documents=DOCUMENTS, train=QUESTIONS[:4], validation=QUESTIONS[4:6], test=QUESTIONS[6:9])
    assert load_text_corpus(name).evaluation.to_list() == QUESTIONS[4:6]
    assert load_text_corpus(name, eval_split="test").evaluation.to_list() == QUESTIONS[6:9]


def test_names_of_other_tools_and_titles(folder):
    documents = [
        {"_id": 7, "title": "Owls", "text": "Owls are birds."},
        {"_id": 12, "title": "Cats", "text": "They purr."},
        {"_id": 9, "title": None, "text": "No title."},
    ]
    questions = [{"id": "q1", "doc_id": 12, "query": "who purrs"}, {"id": "q2", "doc_id": 7, "query": "who hoots"}]
    corpus = load_text_corpus(folder(documents=documents, questions=questions))
    assert corpus.documents["document_id"][:] == ["7", "12", "9"]
    assert corpus.documents["text"][:] == ["Owls are birds.", "Cats They purr.", "No title."]
    assert rows(corpus.train) == [("12", "who purrs"), ("7", "who hoots")]


def test_a_share_of_the_documents_held_out(folder):
    name = folder(documents=DOCUMENTS, questions=QUESTIONS)
    corpus = load_text_corpus(name, held_out_images=0.4, split_seed=3)
    out = {row["document_id"] for row in DOCUMENTS if hash_fraction(3, row["document_id"]) < 0.4}
    assert 0 < len(out) < 8
    assert rows(corpus.evaluation) == [pair for pair in pairs(QUESTIONS) if pair[0] in out]
    assert rows(corpus.train) == [pair for pair in pairs(QUESTIONS) if pair[0] not in out]
    assert len(corpus.documents) == 8  # all of them indexed


def test_questions_of_each_document_held_out(folder):
    lonely = {"document_id": "d8", "text": "a page with one question"}
    name = folder(documents=[*DOCUMENTS, lonely], questions=[*QUESTIONS, {"document_id": "d8", "question": "mine"}])
    corpus = load_text_corpus(name, held_out_captions_per_image=1)
    asked, trained = rows(corpus.evaluation), rows(corpus.train)
    assert sorted(document for document, _ in asked) == [f"d{n}" for n in range(8)]
    assert sorted(asked + trained) == sorted([*pairs(QUESTIONS), ("d8", "mine")])
    other = load_text_corpus(name, held_out_captions_per_image=1, split_seed=1)
    assert rows(other.evaluation) != asked


def test_pseudo_queries_are_trained_last(folder, tmp_path, caplog):
    pseudo = [{"document_id": f"d{n}", "question": f"pseudo {n}"} for n in range(8)]
    name = folder(
        documents=DOCUMENTS, train=QUESTIONS[:6], validation=QUESTIONS[6:8], pseudo_queries=[*pseudo, QUESTIONS[7]]
    )
    corpus = load_text_corpus(name)
    assert corpus.train.to_list() == [*QUESTIONS[:6], *pseudo, QUESTIONS[7]] and corpus.num_pseudo_queries == 9
    assert "1 held-out question also trained, word for word, as a pseudo-query" in caplog.text
    write(tmp_path / "mine.jsonl", [{"text_id": "d3", "text": "question: from another model"}])
    corpus = load_text_corpus(name, pseudo_queries_file=tmp_path / "mine.jsonl")
    assert rows(corpus.train)[6:] == [("d3", "from another model")]


def test_documents_and_pseudo_queries_without_training_questions(folder):
    corpus = load_text_corpus(folder(documents=DOCUMENTS, validation=QUESTIONS))
    assert len(corpus.train) == 0 and corpus.train.column_names == ["document_id", "question"]
    corpus = load_text_corpus(folder(documents=DOCUMENTS, pseudo_queries=QUESTIONS))
    assert corpus.train.to_list() == QUESTIONS


def test_files_of_dsi_transformers(tmp_path):
    lines = []
    for n in range(5):
        lines.append({"text_id": str(n), "text": f"document: page {n}"})
        lines += [{"text_id": str(n), "text": f"question: what {n}"}] if n < 4 else []
    for file, part in (("multi_task_train", lines), ("valid", [{"text_id": "4", "text": "question: what 4"}])):
        (tmp_path / f"NQ_10k_{file}.json").write_text("\n".join(map(json.dumps, part)))
    assert is_text_corpus(str(tmp_path))
    corpus = load_text_corpus(str(tmp_path))
    assert corpus.form == "DSI-transformers NQ_10k_multi_task_train.json"
    assert corpus.documents["document_id"][:] == list("01234")
    assert corpus.documents["text"][:] == [f"page {n}" for n in range(5)]
    assert rows(corpus.train) == [(str(n), f"what {n}") for n in range(4)]
    assert rows(corpus.evaluation) == [("4", "what 4")]
    (tmp_path / "NQ_10k_valid.json").write_text(json.dumps({"text_id": "4", "text": "document: what"}))
    with pytest.raises(UserError, match="line 1: the text starts with 'document: what' instead of 'question: '"):
        load_text_corpus(str(tmp_path))


def test_tables_are_written_once(folder, own_cache):
    name = folder(documents=DOCUMENTS, questions=QUESTIONS)
    first, second = load_text_corpus(name).documents, load_text_corpus(name).documents
    assert first._fingerprint == second._fingerprint
    assert first.cache_files == second.cache_files and str(own_cache) in first.cache_files[0]["filename"]
    mapped = [table.map(lambda row: {"length": len(row["text"])}) for table in (first, second)]
    assert mapped[0].cache_files == mapped[1].cache_files


def test_what_is_no_text_corpus(tmp_path, flickr_folder):
    assert not any(map(is_text_corpus, (None, "", "shape_scenes", "owner/name", str(tmp_path), str(flickr_folder))))


ONE = [{"document_id": "a", "text": "page"}]
ASKED = [{"document_id": "a", "question": "which"}]
MISTAKES = {
    "two of one id": (
        {"documents": [*ONE, *ONE], "train": ASKED},
        {},
        "1 document id used more than once: a",
    ),
    "empty text": (
        {"documents": [*ONE, {"document_id": "b", "text": " "}, {"document_id": "c"}], "train": ASKED},
        {},
        "2 documents without text: b, c",
    ),
    "unknown document": (
        {"documents": ONE, "train": ASKED, "test": [{"document_id": "x", "question": "?"}] * 2},
        {},
        "test: questions of 1 document that the corpus does not have: x",
    ),
    "empty question": (
        {"documents": ONE, "train": [*ASKED, {"document_id": "a", "question": ""}]},
        {},
        "1 question without text, of document a",
    ),
    "no questions": ({"documents": ONE}, {}, "documents but no questions: put train.jsonl or questions.jsonl"),
    "two files of training questions": (
        {"documents": ONE, "train": ASKED, "questions": ASKED},
        {},
        "train.jsonl, questions.jsonl, which mean the same",
    ),
    "no id column": (
        {"documents": [{"name": "a", "text": "page"}], "train": ASKED},
        {},
        "no column with the document id; its columns are name, text; known are document_id",
    ),
    "no question column": (
        {"documents": ONE, "train": [{"document_id": "a", "asked": "which"}]},
        {},
        "no column with the question; its columns are document_id, asked",
    ),
    "an id that is a number with a point": (
        {"documents": [*ONE, {"document_id": 1.5, "text": "page"}], "train": ASKED},
        {},
        "documents.jsonl, line 2: document_id is 1.5",
    ),
    "text that is a list": (
        {"documents": [{"document_id": "a", "text": ["page"]}], "train": ASKED},
        {},
        r"line 1: text is no text but \['page'\]",
    ),
    "own split and held out": (
        {"documents": ONE, "train": ASKED, "validation": ASKED},
        {"held_out_captions_per_image": 1},
        "--held_out_captions_per_image: this corpus brings its own questions",
    ),
    "nothing to hold out": (
        {"documents": ONE, "train": ASKED},
        {"held_out_captions_per_image": 1},
        "no document has two questions or more",
    ),
    "everything held out": (
        {"documents": ONE, "train": ASKED},
        {"held_out_images": 0.999999},
        "--held_out_images 0.999999 holds out the questions of 1 of 1 document;",
    ),
    "a split that is not there": ({"documents": ONE, "train": ASKED}, {"eval_split": "test"}, "has none besides train"),
    "no such file of pseudo-queries": (
        {"documents": ONE, "train": ASKED},
        {"pseudo_queries_file": "nowhere.jsonl"},
        "--pseudo_queries_file: there is no file nowhere.jsonl",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_clear_line(folder, mistake):
    files, options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as caught:
        load_text_corpus(folder(**files), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"document_id": "a", "text": "page"}\n\n{"document_id":', "line 3: no valid JSON"),
        (b'["a", "page"]', "line 1: a JSON object is expected"),
        (b'{"document_id": "a", "text": "p\xe4ge"}', "not UTF-8"),
        (b"\n", "holds no row"),
    ],
)
def test_malformed_lines(folder, tmp_path, content, message):
    name = folder(train=ASKED)
    (tmp_path / "corpus" / "documents.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text_corpus(name)


def test_a_name_that_is_no_text_corpus(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_text_corpus(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(UserError, match="put documents.jsonl and train.jsonl in it, or use nq10k"):
        load_text_corpus(str(tmp_path))


def test_repeated_pages_are_told(folder, caplog):
    load_text_corpus(folder(documents=[*ONE, {"document_id": "b", "text": "page"}], train=ASKED, validation=ASKED))
    assert "1 document with the text of another one" in caplog.text
    assert "1 held-out question also trained, word for word, as a question" in caplog.text
