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
from imagedex.files import (
    A_DAY,
    CannotWrite,
    Lock,
    check_output_dir,
    clear_leftovers,
    create,
    write_atomically,
    writing,
)

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
        with pytest.raises(UserError, match="^taken: another run is at work there"):
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


def test_one_process_has_a_reentrant_lock_as_often_as_it_likes(tmp_path):
    path = tmp_path / "record"
    path.write_text("{}")
    first = Lock(path, "mine", reentrant=True)
    second = Lock(path, "mine", reentrant=True)
    assert first.held and second.held
    with pytest.raises(UserError, match="^mine: another run"):
        Lock(path, "mine")


def test_a_folder_is_locked_as_a_file_is_until_the_block_ends(tmp_path):
    with pytest.raises(ZeroDivisionError), Lock(tmp_path, "mine") as lock:
        assert lock.held
        with pytest.raises(UserError, match="^yours: another run is at work there"):
            Lock(tmp_path, "yours")
        raise ZeroDivisionError
    assert not lock.held and Lock(tmp_path, "mine").held and not list(tmp_path.iterdir())


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


USERS = [".env", ".notes.tmp", "a.tmp", ".x.abcdefgh.tmp~", "_unfinished.txt", "checkpoint-3"]


def test_only_what_is_ours_is_cleared(tmp_path):
    for name in [*USERS, "run_arguments.json"]:
        (tmp_path / name).write_text("mine")
    (tmp_path / "_unfinished" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "within").mkdir()
    for place in (tmp_path, tmp_path / "within"):
        (place / ".README.md.ab_12xyz.tmp").write_text("half")
    assert clear_leftovers(tmp_path) == [".README.md.ab_12xyz.tmp", "_unfinished"]
    assert clear_leftovers(tmp_path, within=True) == ["within/.README.md.ab_12xyz.tmp"]
    assert sorted(os.listdir(tmp_path)) == sorted([*USERS, "run_arguments.json", "within"])


def test_an_unfinished_folder_of_a_user_is_nobodys_leftover(tmp_path):
    (tmp_path / "_unfinished").mkdir()
    assert clear_leftovers(tmp_path) == [] and os.listdir(tmp_path) == ["_unfinished"]


def test_where_nothing_is_locked_only_what_is_old_is_cleared(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f".{name}.ab_12xyz.tmp").write_text("half")
    past = time.time() - 2 * A_DAY
    os.utime(tmp_path / ".old.ab_12xyz.tmp", (past, past))
    assert clear_leftovers(tmp_path, older_than=A_DAY) == [".old.ab_12xyz.tmp"]
    assert clear_leftovers(tmp_path / "nowhere", older_than=A_DAY) == []


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
        pytest.raises(UserError, match=rf"no room to write --output_dir {tmp_path} \(.*\): make room") as raised,
        writing(tmp_path, UserError, "output_dir"),
    ):
        raise error
    assert type(raised.value) is UserError


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), RuntimeError("PytorchStreamWriter failed")):
        with pytest.raises(CannotWrite, match=f"^{tmp_path}/deleted is gone"), writing(tmp_path / "deleted"):
            raise error


@pytest.mark.parametrize("place", ["", "a.json", None])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO])
def test_what_is_refused_in_the_folder_is_one_line(tmp_path, number, place):
    error = OSError(number, os.strerror(number), None if place is None else str(tmp_path / place))
    with (
        pytest.raises(CannotWrite, match=rf"^{tmp_path} cannot be written \({os.strerror(number)}\)"),
        writing(tmp_path),
    ):
        raise error


def test_a_folder_that_cannot_be_made_is_no_deleted_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(CannotWrite, match=r"file/out cannot be written \(Not a directory\)"),
        writing(tmp_path / "file/out"),
    ):
        (tmp_path / "file" / "out").mkdir(parents=True)


def test_other_errors_stay_what_they_are(tmp_path):
    elsewhere = [OSError(number, "?", "/pictures/a.jpg") for number in (errno.ENOENT, errno.EACCES, errno.EIO)]
    for error in (ValueError("a"), UserError("b"), *elsewhere):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error
