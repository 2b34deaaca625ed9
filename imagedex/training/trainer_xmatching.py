"""Trainer of the dual encoder: a learning rate a tower, and evaluation as retrieval."""

import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import speed_metrics

from imagedex.retrieval.search import retrieval_metrics
from imagedex.training.data import RetrievalEvaluation


class XMatchingTrainer(Trainer):
    """`eval_dataset` is a `RetrievalEvaluation`; metrics are every caption against the whole gallery, both directions."""

    write_card = None  # path -> None; what `create_model_card` calls, set by the script that knows the run

    def create_model_card(self, *args, **kwargs):
        """Our card instead of Trainer's; called by `push_to_hub`."""
        if self.is_world_process_zero() and self.write_card is not None:
            self.write_card(Path(self.args.output_dir) / "README.md")

    def create_optimizer(self, model=None):
        """As Trainer, with `text_learning_rate` and `vision_learning_rate` for the towers."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        rates = {"text_model.": self.args.text_learning_rate, "vision_model.": self.args.vision_learning_rate}
        rate_of = {}  # parameter -> its tower's rate
        for name, parameter in (model or self.model).named_parameters():
            for tower, rate in rates.items():
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def embed(self, rows, field: str, description: str) -> torch.Tensor:
        """Embeddings of all rows in their order, gathered from every process: (rows, projection_dim) float32 on the CPU.

        Args: field, "text_embeds" or "image_embeds".
        """
        loader = DataLoader(
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        loader = self.accelerator.prepare_data_loader(loader)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        parts = []
        for batch in tqdm(loader, desc=description, disable=hidden, leave=False):
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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Hits@1/5/10, MRR and median rank of every caption against the gallery, the same for pictures asking captions
        (`image_to_text_...`), the loss over the captions, and how many captions and pictures that was."""
        started = time.time()
        evaluation = self.eval_dataset if eval_dataset is None else eval_dataset
        text_embeds, image_embeds = self.embed_both(evaluation)
        metrics = retrieval_metrics(text_embeds, image_embeds, evaluation.targets)
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
