"""How a command ends that was stopped: by Ctrl-C, a closed pipe, a full disk, or memory that does not suffice. In one line."""

import atexit
import errno
import os
import signal
import sys

from imagedex.errors import LocalUserError, Stopped, UserError

INTERRUPTED, BROKEN_PIPE, USER_ERROR = 130, 141, 2  # exit statuses; the first two are the shell's 128 + signal
CTRL_C = "stopped by Ctrl-C"
interrupted: list[bool] = []  # whether that was said

# What the machine lacks, said by the operating system: its number -> what helps.
LACKING = {
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "make room and run the same command again",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a file or folder that you may read and write",
    errno.EPERM: "give a file or folder that you may read and write",
    errno.EMFILE: "raise `ulimit -n`, or give fewer workers",
    errno.ENFILE: "give fewer workers",
    errno.EAGAIN: "give fewer workers",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOMEM: "give a smaller batch or fewer workers",
}
NO_ROOM = os.strerror(errno.ENOSPC)  # where a library tells no more than that
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def run(main) -> None:
    """Calls `main()`. A `UserError` becomes one line on standard error and exit status 2, and so does what the machine lacks;
    Ctrl-C is status 130, `Stopped` has the signal's. Other errors keep their traceback."""
    leave_interrupts_to_the_parent()
    try:
        try:
            if signal.getsignal(signal.SIGINT) is at_ctrl_c:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            main()
        except SystemExit:  # after --help
            flush_output()
            raise
        flush_output()
        leave_the_others()
    except UserError as error:
        local = isinstance(error, LocalUserError)  # met on the way, when a progress bar stands on the line
        leave(f"error: {without_traceback(error)}", USER_ERROR, local)
    except Stopped as stopped:
        leave(str(stopped), stopped.status, local=False)
    except BaseException as error:
        end = ending(error)
        if end is None:
            raise
        leave(*end, local=False)


def leave_at_ctrl_c() -> None:
    """Until `run` is called, Ctrl-C is one line and status 130, too: a script calls this before it imports what takes seconds.
    Nothing is written then, and an exception could get lost in what is being imported."""
    atexit.register(end_as_interrupted)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has Ctrl-C ignored
        signal.signal(signal.SIGINT, at_ctrl_c)


def at_ctrl_c(*_) -> None:
    try:
        leave(CTRL_C, INTERRUPTED, local=False)
    finally:
        os._exit(INTERRUPTED)


def end_as_interrupted() -> None:
    """Last of all that is done at the end: where Ctrl-C met Python in an `exec`, it would kill itself instead (status -2)."""
    if interrupted:
        os._exit(INTERRUPTED)


def leave_the_others() -> None:
    """Ends what several processes share: threads that are left over may end a process that is done with an abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def leave(line: str, status: int, local: bool) -> None:
    """Says the line and exits. Args: local, whether each process says its own; otherwise all fail alike, and one says so."""
    interrupted.extend([True] * (status == INTERRUPTED))
    silence_output()
    if line and local:
        line = f"\n{line}"
    if line and (local or int(os.environ.get("RANK", "0")) == 0) and sys.stderr is not None:
        print(line, file=sys.stderr)
    silence_output()
    sys.exit(status)


def without_traceback(error: UserError) -> str:
    """The message. An error from a DataLoader worker comes with the worker's traceback before it, in one text."""
    return str(error).rsplit(f"{type(error).__module__}.{type(error).__name__}: ", 1)[-1].strip()


def ending(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status for an error that is no defect of ours; None for any other.

    A broken pipe has no line: whoever reads our output has read enough, as `head` does.
    """
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):  # a library's own error may be in front
        return CTRL_C, INTERRUPTED
    for cause in causes(error):
        if isinstance(cause, BrokenPipeError):
            return "", BROKEN_PIPE
        if isinstance(cause, OSError) and cause.errno in LACKING:
            where = cause.filename or "standard output or a file of this run"
            return f"error: {where}: {os.strerror(cause.errno)}; {LACKING[cause.errno]}", USER_ERROR
        if NO_ROOM in str(cause):
            return f"error: {NO_ROOM}; {LACKING[errno.ENOSPC]}", USER_ERROR
        if isinstance(cause, MemoryError) or any(words in str(cause).lower() for words in NO_MEMORY):
            return (
                "error: the memory does not suffice; give a smaller batch, smaller pictures or a smaller model",
                USER_ERROR,
            )
    return None


def causes(error: BaseException):
    """The error, and those that it was raised from."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of a terminal. Forked helpers leave it to us, who end them: each would print a traceback."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


def flush_output() -> None:
    """Raises what a closed or full standard output raises, while it can still be said in one line."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def silence_output() -> None:
    """What is left in the buffer of an output that cannot be written would fail once more when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
