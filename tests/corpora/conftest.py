"""A datasets cache of the test's own, and pictures whose colour tells which is which."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Features, Value
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def paint():
    """paint(folder, {"a.png": (255, 0, 0)}): one-coloured PNG or JPEG pictures."""

    def run(folder, colours):
        for name, colour in colours.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 6), colour).save(folder / name)
        return folder

    return run


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def colours():
    return {"red": RED, "green": GREEN, "blue": BLUE}


@pytest.fixture
def rows_of():
    """rows_of(dataset) -> {image_id: captions}, in order."""
    return lambda dataset: dict(zip(dataset["image_id"], dataset["captions"], strict=True))


@pytest.fixture
def write_parquet():
    """write_parquet(file, [({"bytes": ..., "path": ...}, caption), ...]): as it is given; `datasets` would embed the files."""

    def run(file, rows):
        schema = Features({"image": datasets.Image(), "caption": Value("string")}).arrow_schema
        columns = {"image": [image for image, _ in rows], "caption": [caption for _, caption in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), file)

    return run
