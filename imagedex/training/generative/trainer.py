"""Trainer of the generative models: evaluation by constrained beams, identifiers saved beside the model."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import speed_metrics

from imagedex.errors import UserError
from imagedex.evaluation.intervals import intervals
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_list, summarize_ranks
from imagedex.modeling.constrained_decoding import rank_identifiers, sequence_log_probs
from imagedex.modeling.identifiers import FACTS_FILE, TENSORS_FILE, Identifiers
from imagedex.training.generative.codebook_use import CodebookUse
from imagedex.training.generative.data import GenerativeEvaluation
from imagedex.training.generative.teacher import Teacher
from imagedex.training.trainer_parts import TowerTrainerMixin

logger = logging.getLogger(__name__)

CUT_OFFS = (1, 5, 10)


@dataclass
class Answers:
    """What was found for Q queries, on the CPU.

    scores (Q, k) float32, descending, -inf behind the last; rows (Q, k) int64, rows of the identifiers, -1 there (both None
    without identifiers); losses (Q,) float32, minus the log-probability of the right labels; lengths (Q,), their tokens;
    milliseconds a query, of this process, the loss included: it and the search share what the encoder gave.
    """

    scores: torch.Tensor | None
    rows: torch.Tensor | None
    losses: torch.Tensor
    lengths: torch.Tensor
    milliseconds: float

    @property
    def loss(self) -> float:
        """Mean over tokens, in nats."""
        return (self.losses.double().sum() / self.lengths.sum()).item()

    def ranks(self, targets: Sequence[tuple[int, ...]]) -> list[float]:
        """The rank of the best of each query's right rows; infinite where none was found."""
        ranks = []
        for rows, scores, target in zip(self.rows.tolist(), self.scores.tolist(), targets, strict=True):
            found = sum(row >= 0 for row in rows)
            ranks.append(rank_from_list(rows[:found], target, scores[:found]))
        return ranks


class DSITrainer(TowerTrainerMixin, Seq2SeqTrainer):
    """`eval_dataset` is a `GenerativeEvaluation`. Without `identifiers` (captioning) only the loss is measured."""

    travelling = (*TowerTrainerMixin.travelling, TENSORS_FILE, FACTS_FILE)

    def __init__(self, *args, identifiers: Identifiers | None = None, teacher: Teacher | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.identifiers, self.teacher = identifiers, teacher
        self.codebook_use = CodebookUse(self.model)
        self.model_accepts_loss_kwargs = False  # T5's own forward takes any keyword; its loss is a mean over this batch

    @classmethod
    def of(cls, parts, args, train, evaluation, write_card, teacher: Teacher | None = None) -> "DSITrainer":
        """Args: parts, of `build_parts`; train and evaluation, its datasets; write_card, see `PublishingMixin`."""
        return cls(
            model=parts.model,
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=parts.rows.items.collator,
            processing_class=parts.processor,
            identifiers=parts.identifiers,
            write_card=write_card,
            teacher=teacher,
        )

    def tower_rates(self):
        """VisionGroundedT5's projection learns with the tower: where T5 stays as it is, it would stay at random weights."""
        rates = super().tower_rates() | {"shared.": self.args.embedding_learning_rate}
        if hasattr(self.model, "vision_projection"):
            rates["vision_projection."] = self.args.vision_learning_rate
        return rates

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; label smoothing (over the rows that have labels) and what the teacher says are added to it, so that
        no part of it is lost."""
        sentences = inputs.pop("sentences", None)
        outputs = model(**inputs)
        loss, added = outputs.loss, 0.0
        if sentences and self.teacher is not None and model.training:
            added = added + self.teacher.loss(outputs.logits, inputs["labels"], sentences)
        epsilon = self.args.label_smoothing_factor
        if epsilon and model.training and "labels" in inputs:
            added = added + epsilon * (uniform_loss(outputs.logits, inputs) - label_loss(outputs.logits, inputs))
        if model.training and self.accelerator.num_processes > 1:
            loss, added = self.shares_of_all(outputs, added, inputs)
        loss = loss + added
        return (loss, outputs) if return_outputs else loss

    def shares_of_all(self, outputs, added, inputs) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The model's loss and what is added to it, weighted so that their averages over the processes are the means over all
        processes' rows: processes have different numbers of tokens, and DDP counts them alike. (The entropy of a learned
        codebook is no mean over rows: it stays that of each process's own pictures.)"""
        quantizer, labels = getattr(outputs, "quantizer_loss", None), inputs.get("labels")
        given = outputs.loss.new_tensor(0 if labels is None else (labels != -100).sum(), dtype=torch.float32)
        tokens, words = getattr(outputs, "num_labels", None), getattr(outputs, "num_words", None)
        counts = torch.stack(
            [given, given if tokens is None else tokens.float(), given * 0 if words is None else words.float()]
        )
        everywhere = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)
        of_labels, of_tokens, of_words = counts * self.accelerator.num_processes / everywhere
        loss = of_tokens * outputs.loss
        if quantizer is not None:
            loss = loss + (of_words - of_tokens) * quantizer
        return loss, of_labels * added

    def log(self, logs, *args, **kwargs):
        """As Trainer's; beside the training loss, how much of its codebook a CodebookT5 used since the last time."""
        if "loss" in logs:
            logs |= self.codebook_use.figures(True, self.accelerator)
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def answer(self, dataset, description: str) -> Answers:
        """Ranks identifiers for all rows, in their order, gathered from every process. Raises `UserError`: weights of NaN."""
        model, batches = self.evaluation_batches(dataset, description)
        parts, queries, seconds = [], 0, 0.0
        for batch in batches:
            batch = self._prepare_inputs(batch)
            labels = batch["labels"]
            # The search calls the decoder's layers, and not the model as Trainer has prepared it.
            with self.accelerator.autocast():
                started = time.perf_counter()
                output = model(**batch)
                part = [-sequence_log_probs(output.logits, labels), (labels != -100).sum(1)]
                if self.identifiers is not None:
                    # Sharded parameters are whole within `forward` alone, and all processes have to call it equally often.
                    inputs = encoded(output, batch) | {"synced_gpus": self.is_fsdp_enabled or None}
                    try:
                        part += rank_identifiers(model, self.identifiers, inputs, self.args.num_beams)
                    except FloatingPointError as error:
                        raise UserError(str(error)) from error
                    seconds += time.perf_counter() - started
            queries += len(labels)
            parts.append([values.cpu() for values in self.accelerator.gather_for_metrics(tuple(part))])
        losses, lengths, *found = (torch.cat(values) for values in zip(*parts, strict=True))
        scores, rows = found or (None, None)
        return Answers(scores, rows, losses, lengths, 1000 * seconds / max(1, queries))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **gen_kwargs):
        """Of the sentences: Hits@1/5/10, MRR, the loss (a token, in nats) and milliseconds a query (one process, batched), and
        when no training is under way the figures' intervals. Of the items themselves: `memorised`, Hits@1 of picture
        (document) -> identifier; of a CodebookT5 how much of its codebook their batches use. And how many there were."""
        started = time.time()
        evaluation: GenerativeEvaluation = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics, asked = {}, 0
        if evaluation.sentences is not None:
            answers = self.answer(evaluation.sentences, "Answering")
            asked += len(answers.losses)
            if self.identifiers is not None:
                ranks = answers.ranks(evaluation.targets)
                summary = summarize_ranks(ranks, ks=CUT_OFFS)
                metrics |= {name: value for name, value in summary.items() if np.isfinite(value)}
                if not self.is_in_train:
                    metrics |= intervals((ranks, evaluation.targets), ks=CUT_OFFS)
                metrics |= {"ms_per_query": answers.milliseconds}
            metrics |= {"loss": answers.loss, "queries": asked}
        if evaluation.items is not None:
            answers = self.answer(evaluation.items, "Recalling")
            metrics |= {
                "memorised": summarize_ranks(answers.ranks(evaluation.item_targets))["hits@1"],
                "memorised_samples": len(answers.losses),
            }
            metrics |= self.codebook_use.figures(False, self.accelerator)
            metrics.setdefault("loss", answers.loss)
            asked += len(answers.losses)
        if self.identifiers is not None:
            metrics |= {"gallery_size": len(self.identifiers)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=asked)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def found(self, k: int, image_ids=None) -> tuple[list[list[float]], list[list[str]]]:
        """The k best items for each sentence that is asked: their scores, descending, and their names. Fewer where the beams
        found fewer."""
        answers = self.answer(self.eval_dataset.sentences, "Answering")
        rows = [[row for row in best[:k] if row >= 0] for best in answers.rows.tolist()]
        scores = [values[: len(best)] for values, best in zip(answers.scores.tolist(), rows, strict=True)]
        return scores, [[self.identifiers.image_ids[row] for row in best] for best in rows]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.identifiers is not None and self.args.should_save:
            self.identifiers.save_pretrained(output_dir or self.args.output_dir)


class StopWhenMemorised(TrainerCallback):
    """Ends training at the first evaluation in which `eval_memorised` reaches `share`, also when it did so before a stop."""

    def __init__(self, share: float):
        self.share = share

    def reached(self, metrics: dict) -> bool:
        return metrics.get("eval_memorised", 0.0) >= self.share

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.reached(metrics or {}):
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != "no"

    def on_train_begin(self, args, state, control, **kwargs):
        if any(self.reached(entry) for entry in state.log_history):
            control.should_training_stop = True


def encoded(output, batch: dict) -> dict:
    """What a forward pass over the batch has encoded, as `generate` takes it in place of the batch: the encoder runs once."""
    mask = getattr(output, "encoder_attention_mask", batch.get("attention_mask"))
    states = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    return {"encoder_outputs": states, "attention_mask": mask}


def labelled_rows(logits: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (R, L, V) and labels (R, L) of the rows that have labels (see `DSICollator`)."""
    labels = inputs["labels"]
    to_pictures = next((len(v) for name, v in inputs.items() if name.startswith("target_")), 0)
    texts = len(inputs["input_ids"]) - to_pictures if "input_ids" in inputs else 0
    rows = torch.cat([logits[:texts], logits[texts + to_pictures :]]) if to_pictures else logits
    return F.log_softmax(rows[:, : labels.shape[1]].float(), dim=-1), labels


def label_loss(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Mean cross entropy over the labels."""
    log_probs, labels = labelled_rows(logits, inputs)
    return F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), ignore_index=-100)


def uniform_loss(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Mean cross entropy against the uniform distribution, over the same places."""
    log_probs, labels = labelled_rows(logits, inputs)
    return -log_probs.mean(-1)[labels != -100].mean()
