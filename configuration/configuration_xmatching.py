"""Configuration of the sentence-image dual encoder (Vokenization 2010.06775, its sentence-level form in Maria 2105.13073)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


@strict
class XMatchingConfig(PreTrainedConfig):
    r"""
    The defaults are for two pretrained towers that stay as they are: the mean over the last layer's tokens and the vision
    tower's own pooled output, a linear head on each, L2-normalised embeddings, InfoNCE with negatives from all processes,
    where captions of the same picture are not each other's. Maria's values are in `recipes/coco/xmatching_maria.yaml`.

    Args:
        text_config (`dict` or `PreTrainedConfig`): any text tower AutoModel knows, with its `model_type`.
        vision_config (`dict` or `PreTrainedConfig`): any vision tower AutoModel knows, with its `model_type`.
        text_pooling (`str`): `"pooler"` (the tower's own pooled output where it has one, else the first token), `"first"`
            (first token) or `"mean"` (over the tokens that are not padding).
        text_pooling_layers (`int`): how many of the last layers are concatenated before pooling.
        vision_pooling (`str`): `"pooler"` (the tower's own pooled output where it has one, else the first token),
            `"first"` (first token) or `"mean"` (over tokens or over the feature map).
        text_head, vision_head (`str`): `"mlp"`, `"linear"`, or `"none"` (the pooled state is the embedding).
        head_hidden_sizes (`list[int]`): widths of the hidden layers of the `"mlp"` heads.
        head_dropout (`float`): dropout after each hidden layer of an `"mlp"` head, before the layer of a `"linear"` one.
        text_head_power, vision_head_power (`float`): the pooled state goes into the head as sign(x) |x|^power; 0.5 tames the
            long tails of states that come after a ReLU (Arandjelovic and Zisserman's square root, 10.1109/CVPR.2012.6248018).
        projection_dim (`int`): width of the space in which both sides meet.
        freeze_text_tower, freeze_vision_tower (`bool`): a frozen tower gets no gradient and stays in evaluation mode,
            so neither its weights nor its batch statistics move. Frozen when the model is made: what is unfrozen in it later, or
            added to it (LoRA), trains.
        loss_type (`str`): which function of `modeling/losses.py`.
        loss_margin (`float`): margin of the hinge losses, in units of cosine (VSE++'s is 0.2, Maria's 0.5).
        loss_reduction (`str`): `"mean"` or `"sum"` over the hinge terms (Maria sums).
        mask_same_image (`bool`): captions of the same picture in one batch are not each other's negatives.
        negatives (`str`): with several processes, negatives come from all of them (`"gathered"`) or from a process's own
            batch (`"local"`, as in Maria).
        logit_scale_init (`float`): start of the learned inverse temperature (CLIP's is 1 / 0.07, SigLIP's 10).
        logit_bias_init (`float`): start of the learned bias of the sigmoid loss.
    """

    model_type = "xmatching"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet"),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    text_pooling: Literal["pooler", "first", "mean"] = "mean"
    text_pooling_layers: int = 1
    vision_pooling: Literal["pooler", "first", "mean"] = "pooler"
    text_head: Literal["mlp", "linear", "none"] = "linear"
    vision_head: Literal["mlp", "linear", "none"] = "linear"
    head_hidden_sizes: list[int] | tuple[int, ...] = (1024, 1024)
    head_dropout: float | int = 0.1
    text_head_power: float | int = 1.0
    vision_head_power: float | int = 1.0
    projection_dim: int = 512
    freeze_text_tower: bool = True
    freeze_vision_tower: bool = True
    loss_type: Literal["paired_hinge", "hinge", "hardest_hinge", "info_nce", "sigmoid"] = "info_nce"
    loss_margin: float | int = 0.2
    loss_reduction: Literal["mean", "sum"] = "mean"
    mask_same_image: bool = True
    negatives: Literal["local", "gathered"] = "gathered"
    logit_scale_init: float | int = 1 / 0.07
    logit_bias_init: float | int = -10.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.head_hidden_sizes = list(self.head_hidden_sizes)

    def validate_ranges(self):
        """Raises a `ValueError` that names the field, its value and what it may be."""
        if self.text_pooling_layers < 1:
            raise ValueError(f"text_pooling_layers={self.text_pooling_layers}: pool 1 layer or more")
        if self.text_pooling == "pooler" and self.text_pooling_layers > 1:
            raise ValueError(
                f"text_pooling_layers={self.text_pooling_layers}: the tower's own pooled output (text_pooling='pooler') is of "
                "its last layer alone; give 1, or pool the first token or the mean"
            )
        for name in ("text_head_power", "vision_head_power"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name}={getattr(self, name)}: the power must be above 0, 1 leaves the states as they are"
                )
        if self.loss_margin <= 0:
            raise ValueError(f"loss_margin={self.loss_margin}: the margin must be above 0")
        if self.logit_scale_init <= 0:
            raise ValueError(f"logit_scale_init={self.logit_scale_init}: an inverse temperature must be above 0")


XMatchingConfig.register_for_auto_class()

__all__ = ["XMatchingConfig"]
