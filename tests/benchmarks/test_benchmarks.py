"""The benchmark's own arithmetic, and that the page says what the results say."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from weights_by_hand import weights_by_hand

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RESULTS = sorted((FOLDER / "results").glob("gradient_cache_memory-*.csv"))


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_benchmark_is_on_the_page_with_its_command():
    scripts = [path.name for path in FOLDER.glob("*.py")]
    assert scripts and [name for name in scripts if f"python benchmarks/{name}" not in PAGE] == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_says_what_the_results_say(path):
    rows = rows_of(path)
    assert f"(results/{path.name})" in PAGE
    assert {row["hardware"] for row in rows} == {path.stem.split("-", 1)[1]}
    for row in rows:
        name = "plain" if row["step"] == "plain" else f"gradient cache, chunks of {row['chunk_size']}"
        assert f"| {name} | {int(row['batch_size']):,} | {float(row['peak_gib']):.2f} |" in PAGE


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("million_queries-*.csv")), ids=lambda path: path.stem)
def test_the_page_says_what_a_million_queries_take(path):
    assert f"(results/{path.name})" in PAGE
    for row in rows_of(path):
        memory = " | ".join(row[f"{when}_mib"] for when in ("start", "middle", "end"))
        same = {"True": "yes", "False": "no"}[row["same_bytes"]]
        counts = f"{int(row['queries']):,} | {memory} | {row['kills']} | {int(row['lines']):,}"
        assert f"| {row['format']} | {counts} | {same} |" in PAGE


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("maria_job-*.csv")), ids=lambda path: path.stem)
def test_the_page_says_what_marias_job_takes(path):
    assert f"(results/{path.name})" in PAGE
    for row in rows_of(path):
        memory = " | ".join(row[f"{when}_mib"] for when in ("start", "middle", "end"))
        same = {"True": "yes", "False": "no"}[row["same_bytes"]]
        counts = (
            f"{int(row['queries']):,} | {int(row['pictures']):,} | {memory} | {row['kills']} | {int(row['lines']):,}"
        )
        assert f"| {row['turns']} | {counts} | {same} |" in PAGE


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("losses-*.csv")), ids=lambda path: path.stem)
def test_the_page_gives_mean_and_spread_of_the_losses(path):
    rows = rows_of(path)
    assert f"(results/{path.name})" in PAGE
    for loss in {row["loss"] for row in rows}:
        own = [[float(row[name]) for row in rows if row["loss"] == loss] for name in ("hits@1", "hits@10", "mrr")]
        assert len(own[0]) == 3
        cells = []
        for values in own:
            middle = sum(values) / 3
            spread = (sum((value - middle) ** 2 for value in values) / 2) ** 0.5
            cells.append(f"{middle:.3f} ± {spread:.3f}")
        assert f"| {loss} | {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "results").glob("regularization_dial-*.csv")), ids=lambda path: path.stem
)
def test_the_page_says_where_the_dial_leads(path):
    rows, columns = rows_of(path), (("new", "new"), ("new", "all"), ("indexed", "all"))
    assert f"(results/{path.name})" in PAGE and path.with_suffix(".svg").exists()

    def cells(**of):
        own = [row for row in rows if all(row[name] == value for name, value in of.items())]
        figures = {
            (row["asked"], row["gallery"]): f"{float(row['hits@1']):.3f} / {float(row['hits@10']):.3f}" for row in own
        }
        return " | ".join(figures[column] for column in columns)

    for strength in {row["regularization"] for row in rows}:
        line = cells(form="cca", regularization=strength, bias="csls, 5 nearest")
        assert f"| {float(strength):g} | {line} | " in PAGE
    for bias in {row["bias"] for row in rows}:
        assert f"| {bias} | {cells(form='cca', regularization='3.0', bias=bias)} |" in PAGE


def test_there_are_results():
    assert RESULTS


def test_the_model_is_the_one_described():
    spec = importlib.util.spec_from_file_location("gradient_cache_memory", FOLDER / "gradient_cache_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    millions = sum(parameter.numel() for parameter in module.build_model().parameters()) / 1e6
    assert f"{millions:.1f} million parameters" in module.__doc__


def test_the_weighted_search_adds_the_weights_of_its_words():
    spec = importlib.util.spec_from_file_location("word_search", FOLDER / "word_search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = ["red dog runs red dogs", "a boat", "the dog sleeps", ""]
    pairs = [("red dog", "dogs"), ("Runs red", "red dog dogs"), ("a boat", "boats")]
    documents = [text.split() for text in texts]
    known = [(sentence.lower().split(), rest.split()) for sentence, rest in pairs]
    spelling = {word: word for text in (*documents, *(sentence for sentence, _ in known)) for word in text}
    weights = weights_by_hand(documents, known, spelling)
    found = module.weighted_scores(texts, pairs, ["The dogs, unheard of", "dog dog boat", "nothing"])
    right = [
        np.add(weights["the"], weights["dogs"]),
        np.add(2 * np.array(weights["dog"]), weights["boat"]),
        np.zeros(4),
    ]
    np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.fixture
def seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("seeds")


def test_the_spread_over_splits(seeds, tmp_path):
    rng, runs = np.random.default_rng(0), {}
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = {
            "eval_hits@1": rng.random(),
            "eval_hits@1_low": 0.0,
            "eval_queries": 12,
            "eval_runtime": 1.0,
            "epoch": 3,
        }
        bm25 = {"mrr": rng.random(), "mrr_high": 1.0, "gallery_size": 12}
        (folder / "eval_results.json").write_text(json.dumps(model | ({"eval_loss": 1.0} if seed else {})))
        (folder / "baselines.json").write_text(json.dumps({"BM25": bm25}))
        runs[seed] = seeds.figures_of(folder)
        assert runs[seed].items() >= {"hits@1": model["eval_hits@1"], "BM25: mrr": bm25["mrr"]}.items()
    rows = {row["figure"]: row for row in seeds.summary(runs)}
    assert list(rows) == ["hits@1", "BM25: mrr"], "what every run has, and nothing but figures"
    for name, row in rows.items():
        values = np.array([own[name] for own in runs.values()])
        expected = [values.mean(), values.std(ddof=1), values.min(), values.max()]
        assert [row[column] for column in seeds.COLUMNS[1:5]] == pytest.approx(expected, abs=1e-4)
    assert seeds.summary({0: {"mrr": 0.5}})[0]["standard_deviation"] == 0
    assert f"| hits@1 | {rows['hits@1']['mean']:.3f} ± " in seeds.markdown(list(rows.values()))


@pytest.mark.slow
def test_each_split_is_trained_once(tmp_path):
    command = [sys.executable, str(FOLDER / "seeds.py"), str(FOLDER.parent / "recipes/quickstart/xmatching.yaml")]
    command += ["--split_seeds", "3", "4", "--work_dir", str(tmp_path), "--output", str(tmp_path / "seeds.csv")]
    command += ["--", "--dataset_config_name", "40", "--max_steps", "4", "--use_cpu"]
    first = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout
    weights = tmp_path / "split_seed_3" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout == first
    assert weights.stat().st_mtime_ns == written, "a finished run is not trained again"
    asked = [{row["caption"] for row in rows_of(tmp_path / f"split_seed_{s}" / "eval_queries.csv")} for s in (3, 4)]
    assert asked[0] != asked[1]
    found = [json.loads((tmp_path / f"split_seed_{s}" / "eval_results.json").read_text())["eval_mrr"] for s in (3, 4)]
    row = next(row for row in rows_of(tmp_path / "seeds.csv") if row["figure"] == "mrr")
    assert float(row["mean"]) == pytest.approx(np.mean(found), abs=1e-4) and row["split_seeds"] == "3 4"


@pytest.mark.slow
def test_a_small_run_writes_its_table(tmp_path):
    command = [sys.executable, str(FOLDER / "gradient_cache_memory.py"), "--batch_size", "512", "--chunk_sizes", "32"]
    subprocess.run([*command, "--output_dir", str(tmp_path)], check=True, timeout=600)
    (path,) = tmp_path.glob("*.csv")
    grown = {}
    for row in rows_of(path):
        grown[row["step"], int(row["batch_size"])] = float(row["peak_gib"]) - float(row["before_gib"])
    assert grown["plain", 512] > 2 * grown["plain", 128] > 0
    assert grown["gradient cache", 512] < 0.5 * grown["plain", 512]


@pytest.mark.slow
def test_new_pictures_are_unknown_to_the_training(tmp_path):
    """A few epochs: what the models saw, and the table of both groups."""
    command = [sys.executable, str(FOLDER / "new_pictures.py"), "--corpus", "shape_scenes", "--new", "60"]
    command += ["--xmatching_epochs", "5", "--epochs", "1", "--work_dir", str(tmp_path)]
    done = subprocess.run(command, check=True, timeout=1200, capture_output=True, text=True)
    first, every = ({row["image"] for row in rows_of(tmp_path / name / "captions.txt")} for name in ("first", "all"))
    assert first < every and len(every - first) == 60
    asked = {group: {row["image"] for row in rows_of(tmp_path / f"{group}.csv")} for group in ("seen", "new")}
    assert asked == {"seen": first, "new": every - first}
    for source in ("pixels", "captions"):
        who = f"| CodebookT5, new ones from {source}"
        assert f"{who} | seen | {len(first)} |" in done.stdout and f"{who} | new | 60 |" in done.stdout
        known = json.loads((tmp_path / f"with_{source}_new/identifiers.json").read_text())
        assert len(known["image_ids"]) == len(every)


def test_engines_whole_indexes_give_the_ranking_of_the_exact_search(tmp_path):
    pytest.importorskip("faiss")
    words = "--size 600 --dimensions 16 --questions 4 --engines exact faiss --whole --output"
    command = [sys.executable, str(FOLDER / "engines.py"), *words.split(), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=FOLDER.parent)
    rows = rows_of(next(tmp_path.glob("engines-600-whole-*.csv")))
    assert len(rows) == 2 * 2 * 2 * 2 * 3  # vectors, engines, before and after, kinds of questions, filters
    assert {row["same_rankings"] for row in rows} == {"1.0"} and {row["recall_at_10"] for row in rows} == {"1.0"}


@pytest.mark.slow
def test_galleries_through_kills_and_updates(tmp_path):
    """Small sizes of both: the bytes of an undisturbed gallery, and the room on disk."""
    for name, *sizes in (
        ("gallery_kills", "--pictures", "2300", "--kills", "1"),
        ("gallery_updates", "--pictures", "200", "--updates", "400", "--singly", "10", "--catalog_rows", "1000"),
    ):
        command = [sys.executable, str(FOLDER / f"{name}.py"), *sizes, "--results_dir", str(tmp_path)]
        subprocess.run(command, check=True, timeout=1200)
    (kills,) = (rows_of(path) for path in tmp_path.glob("gallery_kills-*.csv"))
    assert [row["same_bytes"] for row in kills] == ["True"] * 5
    assert {row["line"] for row in kills[-2:]} == {"100 added, 100 changed, 100 removed, 2100 unchanged"}
    (updates,) = (rows_of(path) for path in tmp_path.glob("gallery_updates-*.csv"))
    assert all(1 < float(row["most_disk_ratio"]) <= 1.2 for row in updates) and len(updates) == 2
