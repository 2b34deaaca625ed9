"""Runs one of the scripts and notes, every few steps, what its process holds: `watched_run.py OUT EVERY SCRIPT ARGUMENTS`."""

import gc
import importlib
import json
import sys
from pathlib import Path

import psutil
import torch

from imagedex.training import trainer_parts


def held() -> tuple[int, int]:
    """Bytes in memory, and how many tensors Python knows of, garbage aside."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return psutil.Process().memory_info().rss, tensors


class Watch(trainer_parts.TrainingLog):
    """The trainer's own log, and samples of what is held."""

    def on_step_end(self, args, state, control, **kwargs):
        result = super().on_step_end(args, state, control, **kwargs)
        if state.global_step % EVERY == 0:
            SAMPLES.append(held())
        return result


if __name__ == "__main__":
    OUT, EVERY, SAMPLES = Path(sys.argv[1]), int(sys.argv[2]), []
    trainer_parts.TrainingLog = Watch
    importlib.import_module(sys.argv[3]).main(sys.argv[4:])
    OUT.write_text(json.dumps(SAMPLES))
