"""What a training says while it runs: one line an evaluation, a short line of the training loss, bars on a terminal only."""

import logging
import sys

import datasets
import huggingface_hub
import transformers
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainingArguments

logger = logging.getLogger(__name__)

# What libraries say that asks nothing of the user: logger -> how the message begins.
IDLE = {
    "transformers.trainer_utils": (
        # checkpoints are then sorted by their numbers, which is what is wanted
        "mtime may not be reliable on this filesystem",
        # 0.25 of all steps is not 25 steps; arguments that do differ were refused before (see run.py)
        "Warning: The following arguments do not match the ones in the `trainer_state.json`",
    ),
}
# of an evaluation: figure -> (its name, how it is written)
FIGURES = {
    "loss": ("loss", "{:.3f}"),
    "hits@1": ("Hits@1", "{:.3f}"),
    "hits@10": ("Hits@10", "{:.3f}"),
    "mrr": ("MRR", "{:.3f}"),
    "memorised": ("memorised", "{:.3f}"),
}


class LineHandler(logging.StreamHandler):
    """Lines on standard output, wherever that is now; a progress bar steps aside for each."""

    def __init__(self):
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))

    def emit(self, record):
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class Idle(logging.Filter):
    """Drops messages that begin so."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record):
        return not record.getMessage().startswith(self.beginnings)


def setup_logging(args: TrainingArguments) -> None:
    """Our log lines on the main process at INFO, the libraries' at WARNING; progress bars where somebody sees them move."""
    main_process = args.process_index == 0
    logging.basicConfig(handlers=[LineHandler()], force=True)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("imagedex", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if main_process else logging.ERROR)
    transformers.logging.set_verbosity_warning()
    datasets.utils.logging.set_verbosity_warning()
    for name, beginnings in IDLE.items():
        library = logging.getLogger(name)
        if not any(isinstance(known, Idle) for known in library.filters):
            library.addFilter(Idle(beginnings))
    if not sys.stderr.isatty():
        args.disable_tqdm = True
    transformers.logging.disable_progress_bar()  # of shards, read and written in a moment; turns the Hub's off, too
    if not main_process or args.disable_tqdm:
        datasets.disable_progress_bars()
    else:
        huggingface_hub.utils.enable_progress_bars()


class TrainingLog(ProgressCallback):
    """In place of the Trainer's printed dictionaries. With `disable_tqdm` there is no bar, and the training loss, which the
    bar shows otherwise, has lines of its own at the logging steps."""

    training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training, self.started_at = True, state.global_step
        if args.disable_tqdm or not state.is_world_process_zero:
            return
        self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True)
        self.current_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            steps = state.global_step - self.started_at
            if steps:
                logger.info(
                    "trained %d steps in %.1f s, mean loss %.3f", steps, logs["train_runtime"], logs["train_loss"]
                )
        elif any(name.startswith("eval_") for name in logs):
            # after the training it is the model that is kept, which need not be that of the last step
            logger.info("%s  %s", place(state) if self.training else "evaluation", evaluation_line(logs))
        elif "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        elif "loss" in logs:
            logger.info("%s  training loss %.3f", place(state), logs["loss"])


def place(state) -> str:
    """Where a training is, in a width that stays: "step  20/200, epoch 1.33"."""
    steps = f"{state.global_step:{len(str(state.max_steps))}}/{state.max_steps}"
    return f"step {steps}, epoch {state.epoch or 0:.2f}"


def evaluation_line(logs: dict) -> str:
    """The figures that there are, by name, and how long measuring them took."""
    words = [
        f"{name} {form.format(logs[f'eval_{figure}'])}"
        for figure, (name, form) in FIGURES.items()
        if f"eval_{figure}" in logs
    ]
    if "eval_runtime" in logs:
        words.append(f"{logs['eval_runtime']:.1f} s")
    return "  ".join(words)
