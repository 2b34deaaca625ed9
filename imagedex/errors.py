"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what was asked: one line that says what is wrong and what to do.

    Scripts print it as ``error: ...`` on standard error and exit with status 2, without a traceback
    (see :func:`imagedex.command_line.run`). Everything else that is raised is a defect and keeps its traceback.
    """


class LocalUserError(UserError):
    """One that a single process meets, for example in its share of a stream: it says so itself, whichever it is."""


class Stopped(Exception):
    """Asked to stop by a signal, at a place from which the same command goes on: one line, and the signal's exit status.

    Scripts print the line on standard error, without a traceback (see :func:`imagedex.command_line.run`).
    """

    def __init__(self, line: str, signum: int):
        super().__init__(line)
        self.status = 128 + signum  # as shells count
