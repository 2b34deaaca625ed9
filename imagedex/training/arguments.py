"""Arguments of every training script: where the model comes from, and how it is trained."""

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments

from imagedex.bounds import BATCH, COUNT, RATE, SEED, SHARE, SOME_OR_NONE, WORKERS, Bounds
from imagedex.checkpoints import one_line
from imagedex.command_line import argument, read_config, read_mapping
from imagedex.training.argument_checks import ADAPTIVE, check_packages, read_mappings


@dataclass
class ModelArguments:
    """Where the model comes from. Without a name, it is built from towers, each pretrained or from a config."""

    _argument_group_name = "model"
    _bounds = {"tokenizer_vocab_size": Bounds(1, 10**7)}

    model_name_or_path: str | None = argument("A trained model to go on from, a folder or a Hub id.")
    config_name: str | None = argument("A model config to start from scratch with, a folder or a Hub id.")
    tokenizer_name: str | None = argument("Tokenizer; by default the text tower's, or one trained on the captions.")
    tokenizer_vocab_size: int = argument("Vocabulary of a tokenizer trained on the captions.", 4000)
    vision_model_name_or_path: str | None = argument("Pretrained vision tower, a folder or a Hub id.")
    vision_config: str | None = argument(
        "Vision tower from scratch: a mapping with model_type (JSON on the command line)."
    )
    image_processor_name: str | None = argument("Image processor; by default the vision tower's.")
    image_processor_config: str | None = argument(
        "Image processor of your own: a mapping with size (JSON on the command line); crop_size, resample, image_mean, "
        "image_std and the like as in CLIPImageProcessor, whose values fill what is left out."
    )

    def __post_init__(self):
        self.vision_config = read_config("vision_config", self.vision_config)
        self.image_processor_config = read_mapping(
            "image_processor_config", self.image_processor_config, "size", "{'size': {'shortest_edge': 256}}"
        )


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments plus what every training script here knows."""

    _bounds = {
        "per_device_train_batch_size": Bounds(1, BATCH),
        "per_device_eval_batch_size": Bounds(1, BATCH),
        "gradient_accumulation_steps": Bounds(1, BATCH),
        "num_train_epochs": Bounds(0, 10**9),
        "max_steps": Bounds(-1, 10**12),
        "learning_rate": RATE,
        "vision_learning_rate": RATE,
        "weight_decay": RATE,
        "adam_beta1": SHARE,
        "adam_beta2": SHARE,
        "adam_epsilon": SOME_OR_NONE,
        "max_grad_norm": Bounds(0, math.inf),
        "label_smoothing_factor": SHARE,
        "warmup_steps": Bounds(0, 10**12),
        "torch_empty_cache_steps": COUNT,
        "logging_steps": Bounds(0, above=True),
        "eval_steps": Bounds(0, above=True),
        "save_steps": Bounds(0, above=True),
        "eval_delay": SOME_OR_NONE,
        "eval_accumulation_steps": COUNT,
        "save_total_limit": COUNT,
        "seed": SEED,
        "data_seed": SEED,
        "dataloader_num_workers": Bounds(0, WORKERS),
        "dataloader_prefetch_factor": Bounds(1, 10**4),
        "ddp_bucket_cap_mb": Bounds(1, 10**6),
        "ddp_timeout": Bounds(1, 10**6),
    }

    remove_unused_columns: bool = argument("Kept false: the batch is made by our collator.", False)
    vision_learning_rate: float | None = argument(
        "Learning rate of the vision tower, and of vision_grounded_t5's projection behind it; by default learning_rate."
    )
    keep_states: bool = argument(
        "Run frozen towers once before training and keep their outputs for each caption and picture on disk, for this run and "
        "later ones.",
        False,
    )
    keep_dir: str | None = argument(
        "Folder of what is kept; by default IMAGEDEX_KEEP_DIR, or imagedex/kept in the user's cache. `imagedex clear-kept` "
        "empties it."
    )
    do_train: bool = argument("Train the model.", False)
    do_eval: bool = argument("Evaluate it on what is held out; after the training, and at each --eval_strategy.", False)
    do_predict: bool = argument("Write what it finds for each held-out sentence to rankings.jsonl.", False)
    push_to_hub: bool = argument("Upload the output folder to the Hub, see --hub_strategy.", False)
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = argument(
        "With --push_to_hub: when to push. By default once, when the figures are known; the others as in TrainingArguments.",
        "end",
    )
    compare_with_baselines: bool = argument(
        "Also answer the evaluation captions with BM25 and with mean caption vectors, from the training captions.",
        False,
    )
    baseline_text_encoder: str | None = argument(
        "Encoder of the caption vectors; by default the pretrained text tower."
    )

    # figures of an evaluation during training, by which a best model can be told
    _measured = ("hits@1", "hits@5", "hits@10", "mrr", "loss")

    def __post_init__(self):
        if self.output_dir == "":
            raise ValueError("--output_dir is needed: the folder for what is trained and measured")
        read_mappings(self)
        check_packages(self)
        # accelerate starts several CPU processes without telling them so; each would then train alone
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.hub_token:  # as an argument it would be pickled into training_args.bin, in plain text
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        try:
            super().__post_init__()
        except (ValueError, TypeError):
            raise
        except Exception as error:  # what it finds wrong with the arguments comes in every kind
            raise ValueError(f"the Trainer does not take these arguments: {one_line(error)}") from error
        self.follow_the_figure()
        # without a device there is nothing to pin for, and torch says so in every loader
        self.dataloader_pin_memory &= torch.accelerator.is_available()

    def follow_the_figure(self) -> None:
        """transformers takes a figure without "loss" in its name for one that grows, and schedules that follow it for one that
        falls; neither is always so."""
        if self.metric_for_best_model and self.metric_for_best_model.endswith("median_rank"):
            self.greater_is_better = False
        if self.lr_scheduler_type in ADAPTIVE and self.greater_is_better:
            self.lr_scheduler_kwargs = {"mode": "max"} | (self.lr_scheduler_kwargs or {})
