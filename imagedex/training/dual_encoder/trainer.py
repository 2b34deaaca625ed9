"""Trainer of the dual encoder: a learning rate a tower, and evaluation as retrieval."""

import functools
import logging
import math
import time

import torch
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from imagedex.errors import UserError
from imagedex.evaluation.exact import retrieval_metrics, top_k
from imagedex.modeling.sentence_transformers_files import FILES
from imagedex.training.adapters import adapter_layers, add_adapters, has_adapters
from imagedex.training.dual_encoder.data import RetrievalEvaluation
from imagedex.training.dual_encoder.gradient_cache import batch_statistics, cached_step
from imagedex.training.dual_encoder.streaming import CaptionStream
from imagedex.training.trainer_parts import TowerTrainerMixin

logger = logging.getLogger(__name__)


class XMatchingTrainer(TowerTrainerMixin, Trainer):
    """`eval_dataset` is a `RetrievalEvaluation`; metrics are every caption against the whole gallery, both directions."""

    batch_statistics_said = False
    travelling = (*TowerTrainerMixin.travelling, *FILES)

    def __init__(self, model=None, args=None, **kwargs):
        if args.lora_rank and args.do_train:
            adapter_layers(model, args)  # what is wrong is said before anything is written
        super().__init__(model=model, args=args, **kwargs)
        for name in ("gradient_cache_chunk_size", "lora_rank"):
            if getattr(self.args, name) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise UserError(
                    f"--{name} works on one device and with DDP, not with FSDP or DeepSpeed; leave it out, or launch with "
                    "accelerate_configs/multi_gpu.yaml"
                )

    def train(self, *args, **kwargs):
        """As Trainer, with adapters where the arguments ask for them: a model that is only judged or saved again has none."""
        if self.args.lora_rank and not has_adapters(self.model):
            add_adapters(self.model, self.args)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        """As Trainer; a stream brings its own, since its rows are this process's already."""
        if isinstance(self.train_dataset, CaptionStream):
            return self.train_dataset.loader(
                self._train_batch_size, self.data_collator, self.args, self.accelerator.device
            )
        return super().get_train_dataloader()

    def _run_epoch(self, *args, **kwargs):
        """As Trainer, which throws batches away that were seen before a stop: a stream need not make them."""
        if isinstance(self.train_dataset, CaptionStream) and not self.args.ignore_data_skip:
            self.train_dataset.pass_by(kwargs.get("steps_trained_in_current_epoch", 0))
        super()._run_epoch(*args, **kwargs)

    def tower_rates(self):
        return super().tower_rates() | {"text_model.": self.args.text_learning_rate}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def hardness(self) -> float:
        """Weight of the hardest negative at this step: 0 at the first, 1 after `hardest_warmup_steps` (VSE++ 1707.05612)."""
        given = self.args.hardest_warmup_steps
        steps = int(given) if given >= 1 else math.ceil(given * self.state.max_steps)
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As Trainer, with the warm-up of the hardest negative and with gradient caching where the arguments ask for it."""
        core, chunk_size = self.accelerator.unwrap_model(model), self.args.gradient_cache_chunk_size
        core.hardness = self.hardness()
        try:
            if chunk_size is None or len(next(iter(inputs.values()))) <= chunk_size:
                return super().training_step(model, inputs, num_items_in_batch)
            return self.cached_training_step(model, core, inputs, chunk_size)
        finally:
            core.hardness = 1.0  # evaluation, and whoever loads the model, has the loss itself

    def cached_training_step(self, model, core, inputs, chunk_size: int) -> torch.Tensor:
        """The loss of the batch, its gradients added to the parameters', at the memory of a chunk."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have two modes
            self.optimizer.train()
        self.warn_of_batch_statistics(core)
        accumulated = self.current_gradient_accumulation_steps
        loss = cached_step(
            model,
            self._prepare_inputs(inputs),
            chunk_size,
            core=core,
            backward=lambda surrogate: self.accelerator.backward(surrogate / accumulated),
            no_sync=functools.partial(self.accelerator.no_sync, model),
        )
        return loss / accumulated

    def warn_of_batch_statistics(self, core) -> None:
        layers = batch_statistics(core)
        if layers and not self.batch_statistics_said:
            self.batch_statistics_said = True
            logger.warning(
                "%d batch norms train on the statistics of a chunk of %d rows, not of the batch: with gradient caching "
                "this run is not the same as without",
                len(layers),
                self.args.gradient_cache_chunk_size,
            )

    @torch.no_grad()
    def embed(self, rows, field: str, description: str) -> torch.Tensor:
        """Embeddings of all rows in their order, gathered from every process: (rows, projection_dim) float32 on the CPU.

        Args: field, "text_embeds" or "image_embeds".
        """
        model, batches = self.evaluation_batches(rows, description)
        parts = []
        for batch in batches:
            with self.autocast_smart_context_manager():
                embeds = getattr(model(**batch), field)
            parts.append(self.accelerator.gather_for_metrics(embeds.float()).cpu())
        return torch.cat(parts)

    def embed_both(self, evaluation: RetrievalEvaluation) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the captions asked and of the gallery."""
        return (
            self.embed(evaluation.texts, "text_embeds", "Encoding captions"),
            self.embed(evaluation.pictures, "image_embeds", "Encoding pictures"),
        )

    def found(self, k: int, image_ids: list[str]) -> tuple[list[list[float]], list[list[str]]]:
        """The k best pictures for each caption that is asked: their scores, descending, and their names."""
        scores, rows = top_k(*self.embed_both(self.eval_dataset), k)
        return scores.tolist(), [[image_ids[row] for row in best] for best in rows.tolist()]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Hits@1/5/10, MRR and median rank of every caption against the gallery (with `five_fold`, the mean over its fifths,
        each against its own pictures), the same for pictures asking captions
        (`image_to_text_...`), the loss over the captions, and how many captions and pictures that was."""
        started = time.time()
        evaluation = self.eval_dataset if eval_dataset is None else eval_dataset
        text_embeds, image_embeds = self.embed_both(evaluation)
        metrics = retrieval_metrics(text_embeds, image_embeds, evaluation.targets, five_fold=self.args.five_fold)
        metrics |= {"folds": 5} if self.args.five_fold else {}
        metrics |= {"loss": self.loss_over(text_embeds, image_embeds, evaluation.targets), "queries": len(evaluation)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(evaluation))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def loss_over(self, text_embeds, image_embeds, targets) -> float:
        """Mean loss over batches of the evaluation captions, in one fixed shuffle (so that a batch is not one picture's).

        The last batch is left out when it is smaller than the others: losses depend on the batch's size.
        """
        targets = torch.from_numpy(targets)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        batches = order.split(self.args.per_device_eval_batch_size)
        losses = []
        for batch in batches[:-1] if len(batches) > 1 and len(batches[-1]) < len(batches[0]) else batches:
            rows = batch[: len(batch) // 2 * 2]  # the paired loss needs two halves
            if len(rows):
                batch = (text_embeds[rows], image_embeds[targets[rows]], targets[rows])
                losses.append(self.model.compute_loss(*(x.to(self.args.device) for x in batch)).item())
        return sum(losses) / max(1, len(losses))
