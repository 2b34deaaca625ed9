"""A few pages in the schema that Natural Questions has on the Hub (google-research-datasets/natural_questions)."""

import os
import random
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Sequence, Value

LONG = Value("int64")
SPAN = {"end_byte": LONG, "end_token": LONG, "start_byte": LONG, "start_token": LONG}
FEATURES = Features(
    {
        "id": Value("string"),
        "document": {
            "html": Value("string"),
            "title": Value("string"),
            "tokens": Sequence(
                {"end_byte": LONG, "is_html": Value("bool"), "start_byte": LONG, "token": Value("string")}
            ),
            "url": Value("string"),
        },
        "question": {"text": Value("string"), "tokens": Sequence(Value("string"))},
        "long_answer_candidates": Sequence(SPAN | {"top_level": Value("bool")}),
        "annotations": Sequence(
            {
                "id": Value("string"),
                "long_answer": SPAN | {"candidate_index": LONG},
                "short_answers": Sequence(SPAN | {"text": Value("string")}),
                "yes_no_answer": ClassLabel(names=["NO", "YES"]),
            }
        ),
    }
)


def make_pages(number: int, titles: int, words: int = 12, html_bytes: int = 0) -> list[dict]:
    """Rows whose titles repeat; no two rows have the same text or question. ``html_bytes`` of noise that does not pack."""
    draw = random.Random(7)
    pages = []
    for row in range(number):
        title = f"Page {draw.randrange(titles)}"
        tokens = ["<H1>", *title.split(), "-", "Wikipedia", "</H1>", "<P>"]
        tokens += [f"w{row}x{place}" if place % 5 else "<B>" for place in range(words)] + ["</P>"]
        places = list(range(len(tokens)))
        question = f"what is told of number {row}"
        span = {"end_byte": 9, "end_token": 9, "start_byte": 3, "start_token": 3}
        pages.append(
            {
                "id": str(5_000_000_000_000_000_000 + row),
                "document": {
                    "html": os.urandom(html_bytes // 2).hex(),
                    "title": title,
                    "tokens": {
                        "end_byte": places,
                        "is_html": [token.startswith("<") for token in tokens],
                        "start_byte": places,
                        "token": tokens,
                    },
                    "url": f"https://en.wikipedia.org/?row={row}",
                },
                "question": {"text": question, "tokens": question.split()},
                "long_answer_candidates": {name: [value] for name, value in (span | {"top_level": True}).items()},
                "annotations": {
                    "id": ["1"],
                    "long_answer": [span | {"candidate_index": 0}],
                    "short_answers": [{name: [value] for name, value in (span | {"text": "x"}).items()}],
                    "yes_no_answer": [-1],
                },
            }
        )
    return pages


def write_pages(folder: Path, pages: list[dict], files: int = 3, row_group: int = 4) -> Path:
    """Writes ``default/train-00000-of-00003.parquet`` and so on below ``folder``, and a validation file beside them."""
    (folder / "default").mkdir(parents=True)
    size = -(-len(pages) // files)
    parts = [(f"train-{n:05d}-of-{files:05d}", pages[n * size : (n + 1) * size]) for n in range(files)]
    other = [page | {"question": {"text": "a question of the validation split", "tokens": []}} for page in pages[:2]]
    for name, rows in [*parts, ("validation-00000-of-00001", other)]:
        path = folder / "default" / f"{name}.parquet"
        Dataset.from_list(rows, features=FEATURES).to_parquet(str(path), batch_size=row_group)
    return folder
