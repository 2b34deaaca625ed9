"""Locks that go with their process, leftovers of killed ones, and a disk without room."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from imagedex.errors import UserError
from imagedex.files import Lock, check_output_dir, clear_leftovers, create, write_atomically, writing

HOLD = """
import sys, time
from pathlib import Path
from imagedex.files import Lock
lock = Lock(Path(sys.argv[1]), "taken")
if sys.argv[2] == "helper":
    import os
    if os.fork() == 0:
        time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


def holder(path, kind=""):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["", "helper"])
def test_a_lock_keeps_others_out_and_goes_with_its_process(tmp_path, kind):
    """Also where a DataLoader's worker lives on for some seconds."""
    path = tmp_path / "record"
    path.write_text("{}")
    process = holder(path, kind)
    try:
        with pytest.raises(UserError, match="^taken$"):
            Lock(path, "taken")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 30  # a helper that was just forked has yet to let go
        while True:
            try:
                assert Lock(path, "taken").held
                break
            except UserError:
                assert time.monotonic() < end
                time.sleep(0.05)
        assert path.read_text() == "{}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_one_process_has_a_lock_as_often_as_it_likes(tmp_path):
    path = tmp_path / "record"
    path.write_text("{}")
    first = Lock(path, "taken")
    assert first.held and Lock(path, "taken").held


def test_a_file_system_without_locks_lets_a_run_go_on(tmp_path, monkeypatch):
    path = tmp_path / "record"
    path.write_text("{}")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("imagedex.files.fcntl.flock", no_locks)
    assert not Lock(path, "taken").held


def test_of_two_that_begin_one_is_first(tmp_path):
    assert create(tmp_path / "record", "one") and not create(tmp_path / "record", "two")
    assert (tmp_path / "record").read_text() == "one" and os.listdir(tmp_path) == ["record"]


def test_only_what_is_ours_is_cleared(tmp_path):
    kept = [".env", ".notes.tmp", "a.tmp", ".x.abcdefgh.tmp~", "_unfinished.txt", "checkpoint-3"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / "_unfinished" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / ".README.md.ab_12xyz.tmp").write_text("half")
    assert clear_leftovers(tmp_path) == [".README.md.ab_12xyz.tmp", "_unfinished"]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_run_that_was_killed_before_its_record_stood_can_begin(tmp_path):
    (tmp_path / ".run_arguments.json.ab_12xyz.tmp").write_text("{")
    assert check_output_dir(tmp_path, {"a": 1}, "run_arguments.json") == tmp_path


def test_what_a_killed_write_leaves_is_known_as_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # as if nobody could clear up
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", "{}")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 1
    assert len(clear_leftovers(tmp_path)) == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_a_full_disk_is_one_line_whoever_says_it(tmp_path, error):
    with (
        pytest.raises(UserError, match=rf"no room to write --output_dir {tmp_path} \(.*\): make room"),
        writing(tmp_path),
    ):
        raise error


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is gone"), writing(tmp_path / "deleted"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("a"), FileNotFoundError(errno.ENOENT, "No such file", "/pictures/a.jpg"), UserError("b")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error
