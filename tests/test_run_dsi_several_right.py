"""A question with several right documents, from BEIR's folder to figures: each pair is trained, each question judged once."""

import json
import math
from pathlib import Path

import pytest

import run_dsi
import run_retrieval

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
ANIMALS = ["otter", "heron", "badger", "lynx", "salmon", "falcon"]


COMMON = [
    "--do_train", "--do_eval", "--use_cpu", "--per_device_train_batch_size", 12, "--learning_rate", "3e-3",
    "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no",
]  # fmt: skip


def run(script, arguments, *more):
    script.main(list(map(str, [*arguments, *more])))


def test_a_question_with_several_right_documents_is_judged_once_by_the_best(tmp_path, monkeypatch, capfd):
    """BEIR's form. The figures are counted by hand from the rankings, and a search of the same questions gives them again."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = [(f"d{i}", f"The {name} lives by the water.") for i, name in enumerate(ANIMALS)]
    trained = [(f"q{i}", f"where lives the {name}", [f"d{i}"]) for i, name in enumerate(ANIMALS)]
    trained.append(("both", "what swims", ["d0", "d4"]))
    asked = [
        ("q7", f"who saw the {ANIMALS[0]}", ["d1", "d0", "d2"]),
        ("q8", "who flies", ["d1", "d5"]),
        ("q9", "who hunts", ["d3"]),
    ]
    for name, rows in (("corpus", texts), ("queries", [row[:2] for row in trained + asked])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in rows))
    for name, rows in (("train", trained), ("test", asked)):
        lines = [f"{query}\t{document}\t1\n" for query, _, right in rows for document in right]
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    arguments = [
        "--model_type",
        "t5",
        "--dataset_name",
        folder,
        "--t5_config",
        json.dumps(T5),
        "--output_dir",
        "out",
        *COMMON,
    ]
    # 6 documents, 6 questions and one more for each of its two documents: 14 rows, two batches an epoch
    run(
        run_dsi, arguments, "--num_train_epochs", 3, "--do_predict", "--compare_with_baselines", "--max_text_length", 32
    )
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 6
    results, out = json.loads(Path("out/eval_results.json").read_text()), tmp_path / "out"
    assert results["eval_queries"] == 3 and "3 held-out questions, a gallery of 6 documents" in capfd.readouterr().out

    found = [json.loads(line) for line in (out / "rankings.jsonl").read_text().splitlines()]
    assert [row["query"] for row in found] == [question for _, question, _ in asked]
    places = [
        next((1 + place for place, name in enumerate(row["images"]) if name in right), math.inf)
        for row, (_, _, right) in zip(found, asked, strict=True)
    ]
    for k in (1, 5):
        assert results[f"eval_hits@{k}"] == pytest.approx(sum(place <= k for place in places) / 3)
    assert results["eval_mrr"] == pytest.approx(sum(1 / place for place in places) / 3)
    # BM25: only the first question has a word of its own, the otter's; of the others' words no document has one
    by_words = json.loads((out / "baselines.json").read_text())["BM25"]
    assert by_words["mrr"] == pytest.approx((1 + 1 / 5 + 1 / 6) / 3)

    beams = ["--num_beams", 10, "--contact_sheet_queries", 0, "--output_dir", "searched"]
    run(
        run_retrieval,
        ["--model_name_or_path", out, "--dataset_name", folder, "--queries", out / "eval_queries.csv"],
        *beams,
    )
    again = json.loads((tmp_path / "searched" / "metrics.json").read_text())
    for name in ("hits@1", "hits@5", "mrr"):
        assert again[name] == pytest.approx(results[f"eval_{name}"])
