"""The life of a training run: its folder, logging, resuming, what is switched off when nothing is held out, its last line."""

import dataclasses
import json
import logging
import os
import sys
from datetime import datetime

import datasets
import transformers
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from imagedex.errors import UserError
from imagedex.evaluation.exact import split_folds
from imagedex.files import RUN_RECORD, check_output_dir, write_atomically
from imagedex.hub import check_push

logger = logging.getLogger(__name__)

# What may differ between a run and its continuation: where it writes and reports, how many helpers it has, and whether
# to go on past the unreadable picture that stopped a stream.
MAY_DIFFER = {
    "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "logging_steps", "logging_strategy", "logging_first_step",
    "logging_nan_inf_filter", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "preprocessing_num_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token",
    "hub_private_repo", "hub_always_push", "hub_revision", "save_total_limit", "local_rank", "ddp_backend",
    "unreadable_images",
}  # fmt: skip


def setup_logging(args: TrainingArguments) -> None:
    """Our log lines on the main process at INFO, the libraries' at WARNING."""
    main_process = args.process_index == 0
    logging.basicConfig(format="%(levelname).1s %(message)s", handlers=[logging.StreamHandler(sys.stdout)], force=True)
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("imagedex", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if main_process else logging.ERROR)
    transformers.logging.set_verbosity_warning()
    datasets.utils.logging.set_verbosity_warning()
    if not main_process or args.disable_tqdm or not sys.stderr.isatty():  # short bars are noise in a file
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class Run:
    """One output folder and the arguments that belong to it.

    Made before anything is loaded: refuses a folder it cannot write or that holds a run with other arguments. Nothing is
    written before `carry_out()`, which a script calls once data and model are known to be good.
    """

    def __init__(self, args: TrainingArguments, *argument_groups):
        if not (args.do_train or args.do_eval or args.do_predict):
            raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
        self.args = args
        check_trackers(args)
        check_push(args)
        values = args.to_dict()
        for group in argument_groups:
            values |= dataclasses.asdict(group)
        self.arguments = {name: value for name, value in values.items() if name not in MAY_DIFFER}
        self.folder = check_output_dir(args.output_dir, self.arguments, RUN_RECORD)
        if not args.run_name:  # one name for training and the evaluation after it: trackio would make two runs of them
            args.run_name = f"{self.folder.resolve().name}-{datetime.now():%b%d_%H-%M-%S}"
        self.checkpoint = self._checkpoint()
        set_seed(args.seed)

    def _checkpoint(self) -> str | None:
        given = self.args.resume_from_checkpoint
        if given and str(given).lower() not in ("true", "1"):
            if not os.path.isdir(given):
                raise UserError(f"--resume_from_checkpoint {given}: there is no such folder")
            return given
        found = get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None
        if given and not found:
            raise UserError(f"--resume_from_checkpoint: {self.folder} holds no checkpoint")
        if found:
            logger.info("going on from %s", found)
        return found

    def carry_out(self, trainer: Trainer) -> dict[str, float]:
        """Trains and evaluates as --do_train and --do_eval say and saves the figures of both. Returns those of the evaluation.

        The first to write anything.
        """
        if self.args.process_index == 0:
            write_atomically(
                self.folder / RUN_RECORD, json.dumps(self.arguments, indent=2, sort_keys=True, default=str) + "\n"
            )
        if self.args.do_train:
            trained = trainer.train(resume_from_checkpoint=self.checkpoint)
            trainer.save_metrics("train", trained.metrics)
            trainer.save_state()
        if not self.args.do_eval:
            return {}
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        return metrics


def check_trackers(args: TrainingArguments) -> None:
    """Whether there is a tracker of each name in `--report_to`, and it is installed. Raises `UserError`."""
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        names = " ".join(args.report_to)
        raise UserError(f"--report_to {names} cannot work: {' '.join(str(error).split())[:300]}") from error


def without_evaluation(args: TrainingArguments) -> None:
    """Nothing is held out: evaluation and the choice of a best model are off, whatever the recipe says."""
    if args.do_eval or args.do_predict or args.eval_strategy != "no" or args.load_best_model_at_end:
        logger.warning("nothing is held out: evaluation and the choice of the best checkpoint are off")
    args.do_eval = args.do_predict = args.load_best_model_at_end = False
    args.metric_for_best_model = None
    args.eval_strategy = transformers.IntervalStrategy.NO
    if args.save_strategy == transformers.trainer_utils.SaveStrategy.BEST:
        args.save_strategy = transformers.trainer_utils.SaveStrategy.EPOCH


def check_batches(args: TrainingArguments, loss_type: str, num_captions: int | None) -> None:
    """A batch must fit the loss and the corpus (None: a stream, of any number). Raises `UserError`."""
    if not args.do_train:
        return
    size = args.train_batch_size
    if loss_type == "paired_hinge" and size % 2:
        raise UserError(f"the paired hinge loss needs an even batch; --per_device_train_batch_size is {size}")
    if loss_type == "paired_hinge":
        args.dataloader_drop_last = True  # the last batch may be odd
    if num_captions is None:
        return
    whole = size * args.world_size
    if args.dataloader_drop_last and num_captions < whole:
        raise UserError(
            f"{num_captions} training captions do not fill one batch of {whole}; lower --per_device_train_batch_size"
        )
    left_over = num_captions % whole
    if args.dataloader_drop_last and left_over:
        logger.info(
            "each epoch leaves out %d of %d captions, %s each time: the last batch is not full",
            left_over,
            num_captions,
            "the same" if args.train_sampling_strategy == "sequential" else "others",
        )


def check_folds(args: TrainingArguments, targets, gallery_size: int) -> None:
    """Before anything is trained: with `five_fold`, every fifth of the gallery has captions. Raises `UserError`."""
    if args.five_fold:
        try:
            split_folds(targets, gallery_size, 5)
        except ValueError as error:
            raise UserError(f"--five_fold cuts the gallery of {gallery_size} pictures into five: {error}") from None
