"""Arguments of run_xmatching.py beside those every training script has."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transformers.utils import is_peft_available

from imagedex.bounds import BATCH, RATE, SHARE, SOME_OR_NONE, Bounds
from imagedex.command_line import argument, read_config
from imagedex.training.arguments import RunArguments


@dataclass
class XMatchingArguments:
    """The dual encoder. What is left out keeps the value of the model's config."""

    _argument_group_name = "dual encoder"
    _bounds = {
        "text_pooling_layers": Bounds(1, 1000),
        "head_hidden_sizes": Bounds(1, 10**6),
        "head_dropout": SHARE,
        "text_head_power": Bounds(0, 100, above=True),
        "vision_head_power": Bounds(0, 100, above=True),
        "projection_dim": Bounds(1, 10**6),
        "loss_margin": Bounds(0, above=True),
        "logit_scale_init": Bounds(0, above=True),
    }

    text_model_name_or_path: str | None = argument("Pretrained text tower, a folder or a Hub id.")
    text_config: str | None = argument("Text tower from scratch: a mapping with model_type (JSON on the command line).")
    text_pooling: Literal["pooler", "first", "mean"] | None = argument(
        "The tower's pooled output, first token, or the mean over tokens."
    )
    text_pooling_layers: int | None = argument("How many of the last layers are concatenated.")
    vision_pooling: Literal["pooler", "first", "mean"] | None = argument(
        "The tower's pooled output, first token, or mean."
    )
    text_head: Literal["mlp", "linear", "none"] | None = argument("Head on the pooled text state.")
    vision_head: Literal["mlp", "linear", "none"] | None = argument("Head on the pooled image state.")
    head_hidden_sizes: list[int] | None = argument("Widths of the hidden layers of an mlp head.")
    head_dropout: float | None = argument("Dropout after each hidden layer of an mlp head, before a linear one.")
    text_head_power: float | None = argument("Power of the pooled text state before its head; 1 leaves it as it is.")
    vision_head_power: float | None = argument(
        "Power of the pooled image state before its head, its sign kept; 0.5 is the square root."
    )
    projection_dim: int | None = argument("Width of the embedding.")
    freeze_text_tower: bool | None = argument(
        "Leave the text tower as it is; by default a pretrained one, while one from scratch is trained."
    )
    freeze_vision_tower: bool | None = argument(
        "Leave the vision tower as it is; by default a pretrained one, while one from scratch is trained."
    )
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
class XMatchingTrainingArguments(RunArguments):
    """What only the dual encoder's training knows."""

    _bounds = {
        "text_learning_rate": RATE,
        "head_start_regularization": Bounds(0, above=True),
        "caption_bank_size": Bounds(0, 10**7),
        "lora_rank": Bounds(1, 10**4),
        "lora_alpha": Bounds(0, above=True),
        "lora_dropout": SHARE,
        "gradient_cache_chunk_size": Bounds(1, BATCH),
        "hardest_warmup_steps": SOME_OR_NONE,
        "kept_views": Bounds(0, 1000),
    }
    _measured = (
        *RunArguments._measured,
        "median_rank",
        *(f"image_to_text_{name}" for name in ("hits@1", "hits@5", "hits@10", "mrr", "median_rank")),
    )

    text_learning_rate: float | None = argument("Learning rate of the text tower; by default learning_rate.")
    head_start: Literal["none", "cca", "ridge"] = argument(
        "Where linear heads on two frozen towers start, from kept states: at random, or in closed form by regularised canonical "
        "correlation (cca) or ridge regression into the sentence space (ridge). --num_train_epochs 0 leaves them there.",
        "none",
    )
    head_start_regularization: float | None = argument(
        "Of the pictures' side, in units of its mean variance: little (0.1) finds trained pictures better, much (10) new ones. "
        "By default what finds held-out training pictures best."
    )
    caption_bank_size: int = argument(
        "Training captions, chosen by hash, whose vectors are kept with the model against hubs; 0: none, search is by cosines "
        "alone.",
        20_000,
    )
    lora_rank: int | None = argument(
        "Fine-tune the frozen towers with LoRA of this rank (pip install 'imagedex[peft]'); saved merged into the model."
    )
    lora_alpha: float | None = argument("LoRA's products count alpha / rank times; by default alpha is twice the rank.")
    lora_dropout: float = argument("Dropout before LoRA's products.", 0.0)
    lora_target_modules: list[str] | None = argument(
        "Last names of the layers that LoRA fine-tunes, such as query value; by default every linear one of a tower."
    )
    gradient_cache_chunk_size: int | None = argument(
        "Rows of a batch that are in memory at once: gradient caching trains with batches of thousands on one device, with "
        "the gradients of the plain step, for one more forward pass."
    )
    hardest_warmup_steps: float = argument(
        "Steps in which hardest_hinge goes from all negatives to the hardest alone; below 1, that share of all steps.",
        0.1,
    )
    kept_views: int = argument(
        "With --keep_states and --image_augmentation: so many augmented views of each picture are kept, and one of them is drawn "
        "each time; 0: pictures are augmented anew, and not kept.",
        0,
    )
    compare_with_model: list[str] | None = argument(
        "Dual encoders as they are (CLIP, SigLIP, an XMatchingModel), folders or Hub ids, that also answer the evaluation "
        "captions, over the same pictures."
    )
    five_fold: bool = argument("Karpathy's 1K protocol: evaluate within each fifth of the gallery, and average.", False)
    shuffle_every_epoch: bool = argument(
        "False: the captions are shuffled once, every epoch has the same batches.", True
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_head_start()
        self.check_lora()
        if isinstance(self.compare_with_model, str):  # from a recipe
            self.compare_with_model = [self.compare_with_model]
        for flag in ("compare_with_baselines", "compare_with_model"):
            if self.five_fold and getattr(self, flag):
                raise ValueError(
                    "--five_fold searches a fifth of the gallery and what it is compared with all of it, so they cannot be "
                    f"compared; leave --five_fold or --{flag} out"
                )
        self.label_names = ["image_ids"]
        if not self.shuffle_every_epoch:
            self.train_sampling_strategy = "sequential"  # of captions that were shuffled once

    def check_lora(self):
        """Raises a `ValueError` for LoRA's arguments out of range, or beside what they cannot go with."""
        if self.lora_dropout == 1:
            raise ValueError("--lora_dropout 1.0: give less than 1, with which nothing would be left")
        if self.lora_rank is None and (self.lora_alpha or self.lora_dropout or self.lora_target_modules):
            raise ValueError(
                "--lora_alpha, --lora_dropout and --lora_target_modules say how --lora_rank trains; give it too"
            )
        if self.lora_rank and self.do_train and self.keep_states:
            raise ValueError(
                "--keep_states keeps what frozen towers give, and with --lora_rank they change: leave one of them out"
            )
        if self.lora_rank and self.do_train and not is_peft_available():
            raise ValueError("--lora_rank needs peft: pip install 'imagedex[peft]'")

    def check_head_start(self) -> None:
        """Raises a `ValueError`."""
        if self.kept_views and not self.keep_states:
            raise ValueError(f"--kept_views is {self.kept_views}; give --keep_states with it")
        if self.head_start_regularization is not None and self.head_start == "none":
            raise ValueError(
                f"--head_start_regularization is {self.head_start_regularization}; give --head_start with it"
            )
        if self.head_start != "none" and self.do_train and not self.keep_states:
            raise ValueError("--head_start needs the states of both towers: freeze both, and give --keep_states true")
