"""How a command ends that was stopped: one line, its status, no traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagedex import endings
from imagedex.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HEEDED = {
    "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
}  # which shells take from jobs in the background
HELP = [sys.executable, "-m", "imagedex", "--help"]


def ended(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        endings.run(main)
    return stopped.value.code, capsys.readouterr().err


def wrapped(cause):
    """As a library raises its own error from the operating system's."""
    error = RuntimeError("it failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("this is wrong"), 2, "error: this is wrong"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (OSError(errno.ENOSPC, "no room", "runs/model.safetensors"), 2, "runs/model.safetensors: No space left"),
        (wrapped(OSError(errno.ENOSPC, "no room")), 2, "No space left"),
        (RuntimeError("IoError: No space left on device (os error 28)"), 2, "make room"),
        (OSError(errno.EROFS, "read-only", "cache"), 2, "cache: Read-only file system"),
        (OSError(errno.EMFILE, "too many"), 2, "ulimit"),
        (MemoryError(), 2, "memory does not suffice"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "smaller batch"),
        (BrokenPipeError(errno.EPIPE, "pipe"), 141, ""),
    ],
)
def test_what_is_no_defect_is_one_line(capsys, error, status, words):
    code, line = ended(capsys, error)
    assert code == status and words in line and line.count("\n") == bool(words)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        endings.run(lambda: os.stat("nowhere/at/all"))


def test_several_processes_say_it_once(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ended(capsys, UserError("wrong")) == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_output_is_said_once():
    with open("/dev/full", "w") as full:
        found = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "No space left" in found.stderr


def test_a_reader_that_has_read_enough_is_no_mistake():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        found = subprocess.run(HELP, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 141 and not found.stderr


def test_a_closed_output_is_no_mistake():
    found = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *HELP], stderr=subprocess.PIPE, text=True)
    assert found.returncode == 0 and not found.stderr


WITH_HELPERS = """
import multiprocessing, os, signal, time
from imagedex import endings

def main():
    pool = multiprocessing.get_context("fork").Pool(2)
    with pool:
        found = pool.map_async(time.sleep, [30, 30])
        time.sleep(0.5)
        os.killpg(0, signal.SIGINT)
        found.get()

endings.run(main)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked helpers")
def test_ctrl_c_is_one_line_with_helper_processes_too():
    found = subprocess.run(
        [sys.executable, "-c", WITH_HELPERS],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        timeout=60,
        **HEEDED,
    )
    assert found.returncode == 128 + signal.SIGINT and found.stderr.strip() == "stopped by Ctrl-C"


STOPPED_WHILE_IMPORTED = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except {caught}:
    pass
"""
STARTED = [
    ["run_xmatching.py"],
    ["run_image_indexing.py"],
    ["run_dsi.py"],
    ["run_retrieval.py"],
    ["-m", "imagedex", "dsi"],
]


@pytest.mark.parametrize("command", STARTED, ids=" ".join)
def test_ctrl_c_while_libraries_are_imported_is_one_line(command, tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(STOPPED_WHILE_IMPORTED.format(caught="ZeroDivisionError"))
    found = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        **HEEDED,
    )
    assert (found.returncode, found.stdout, found.stderr) == (128 + signal.SIGINT, "", "stopped by Ctrl-C\n")


def test_ctrl_c_within_an_exec_has_the_same_status(tmp_path):
    """Python would kill itself with SIGINT, although the exception was caught."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(
        f"exec({STOPPED_WHILE_IMPORTED.format(caught='ZeroDivisionError')!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "imagedex", "dsi", "--help"]
    found = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, **HEEDED)
    assert (found.returncode, found.stderr) == (128 + signal.SIGINT, "stopped by Ctrl-C\n")


def test_ctrl_c_gets_lost_in_no_import(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(STOPPED_WHILE_IMPORTED.format(caught="BaseException"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "run_retrieval.py", "--help"]
    found = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, **HEEDED)
    assert (found.returncode, found.stderr) == (128 + signal.SIGINT, "stopped by Ctrl-C\n")


def test_a_shell_that_has_ctrl_c_ignored_is_heeded(tmp_path):
    """As for a job in the background."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise SystemExit(7)"
    )
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert (
        subprocess.run([sys.executable, "run_dsi.py"], cwd=ROOT, env=environment, timeout=60, **ignored).returncode == 7
    )
