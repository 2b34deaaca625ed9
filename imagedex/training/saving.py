"""How a Trainer here saves and goes on: what it writes is whole or not there, and what it reads is as it was written."""

import dataclasses
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from imagedex.errors import LocalUserError, UserError
from imagedex.files import RUN_RECORD, UNFINISHED, identity, write_atomically, writing
from imagedex.training.whole_checkpoints import (
    MODEL_PARTS,
    fault,
    move_files,
    numbered,
    put_in_place,
    remove,
    rotate,
    write_manifest,
)

# what reading a file raises that holds something else than it should
UNREADABLE = (pickle.UnpicklingError, SafetensorError, OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError)


class SavingMixin:
    """For a Trainer: checkpoints and the model at the end are written aside and renamed; a training that is asked to stop does so
    between two steps.

    Attributes:
        stop: `StopSignals`, by who listens to them.
    """

    stop = None
    aside: Path | None = None  # where a checkpoint is being written
    seen_step = saved_step = None
    holding = held = False  # whether a checkpoint waits for the end of the epoch; whether there was one

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.folder_id = identity(self.args.output_dir)

    # ---- writing ----

    @contextmanager
    def writing_aside(self):
        """A folder in the output folder, the same for every process, that is gone afterwards. Raises `UserError`."""
        folder = Path(self.args.output_dir)
        aside = folder / UNFINISHED
        try:
            with writing(folder, UserError if self.is_world_process_zero() else LocalUserError, "output_dir"):
                if self.args.should_save:
                    self.require_folder()
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir()
                self.accelerator.wait_for_everyone()
                yield aside
        finally:
            same = identity(folder) == self.folder_id
            # deleted meanwhile, it was made again by what writes into it, unless another run is there
            if self.args.should_save and (same or not (folder / RUN_RECORD).exists()):
                shutil.rmtree(aside, ignore_errors=True)
                if not same and folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()

    def require_folder(self) -> None:
        if identity(self.args.output_dir) != self.folder_id:
            raise UserError(
                f"--output_dir {self.args.output_dir} is gone: it was deleted or moved while this run was at work; give the "
                "command again"
            )

    def in_place(self, source: Path, put) -> None:
        """`put(source)` by who saves, once every process has written its own files there."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save and source.exists():
            self.require_folder()
            put(source)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self.aside is None else str(self.aside)

    def _save_checkpoint(self, model, trial):
        """As Trainer, whole or not at all."""
        if self.holding:
            self.held = True
            return
        state, folder = self.state, Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        place = folder / name
        with self.writing_aside() as self.aside:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                aside, self.aside = self.aside, None
            if state.best_global_step == state.global_step:
                state.best_model_checkpoint = os.path.join(self.args.output_dir, name)
            if self.args.should_save:
                state.save_to_json(aside / name / TRAINER_STATE_NAME)

            def put(source: Path) -> None:
                write_manifest(source)
                put_in_place(source, place)

            self.in_place(aside / name, put)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(place))
            if self.args.should_save:
                best = folder / Path(state.best_model_checkpoint or place).name
                rotate(folder, aside, self.args.save_total_limit, {place, best})
        self.saved_step = state.global_step

    def _push_from_checkpoint(self, checkpoint_folder):
        """As Trainer, once the checkpoint is in its place: the push reads it while training goes on."""
        if self.aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer; the model at the end takes its place in the output folder when all of it is written."""
        if output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        with self.writing_aside() as aside:
            super().save_model(str(aside / "model"), True)
            self.in_place(aside / "model", lambda source: move_files(source, Path(self.args.output_dir)))
        return None

    def save_metrics(self, split, metrics, combined=True):
        """As Trainer, each file whole."""
        if not self.is_world_process_zero():
            return
        self.require_folder()
        folder = Path(self.args.output_dir)
        every = folder / "all_results.json"
        try:
            before = json.loads(every.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # cut off by an earlier imagedex that was killed
            before = {}
        files = {folder / f"{split}_results.json": metrics} | ({every: before | metrics} if combined else {})
        for path, content in files.items():
            write_atomically(path, json.dumps(content, indent=4, sort_keys=True))

    def save_state(self):
        """As Trainer, whole."""
        if self.is_world_process_zero():
            self.require_folder()
            content = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            write_atomically(Path(self.args.output_dir, TRAINER_STATE_NAME), content)

    def _finalize_training(self, *args, **kwargs):
        """As Trainer, but the checkpoints that --save_total_limit 1 removes beside the best go as all others do."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            result = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if limit == 1 and self.state.best_model_checkpoint and self.args.should_save:
            folder = Path(self.args.output_dir)
            best = folder / Path(self.state.best_model_checkpoint).name
            if best.is_dir():
                remove([checkpoint for checkpoint in numbered(folder) if checkpoint != best], folder / UNFINISHED)
        return result

    # ---- between two steps ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """As Trainer. A checkpoint of an epoch's last step waits for what belongs to the epoch's end: a run that went on from it
        would not be evaluated there. Then a training that is asked to stop does so."""
        control, step = self.control, self.state.global_step
        ends = control.should_training_stop or control.should_epoch_stop or float(self.state.epoch or 0).is_integer()
        self.holding = bool(ends and step != self.seen_step)  # Trainer comes again at the epoch's end
        self.seen_step = step
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.holding:
            self.control.should_save |= self.held
            self.holding = self.held = False
        elif self.stop is not None and (number := self.stop.agreed(self.accelerator)):
            self.stop_here(number)

    def stop_here(self, number: int) -> None:
        """Raises `Stopped`, with a checkpoint of this step, from which a run goes on whatever --save_only_model says."""
        if self.saved_step != self.state.global_step or self.args.save_only_model:
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped, None)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        place = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        raise self.stop.stopped(number, place)

    # ---- reading ----

    @contextmanager
    def reading(self, checkpoint):
        """Within it, a file that holds something else is the user's to mend. Raises `UserError`. Nothing in it is executed:
        Trainer reads tensors and numbers alone (`weights_only`)."""
        try:
            yield
        except UserError:
            raise
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:200]
            if isinstance(error, pickle.UnpicklingError):
                reason = "a file holds something else than tensors and numbers, and was not read"
            raise UserError(
                f"the training cannot go on from {checkpoint}: {reason}; remove it to go on from an earlier one"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with self.reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with self.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, max_steps, updates, epochs, resume_from_checkpoint, trial):
        """As Trainer, which looks for the best checkpoint where it once lay; where it is not, the last model would be kept."""
        self.seen_step = self.saved_step = None
        begun = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint and self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            here, beside = Path(self.args.output_dir, name), Path(resume_from_checkpoint).parent / name
            known = self.state.best_model_checkpoint
            self.state.best_model_checkpoint = next(
                (str(p) for p in (here, known, beside) if p and Path(p).is_dir()), None
            )
        return begun

    def require_best(self) -> None:
        """Raises `UserError` where the best checkpoint is not as it was written."""
        best = self.state.best_model_checkpoint
        if reason := fault(Path(best), parts=MODEL_PARTS):
            raise UserError(
                f"{best} has the best model, but is not whole: {reason}; remove it and the later ones, and the same command "
                "trains again from before it"
            )
