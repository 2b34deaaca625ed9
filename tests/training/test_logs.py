"""Logging of a training: bars on a terminal only, lines that stand clear of them, no message that asks nothing of the user."""

import logging
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from imagedex.training.logs import TrainingLog, setup_logging


class Terminal:
    """Standard error, as a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def levels_put_back():
    loggers = [logging.getLogger(name) for name in ("imagedex", "__main__")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=False)


@pytest.fixture
def state():
    return TrainerState(global_step=20, max_steps=200, epoch=1.5, is_world_process_zero=True)


def log(callback, args, state, *entries):
    control = TrainerControl()
    callback.on_train_begin(args, state, control)
    for entry in entries:
        callback.on_log(args, state, control, logs=entry)
    callback.on_train_end(args, state, control)


ENTRIES = [
    {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3},
    {"eval_loss": 1.5, "eval_hits@1": 0.25, "eval_runtime": 2.04},
]


def test_in_a_file_there_are_lines_and_no_bars(args, state, capsys):
    setup_logging(args)  # standard error is no terminal here
    assert args.disable_tqdm
    log(TrainingLog(), args, state, *ENTRIES)
    found = capsys.readouterr()
    assert found.err == ""
    assert found.out.splitlines() == [
        "I step  20/200, epoch 1.50  training loss 2.000",
        "I step  20/200, epoch 1.50  loss 1.500  Hits@1 0.250  2.0 s",
    ]


def test_on_a_terminal_the_loss_is_in_the_bar_and_lines_stand_clear_of_it(args, state, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging(args)
    assert not args.disable_tqdm
    log(TrainingLog(), args, state, *ENTRIES)
    assert "loss 2.000" in terminal.text and "20/200" in terminal.text
    assert capsys.readouterr().out.splitlines() == ["I step  20/200, epoch 1.50  loss 1.500  Hits@1 0.250  2.0 s"]


def test_messages_that_ask_nothing_are_dropped_and_others_are_not(args, caplog):
    setup_logging(args)
    library = logging.getLogger("transformers.trainer_utils")
    heard = []
    library.addHandler(handler := logging.Handler())
    handler.emit = lambda record: heard.append(record.getMessage())
    try:
        library.warning("mtime may not be reliable on this filesystem, falling back to numerical ordering")
        library.warning("something is wrong with mtime")
    finally:
        library.removeHandler(handler)
    assert heard == ["something is wrong with mtime"]
    before = len(library.filters)
    setup_logging(args)
    assert len(library.filters) == before


@pytest.mark.parametrize("process", [0, 1])
def test_one_process_speaks(tmp_path, capsys, process):
    args = SimpleNamespace(process_index=process, disable_tqdm=False)
    setup_logging(args)
    logging.getLogger("imagedex.anything").info("a line")
    assert re.findall("I a line", capsys.readouterr().out) == ["I a line"] * (1 - process)
