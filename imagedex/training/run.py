"""The life of a training run: its folder, resuming, what is done already, what is switched off when nothing is held out."""

import dataclasses
import json
import logging
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import transformers
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import CONFIG_NAME

from imagedex.checkpoints import read_model_type
from imagedex.errors import LocalUserError, UserError
from imagedex.evaluation.exact import split_folds
from imagedex.files import RUN_RECORD, Lock, check_output_dir, clear_leftovers, create, writing
from imagedex.hub import check_push
from imagedex.training.argument_checks import check_trainer_arguments, compiled
from imagedex.training.stopping import StopSignals
from imagedex.training.trainer_parts import has_weights
from imagedex.training.whole_checkpoints import newest_whole, require_whole

logger = logging.getLogger(__name__)

FINISHED = "finished.json"  # in an output folder, written last: the files a run left, and in which words it ends
STATE, EVAL_RESULTS = "trainer_state.json", "eval_results.json"
# what comes after the model and is made again by itself where it is missing
AFTERWARDS = {
    "README.md",
    EVAL_RESULTS,
    "all_results.json",
    "train_results.json",
    "eval_queries.csv",
    "baselines.json",
    "rankings.jsonl",
}

# What may differ between a run and its continuation: where it writes and reports, how many helpers it has, and whether
# to go on past the unreadable picture that stopped a stream.
MAY_DIFFER = {
    "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "trackio_space_id", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "logging_steps", "logging_strategy", "logging_first_step",
    "logging_nan_inf_filter", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "preprocessing_num_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token",
    "hub_private_repo", "hub_always_push", "hub_revision", "save_total_limit", "local_rank", "ddp_backend",
    "unreadable_images", "keep_dir",
}  # fmt: skip


class Run:
    """One output folder and the arguments that belong to it.

    Made before anything is loaded: refuses a folder it cannot write or that holds a run with other arguments. Nothing is
    written before `carry_out()`, which a script calls once data and model are known to be good.

    Attributes:
        trained: whether the training is over and its model is in the folder; what is missing after it is done then.
        finished: what `FINISHED` says, when all that it names is there and nothing is to be pushed: there is nothing to do.
        checkpoint: where model, processor and identifiers come from when the run goes on; None at its start.
    """

    def __init__(self, args: TrainingArguments, *argument_groups):
        if not (args.do_train or args.do_eval or args.do_predict):
            raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
        self.args = args
        check_trainer_arguments(args, args._measured)
        if args.baseline_text_encoder:
            read_model_type(args.baseline_text_encoder, "baseline_text_encoder")
        check_trackers(args)
        check_push(args)
        values = args.to_dict()
        for group in argument_groups:
            values |= dataclasses.asdict(group)
        self.arguments = {name: value for name, value in values.items() if name not in MAY_DIFFER}
        self.folder, self.lock = Path(args.output_dir), None
        if not args.run_name:  # one name for training and the evaluation after it: trackio would make two runs of them
            args.run_name = f"{self.folder.resolve().name}-{datetime.now():%b%d_%H-%M-%S}"
        left, self.lacking, self.trained, self.checkpoint = on_main_process(args, self._look)
        self.complete = bool(left) and not self.lacking
        # figures of a model that is only judged are measured anew: it may have been trained on
        self.finished = left if self.complete and args.do_train and not args.push_to_hub else None
        if args.keep_states and self.checkpoint and not has_weights(self.checkpoint):
            raise UserError(
                f"--keep_states: {self.checkpoint} holds no whole model, whose states could be kept before the training. Save "
                "whole ones (FULL_STATE_DICT of FSDP, stage3_gather_16bit_weights_on_model_save of DeepSpeed), or leave "
                "--keep_states out"
            )
        set_seed(args.seed)

    def _look(self) -> tuple:
        """(what `FINISHED` says, those of its files that are not there, `trained`, `checkpoint`); by the main process, which
        keeps others out of the folder from now on. Raises `UserError`."""
        check_output_dir(self.folder, self.arguments, RUN_RECORD)
        if (self.folder / RUN_RECORD).exists():
            self._take_folder()
        named = self._names_checkpoint()
        left = None if named else read_json(self.folder / FINISHED)
        lacking = [name for name in left["files"] if not (self.folder / name).exists()] if left else []
        trained = self.args.do_train and not named and is_trained(self.folder)
        return left, lacking, trained, str(self.folder) if trained else self._checkpoint()

    def _take_folder(self) -> None:
        """Raises `UserError` where another process is at work there; what a killed one left is removed."""
        self.lock = Lock(self.folder / RUN_RECORD, f"--output_dir {self.folder}", reentrant=True)
        if self.lock.held:
            clear_leftovers(self.folder)

    def _begin(self) -> None:
        """Makes the folder this run's, where it is not yet. Raises `UserError`."""
        if self.lock:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.arguments, indent=2, sort_keys=True, default=str) + "\n"
        if not create(self.folder / RUN_RECORD, content):
            raise UserError(f"--output_dir {self.folder}: another run began there meanwhile; give another folder")
        self._take_folder()

    def _names_checkpoint(self) -> bool:
        """Whether a checkpoint to go on from is named, whatever else there is."""
        return str(self.args.resume_from_checkpoint or "true").lower() not in ("true", "1")

    def _checkpoint(self) -> str | None:
        given = self.args.resume_from_checkpoint
        if self._names_checkpoint():
            return require_whole(given)
        found = newest_whole(self.folder)
        if given and not found:
            raise UserError(f"--resume_from_checkpoint: {self.folder} holds no whole checkpoint")
        if found:
            logger.info("going on from %s", found)
        return found

    def carry_out(self, trainer: Trainer) -> dict[str, float]:
        """Trains and evaluates as --do_train and --do_eval say and saves model and figures. Returns those of the evaluation.

        The first to write anything. What was done before a stop is not done again.
        """
        with at_work(trainer):
            on_main_process(self.args, self._begin)
            if self.trained:
                logger.info("the training of %s is over; only what is missing is done", self.folder)
                trainer.state = TrainerState.load_from_json(str(self.folder / STATE))
                if set(self.lacking) - AFTERWARDS:
                    trainer.save_model(_internal_call=True)
            elif self.args.do_train:
                self._train(trainer)
            if not self.args.do_eval:
                return {}
            if self.has(EVAL_RESULTS):
                return self.kept(EVAL_RESULTS)
            metrics = trainer.evaluate()
            trainer.save_metrics("eval", metrics)
            return metrics

    def _train(self, trainer: Trainer) -> None:
        self._forget_ending()
        with compiled(self.args):
            trained = trainer.train(resume_from_checkpoint=self.checkpoint)
        trainer.save_metrics("train", trained.metrics)
        trainer.save_model(_internal_call=True)  # pushed once, at the end, when everything is there
        trainer.save_state()  # last: it says that the training is over
        if trainer.stop.asked:  # after its last step
            raise trainer.stop.stopped(trainer.stop.asked)

    def _forget_ending(self) -> None:
        """Removes what an earlier training left after its model: beside new weights it would vouch for those."""
        if self.args.process_index == 0:
            for name in (FINISHED, STATE, *sorted(AFTERWARDS)):
                (self.folder / name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether this run has left that file after its training, so that it need not be made again."""
        return self.trained and (self.folder / name).exists()

    def kept(self, name: str):
        """The content of a JSON file that this run left, None where it did not."""
        return read_json(self.folder / name) if self.has(name) else None


def read_json(path: Path):
    """What the file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextmanager
def at_work(trainer: Trainer):
    """While a run writes: a full disk, a deleted folder and a signal to stop end it with one line.

    Raises `UserError`, `Stopped`.
    """
    folder, main = trainer.args.output_dir, trainer.is_world_process_zero()
    with (
        StopSignals(trainer, folder) as trainer.stop,
        writing(folder, UserError if main else LocalUserError, "output_dir"),
    ):
        if main:
            trainer.require_folder()
        yield


def on_main_process(args: TrainingArguments, look):
    """What `look()` gives in the main process, or the `UserError` that it raises there, in every process."""
    found = [None, None]
    if args.process_index == 0:
        try:
            found[0] = look()
        except UserError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    return found[0]


def has_state(folder: Path) -> bool:
    """Whether a checkpoint, or a model that is trained, is all there: its state is written last."""
    try:
        return read_json(folder / STATE) is not None
    except ValueError:  # cut off while it was written
        return False


def is_trained(folder: Path) -> bool:
    """Whether a training ended here: `carry_out` saves the model first and the state after it."""
    return has_weights(folder) and (folder / CONFIG_NAME).exists() and has_state(folder)


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
