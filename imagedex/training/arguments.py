"""Arguments of the training scripts, in groups. TrainingArguments of transformers come beside them."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments


def argument(help: str, default=None, **kwargs):
    """A dataclass field with its help text. A mutable default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


def read_mapping(name: str, value, key: str, example: str):
    """A mapping (from a recipe) or its JSON text (from the command line) that has `key`; None stays None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} is not valid JSON ({error}); give a mapping with its {key}") from None
    if value is not None and (not isinstance(value, dict) or key not in value):
        raise ValueError(f"--{name} must be a mapping with a {key}, for example {example}")
    return value


def read_config(name: str, value):
    """A tower's configuration, a mapping or JSON text."""
    return read_mapping(name, value, "model_type", "{'model_type': 'vit'}")


@dataclass
class CorpusArguments:
    """Which corpus, and what of it is held out."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        "Hub id, built-in name (shape_scenes; nq10k for run_dsi.py), or a folder; its form is recognised and said."
    )
    dataset_config_name: str | None = argument("Configuration of the dataset (for shape_scenes: how many scenes).")
    train_file: str | None = argument("CSV, JSONL or Parquet of pictures and captions to train on.")
    validation_file: str | None = argument("CSV, JSONL or Parquet to evaluate on.")
    image_dir: str | None = argument("Root of the pictures that train_file and validation_file name.")
    visual_genome_dir: str | None = argument("Visual Genome's pictures, for LXMERT's files with sources beside COCO.")
    image_column: str | None = argument("Column with the picture; found by itself when there is one candidate.")
    caption_column: str | None = argument("Column with the caption or the list of captions; found likewise.")
    held_out_captions_per_image: int = argument("Keep this many captions of each picture for evaluation.", 0)
    held_out_images: float = argument("Keep all captions of this fraction of the pictures for evaluation.", 0.0)
    split_seed: int = argument("Seed of the hash that decides what is held out; the same in every script.", 0)
    max_train_samples: int | None = argument("Train on the captions of only this many pictures.")
    max_eval_samples: int | None = argument(
        "Evaluate on the captions of only this many pictures (the gallery stays whole)."
    )
    unreadable_images: Literal["error", "skip"] = argument(
        "A picture that cannot be read: stop, or leave it out and say so.", "error"
    )
    preprocessing_num_workers: int | None = argument("Processes that check, decode and tokenise before training.")
    max_text_length: int = argument("Longest caption in tokens; longer ones are cut, and counted in the log.", 75)
    image_size: int | None = argument(
        "Side in pixels pictures are resized to when the vision tower starts from scratch."
    )
    keep_pixels: bool = argument(
        "Decode and resize every picture once and keep the bytes, instead of each time it is seen.", False
    )
    image_augmentation: Literal["none", "random_resized_crop"] = argument(
        "Training pictures as they are, or a random part (8 to 100 percent of the area), mirrored in half of the cases.",
        "none",
    )

    def __post_init__(self):
        if self.keep_pixels and self.image_augmentation != "none":
            raise ValueError(
                f"--keep_pixels keeps each picture once, so --image_augmentation {self.image_augmentation} cannot cut it "
                "anew each time; give one of the two"
            )


@dataclass
class DataArguments(CorpusArguments):
    """What only the dual encoder can do with a corpus: stream it, and search a part of the gallery."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        "Hub id, built-in name (shape_scenes), or a folder; its form is recognised and said. With --streaming: a folder of "
        "tar shards or a Hub id to train on."
    )
    train_file: str | None = argument(
        "CSV, JSONL or Parquet of pictures and captions to train on. With --streaming: tar shards, as a glob, a URL or "
        "'shards/{00000..00009}.tar'; --dataset_name may then name a corpus to evaluate on."
    )
    eval_gallery: Literal["all", "held_out"] = argument(
        "Search all pictures, or with held_out_images only those.", "all"
    )
    streaming: bool = argument(
        "Train on tar shards in webdataset layout (000000.jpg with 000000.txt, a caption a line, or 000000.json, a caption "
        "or a list of them) as they are read, again and again for --max_steps; nothing is stored.",
        False,
    )
    shuffle_buffer_size: int = argument(
        "With --streaming: captions, with their undecoded pictures, that each process or DataLoader worker holds and draws "
        "from. 0: in the order of the shards.",
        1000,
    )

    def __post_init__(self):
        if self.shuffle_buffer_size < 0:
            raise ValueError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: give 0 or more")
        super().__post_init__()


@dataclass
class ModelArguments:
    """Where the model comes from. Without a name, it is built from towers, each pretrained or from a config."""

    _argument_group_name = "model"

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
class XMatchingArguments:
    """The dual encoder. What is left out keeps the value of the model's config (Maria's, when it is a new model)."""

    _argument_group_name = "dual encoder"

    text_model_name_or_path: str | None = argument("Pretrained text tower, a folder or a Hub id.")
    text_config: str | None = argument("Text tower from scratch: a mapping with model_type (JSON on the command line).")
    text_pooling: Literal["first", "mean"] | None = argument("First token, or the mean over tokens.")
    text_pooling_layers: int | None = argument("How many of the last layers are concatenated.")
    vision_pooling: Literal["pooler", "first", "mean"] | None = argument(
        "The tower's pooled output, first token, or mean."
    )
    text_head: Literal["mlp", "linear", "none"] | None = argument("Head on the pooled text state.")
    vision_head: Literal["mlp", "linear", "none"] | None = argument("Head on the pooled image state.")
    head_hidden_sizes: list[int] | None = argument("Widths of the hidden layers of an mlp head.")
    head_dropout: float | None = argument("Dropout after each hidden layer of an mlp head, before a linear one.")
    projection_dim: int | None = argument("Width of the embedding.")
    freeze_text_tower: bool | None = argument("Leave the text tower as it is.")
    freeze_vision_tower: bool | None = argument("Leave the vision tower as it is.")
    loss_type: Literal["paired_hinge", "hinge", "hardest_hinge", "info_nce", "sigmoid"] | None = argument(
        "Loss, see modeling/losses.py."
    )
    loss_margin: float | None = argument("Margin of the hinge losses, in cosine.")
    loss_reduction: Literal["mean", "sum"] | None = argument("Average or sum of the hinge terms.")
    mask_same_image: bool | None = argument("Captions of the same picture are not each other's negatives.")
    negatives: Literal["local", "gathered"] | None = argument("Negatives from this process, or from all of them.")
    logit_scale_init: float | None = argument("Start of the learned inverse temperature.")
    logit_bias_init: float | None = argument("Start of the learned bias of the sigmoid loss.")

    def __post_init__(self):
        self.text_config = read_config("text_config", self.text_config)

    def config_fields(self) -> dict:
        """The fields of XMatchingConfig that were given."""
        towers = ("text_model_name_or_path", "text_config")
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in towers}


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments plus what every training script here knows."""

    remove_unused_columns: bool = argument("Kept false: the batch is made by our collator.", False)
    vision_learning_rate: float | None = argument("Learning rate of the vision tower; by default learning_rate.")
    keep_states: bool = argument(
        "Run frozen towers once before training and keep what they say of each caption and picture in memory.", False
    )
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

    def __post_init__(self):
        # accelerate starts several CPU processes without telling them so; each would then train alone
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True
        if self.hub_token:  # as an argument it would be pickled into training_args.bin, in plain text
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        super().__post_init__()


@dataclass
class XMatchingTrainingArguments(RunArguments):
    """What only the dual encoder's training knows."""

    text_learning_rate: float | None = argument("Learning rate of the text tower; by default learning_rate.")
    gradient_cache_chunk_size: int | None = argument(
        "Rows of a batch that are in memory at once: gradient caching trains with batches of thousands on one device, with "
        "the gradients of the plain step, for one more forward pass."
    )
    hardest_warmup_steps: float = argument(
        "Steps in which hardest_hinge goes from all negatives to the hardest alone; below 1, that share of all steps.",
        0.1,
    )
    five_fold: bool = argument("Karpathy's 1K protocol: evaluate within each fifth of the gallery, and average.", False)
    shuffle_every_epoch: bool = argument(
        "False: the captions are shuffled once, every epoch has the same batches.", True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_cache_chunk_size is not None and self.gradient_cache_chunk_size < 1:
            raise ValueError(f"--gradient_cache_chunk_size is {self.gradient_cache_chunk_size}; give 1 row or more")
        if self.hardest_warmup_steps < 0:
            raise ValueError(f"--hardest_warmup_steps is {self.hardest_warmup_steps}; give 0 or more")
        if self.five_fold and self.compare_with_baselines:
            raise ValueError(
                "--five_fold searches a fifth of the gallery and the baselines all of it, so they cannot be compared; "
                "leave --five_fold or --compare_with_baselines out"
            )
        self.label_names = ["image_ids"]
        if not self.shuffle_every_epoch:
            self.train_sampling_strategy = "sequential"  # of captions that were shuffled once
