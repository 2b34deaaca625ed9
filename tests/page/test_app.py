"""app.py, the entry of a Space: started as a Space starts it, asked, stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

pytest.importorskip("gradio", reason="the page needs the extra `demo`")

APP = Path(__file__).resolve().parents[2] / "app.py"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as own:
        return own.getsockname()[1]


def start(folder, **settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOST": "127.0.0.1"} | settings
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, str(APP)], cwd=folder, env=environment, **pipes)


def answer_of(process, port, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/imagedex/search", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    for _ in range(600):
        assert process.poll() is None, process.stdout.read()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError("never answered")


def test_a_space_indexes_its_pictures_answers_and_stops(tiny_xmatching, paint, tmp_path):
    for number in range(3):
        paint(tmp_path / "pictures" / f"{number}.png", number)
    port = free_port()
    process = start(tmp_path, IMAGEDEX_MODEL=str(tiny_xmatching), PORT=str(port))
    try:
        assert len(answer_of(process, port, {"query": ["a dog"]})["images"]) == 3
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and "Traceback" not in said, said
    assert (tmp_path / "gallery" / "catalog.parquet").is_file()


@pytest.mark.parametrize(
    ("settings", "says"),
    [({}, "holds no picture"), ({"PORT": "x"}, "--port")],
)
def test_a_setting_that_is_wrong_is_one_line(tiny_xmatching, tmp_path, settings, says):
    process = start(tmp_path, **({"IMAGEDEX_MODEL": str(tiny_xmatching)} | settings))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and says in said.splitlines()[-1] and "Traceback" not in said


def test_the_front_matter_of_a_space_names_what_is_there():
    text = (APP.parent / "docs" / "page.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(
        re.search(r"^---\ntitle:.*?(?=^---$)", text, re.MULTILINE | re.DOTALL)[0].removeprefix("---")
    )
    project = tomllib.loads((APP.parent / "pyproject.toml").read_text())["project"]
    assert facts["sdk"] == "gradio" and (APP.parent / facts["app_file"]).is_file()
    assert facts["python_version"] in project["requires-python"]
    assert Requirement(project["optional-dependencies"]["demo"][0]).specifier.contains(facts["sdk_version"])
