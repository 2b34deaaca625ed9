"""Signals that ask a training to stop: it goes on to the next step, writes a checkpoint, and ends with one line."""

import os
import signal
import threading

from imagedex.errors import Stopped

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StopSignals:
    """Within it, Ctrl-C and SIGTERM (which a job gets that is preempted) are remembered in `asked` while `trainer` trains, and
    raise `Stopped` where nothing is lost: before the training and after it. A second Ctrl-C ends the process at once."""

    def __init__(self, trainer, folder):
        self.trainer, self.folder, self.asked, self.pid = trainer, folder, 0, os.getpid()

    def __enter__(self) -> "StopSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self.before = {number: signal.signal(number, self.hear) for number in NAMES}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number, frame) -> None:
        if os.getpid() != self.pid:  # a helper that was forked: its parent decides
            return
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number
        if not self.trainer.is_in_train:
            raise self.stopped(number)
        if (
            number == signal.SIGINT and self.trainer.is_world_process_zero()
        ):  # somebody waits; print would not be safe here
            os.write(1, b"\nI a checkpoint is written after this step; Ctrl-C again ends at once\n")

    def agreed(self, accelerator) -> int:
        """The signal that some process has heard, the same in every process, which all call this together; 0: none."""
        if accelerator.num_processes == 1:
            return self.asked
        import torch

        return int(accelerator.gather(torch.tensor([int(self.asked)], device=accelerator.device)).max())

    def stopped(self, number: int, checkpoint=None) -> Stopped:
        where = f": {checkpoint} is written" if checkpoint else ""
        name = NAMES[signal.Signals(number)]
        return Stopped(f"stopped by {name}{where}; the same command goes on in {self.folder}", number)


def outlive_first_sigterm(worker_init=None, worker: int = 0) -> None:
    """In a DataLoader's worker: a SIGTERM to the whole job leaves it alive until the checkpoint is written. Its parent, which
    ends its workers by the same signal, tries twice."""
    if worker_init is not None:
        worker_init(worker)

    def second(number, frame):
        os._exit(0)

    def first(number, frame):
        signal.signal(signal.SIGTERM, second)

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
