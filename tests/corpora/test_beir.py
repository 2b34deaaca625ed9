"""BEIR's folders, against a join by hand."""

import json

import pytest

from imagedex.corpora import is_text_corpus, load_text_corpus
from imagedex.errors import UserError

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "sleep"},
    {"_id": "d2", "title": "", "text": "dogs"},
    {"_id": "d3", "text": ""},
]
QUERIES = [{"_id": f"q{n}", "text": f"question {n}"} for n in range(1, 6)]
HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.fixture
def beir(tmp_path):
    def make(**qrels):
        for name, rows in (("corpus", CORPUS), ("queries", QUERIES)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "qrels").mkdir(exist_ok=True)
        for split, text in qrels.items():
            (tmp_path / "qrels" / f"{split}.tsv").write_text(HEADER + text)
        return str(tmp_path)

    return make


def pairs(table):
    return list(zip(table["document_id"], table["question"], strict=True))


def test_a_question_goes_with_each_right_document(beir, caplog):
    folder = beir(train="q1\td1\t1\nq2\td2\t2\nq2\td1\t1\nq3\td1\t0\n", dev="q3\td2\t1\n", test="q4\td3\t1\n")
    assert is_text_corpus(folder)
    with caplog.at_level("INFO"):
        corpus = load_text_corpus(folder)
    assert corpus.form == "BEIR folder"
    assert corpus.documents["text"][:] == ["Cats sleep", "dogs", ""] and corpus.documents["document_id"][:] == [
        "d1",
        "d2",
        "d3",
    ]
    assert pairs(corpus.train) == [("d1", "question 1"), ("d2", "question 2"), ("d1", "question 2")]
    assert pairs(corpus.evaluation) == [("d2", "question 3")]
    for said in (
        "1 question with several right documents: trained for each, asked once",
        "1 row of score 0",
        "1 question without a right document",
    ):
        assert said in caplog.text
    assert pairs(load_text_corpus(folder, eval_split="test").evaluation) == [("d3", "question 4")]


def test_a_question_is_asked_once_with_all_its_right_documents(beir):
    corpus = load_text_corpus(beir(train="q1\td1\t1\n", dev="q2\td2\t1\nq3\td1\t1\nq2\td3\t1\n"))
    rows = corpus.evaluation
    assert pairs(rows) == [("d2", "question 2"), ("d1", "question 3")] and rows["also_right"][:] == [["d3"], []]


def test_a_question_that_is_held_out_is_trained_for_none_of_its_documents(beir):
    folder = beir(train="".join(f"q{query}\td{document}\t1\n" for query in range(1, 6) for document in (1, 2)))
    corpus = load_text_corpus(folder, held_out_captions_per_image=1)
    asked, trained = set(corpus.evaluation["question"]), set(corpus.train["question"])
    assert asked and trained and not asked & trained and len(asked | trained) == 5
    assert set(zip(corpus.evaluation["document_id"], map(tuple, corpus.evaluation["also_right"]), strict=True)) == {
        ("d1", ("d2",))
    }
    assert sorted(pairs(corpus.train)) == sorted((d, q) for q in trained for d in ("d1", "d2"))


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ({}, "has no qrels/train.tsv"),
        ({"train": "q9\td1\t1\n"}, "1 query id not in queries.jsonl: q9"),
        ({"train": "q1\td9\t1\n"}, "questions of 1 document that the corpus does not have: d9"),
        ({"train": "q1\td1\tyes\n"}, "row 1: the score 'yes' is no number"),
        ({"train": "q1\td1\n"}, "line 2: 3 fields expected"),
    ],
)
def test_what_is_refused(beir, qrels, message):
    with pytest.raises(UserError, match=message):
        load_text_corpus(beir(**qrels))


def test_trec_columns_are_refused(beir, tmp_path):
    folder = beir()
    (tmp_path / "qrels" / "test.tsv").write_text("q1\t0\td1\t1\n")
    with pytest.raises(UserError, match="query-id, corpus-id, score are expected"):
        load_text_corpus(folder)
