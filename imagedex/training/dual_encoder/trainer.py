"""Trainer of the dual encoder: a learning rate a tower, and evaluation as retrieval."""

import functools
import json
import logging
import math
import time
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from imagedex.errors import UserError
from imagedex.evaluation.exact import metrics_by_gallery, top_k, with_bias
from imagedex.files import write_atomically
from imagedex.modeling.caption_bank import FILE as CAPTION_BANK
from imagedex.modeling.caption_bank import CaptionBank
from imagedex.modeling.sentence_transformers_files import FILES
from imagedex.training.adapters import adapter_layers, add_adapters, has_adapters
from imagedex.training.dual_encoder.data import RetrievalEvaluation
from imagedex.training.dual_encoder.gradient_cache import batch_statistics, cached_step
from imagedex.training.dual_encoder.head_start import HeadStart
from imagedex.training.dual_encoder.streaming import CaptionStream
from imagedex.training.trainer_parts import TowerTrainerMixin

logger = logging.getLogger(__name__)

START_RESULTS = "start_results.json"  # how good heads in closed form are before any step
TOWERS = ("text_model.", "vision_model.")


class XMatchingTrainer(TowerTrainerMixin, Trainer):
    """`eval_dataset` is a `RetrievalEvaluation`; metrics are every caption against the gallery, both directions."""

    batch_statistics_said = False
    travelling = (*TowerTrainerMixin.travelling, *FILES, CAPTION_BANK)

    def __init__(self, model=None, args=None, head_start: HeadStart | None = None, **kwargs):
        """Args: head_start, what is known of heads in closed form that the model starts with; None: it has others."""
        if args.lora_rank and args.do_train:
            adapter_layers(model, args)  # what is wrong is said before anything is written
        super().__init__(model=model, args=args, **kwargs)
        self.head_start = head_start
        for name in ("gradient_cache_chunk_size", "lora_rank"):
            if getattr(self.args, name) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise UserError(
                    f"--{name} works on one device and with DDP, not with FSDP or DeepSpeed; leave it out, or launch with "
                    "accelerate_configs/multi_gpu.yaml"
                )

    def train(self, *args, **kwargs):
        """As Trainer, with adapters where the arguments ask for them (a model that is only judged has none); says at the end what
        of a stream was left out."""
        self.model.caption_bank = None  # of a model that is trained on: it is of other weights from now on
        if self.args.lora_rank and not has_adapters(self.model):
            add_adapters(self.model, self.args)
        result = super().train(*args, **kwargs) if self.head_start is None else self.train_from(*args, **kwargs)
        if isinstance(self.train_dataset, CaptionStream):
            self.train_dataset.report()
        return result

    def train_from(self, *args, **kwargs):
        """Trains from heads in closed form: they are judged, too, and training must not end below them."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.eval_strategy == "no" or self.eval_dataset is None or sharded:
            return super().train(*args, **kwargs)
        start = self.evaluate(metric_key_prefix="start")
        if self.is_world_process_zero():
            write_atomically(Path(self.args.output_dir, START_RESULTS), json.dumps(start, indent=2) + "\n")
        before = {name: value.clone() for name, value in self.model.state_dict().items() if not name.startswith(TOWERS)}
        result = super().train(*args, **kwargs)
        end = self.evaluate(metric_key_prefix="end")
        if end["end_mrr"] < start["start_mrr"]:
            found = f"MRR {end['end_mrr']:.3f} at the end, {start['start_mrr']:.3f} at the closed-form start"
            if self.args.load_best_model_at_end:
                self.model.load_state_dict(before, strict=False)
                logger.warning("%s: the start is the best model, and is kept", found)
            else:
                logger.warning(
                    "%s: lower --learning_rate, or give --load_best_model_at_end true to keep the start", found
                )
        return result

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.head_start is not None and self.args.should_save:
            self.head_start.save(output_dir or self.args.output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        """As Trainer; what is saved at the end, and not as a checkpoint on the way, gets its bank of training captions."""
        if output_dir is None and self.args.do_train:
            self.make_caption_bank()
        super().save_model(output_dir, _internal_call)

    def make_caption_bank(self) -> None:
        """Vectors of some training captions, by which the model tells hubs; see `CaptionBank`."""
        rows = getattr(self.train_dataset, "banked", ())
        if isinstance(self.train_dataset, CaptionStream) and self.args.caption_bank_size:
            logger.info("a model that is trained from a stream keeps no bank of captions: it ranks by cosines")
        core = self.accelerator.unwrap_model(self.model)
        core.caption_bank = None
        if rows:
            texts = torch.utils.data.Subset(self.train_dataset.texts, rows)
            core.caption_bank = CaptionBank(self.embed(texts, "text_embeds", "Encoding the bank of captions"))

    def calibrate(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> None:
        """Keeps with the bank how confident the model is of the right pictures of captions that were not trained."""
        bank = self.accelerator.unwrap_model(self.model).caption_bank
        bank.calibrate(text_embeds, image_embeds)
        if (
            self.args.should_save and Path(self.args.output_dir, CAPTION_BANK).exists()
        ):  # of the model that was trained here
            bank.save_confidences(self.args.output_dir)

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

    def found(
        self, k: int, image_ids: list[str]
    ) -> tuple[list[list[float]], list[list[str]], list[list[float]] | None]:
        """The k best pictures for each caption that is asked: their scores, descending, their names, and their cosines where the
        scores are others."""
        text_embeds, image_embeds = self.embed_both(self.eval_dataset.named())
        bias = self.bias(image_embeds)
        scores, rows = top_k(*with_bias(text_embeds, image_embeds, bias), k)
        cosines = (
            None if bias is None else [(v @ image_embeds[r].T).tolist() for v, r in zip(text_embeds, rows, strict=True)]
        )
        return scores.tolist(), [[image_ids[row] for row in best] for best in rows.tolist()], cosines

    def bias(self, image_embeds: torch.Tensor) -> torch.Tensor | None:
        """(N,) of each picture, once the model has its bank of captions."""
        bank = self.accelerator.unwrap_model(self.model).caption_bank
        return None if bank is None else bank.bias(image_embeds)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Hits@1/5/10, MRR and median rank of every caption against the gallery (with `five_fold`, the mean over its fifths,
        each against its own pictures), by cosines less each picture's bias once the model has its bank of captions (then
        `cosine_...` are by cosines alone); the same for pictures asking captions (`image_to_text_...`), the loss over the
        captions, and how many captions and pictures that was. When no training is under way also the figures' intervals, and
        the figures in the other galleries, from the same embeddings."""
        started = time.time()
        evaluation = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.is_in_train:
            evaluation = evaluation.named()
        text_embeds, image_embeds = self.embed_both(evaluation)
        options = {"five_fold": self.args.five_fold, "with_intervals": not self.is_in_train}
        bias, galleries = self.bias(image_embeds), evaluation.galleries
        if bias is not None and not self.is_in_train and eval_dataset is None:
            self.calibrate(text_embeds, image_embeds[evaluation.targets])
        metrics = metrics_by_gallery(text_embeds, image_embeds, evaluation.targets, galleries, bias, **options)
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
