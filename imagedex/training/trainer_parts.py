"""What the trainers here do alike: a learning rate a tower, batches to evaluate on, and going on from where a run stopped."""

import functools
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from imagedex.training.adapters import ADAPTERS, has_adapters, load_adapters, merged_weights, save_adapters
from imagedex.training.draws import RowDraws
from imagedex.training.logs import TrainingLog
from imagedex.training.publishing import PublishingMixin
from imagedex.training.saving import SavingMixin
from imagedex.training.stopping import outlive_first_sigterm


class TowerTrainerMixin(SavingMixin, PublishingMixin):
    """For a Trainer of a model with towers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for printer in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(printer)
        self.add_callback(TrainingLog)

    def tower_rates(self) -> dict[str, float | None]:
        """How a tower's parameters are named -> its learning rate; None: `learning_rate`."""
        return {"vision_model.": self.args.vision_learning_rate}

    def create_optimizer(self, model=None):
        """As Trainer, with the towers' own learning rates."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        rate_of = {}  # parameter -> its tower's rate
        for name, parameter in (model or self.model).named_parameters():
            for tower, rate in self.tower_rates().items():
                if rate is not None and tower in name:
                    rate_of[parameter] = rate
        groups = []
        for group in optimizer.param_groups:
            by_rate = {}
            for parameter in group["params"]:
                by_rate.setdefault(rate_of.get(parameter, group["lr"]), []).append(parameter)
            groups += [group | {"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        optimizer.param_groups[:] = groups
        return optimizer

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **kwargs):
        """As Trainer; what is drawn for a training row belongs to seed, epoch and row."""
        if is_training and not isinstance(dataset, IterableDataset):
            dataset = RowDraws(dataset, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if is_training and getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(outlive_first_sigterm, loader.worker_init_fn)
        return loader

    def evaluation_batches(self, rows, description: str):
        """(the model, in evaluation mode; this process's batches of `rows` in their order, behind a progress bar)."""
        loader = DataLoader(
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # an evaluation takes nothing from what training draws
        )
        loader = self.accelerator.prepare_data_loader(loader)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        return model, tqdm(loader, desc=description, disable=hidden, leave=False)

    def _save(self, output_dir=None, state_dict=None):
        """As Trainer; of a model with adapters the merged one, and in a checkpoint all that trains, to go on from."""
        adapted = has_adapters(self.model)
        if adapted:
            state_dict = merged_weights(self.model)
        super()._save(output_dir, state_dict)
        if adapted and self.args.should_save and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            save_adapters(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As Trainer, but through `from_pretrained`: Trainer looks for the weights under the names that the modules have, and
        where transformers saves them under older ones (ViT's) it leaves them as they are, with a warning."""
        with self.reading(resume_from_checkpoint):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            return load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        """As Trainer, but through `from_pretrained`, see above."""
        self.require_best()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        return load_weights(self.model, self.state.best_model_checkpoint)

    def _run_epoch(self, *args, epoch: int, train_dataloader, **kwargs):
        """As Trainer, which would train one step more when a run that has ended is started again. The rows hear which epoch it
        is; accelerate does not tell them where batches are passed by, or with several processes."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        if isinstance(train_dataloader.dataset, RowDraws):
            train_dataloader.dataset.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)


def has_weights(folder: Path | str) -> bool:
    """Whether `save_pretrained` wrote weights there; sharded trainings may leave others."""
    return any(Path(folder, name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def trained_model(checkpoint: str | None) -> str | None:
    """The model that a run which goes on is built from, so that what it keeps and computes before its training is of that model.

    None at the start, and where only the Trainer can read the weights: beside LoRA's the model has its products added, so what
    rests comes from where it came from at the start; sharded ones need the processes that wrote them.
    """
    if checkpoint is None or Path(checkpoint, ADAPTERS).exists() or not has_weights(checkpoint):
        return None
    return checkpoint


def load_weights(model, folder: str) -> None:
    """Fills the model, wherever it is, with what `save_pretrained` wrote to the folder; a model with adapters with what lies
    beside that."""
    if has_adapters(model):
        return load_adapters(model, folder)
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return None
