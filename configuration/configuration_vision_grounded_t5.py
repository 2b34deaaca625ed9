"""Configuration of the T5 whose decoder attends to a picture (the image-grounded decoder of BLIP, 2201.12086)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, T5Config
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


@strict
class VisionGroundedT5Config(T5Config):
    r"""
    T5Config, and how a picture's states reach the decoder.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): any vision tower AutoModel knows, with its `model_type`.
        freeze_vision_tower (`bool`): a frozen tower gets no gradient and stays in evaluation mode.
        vision_projection (`bool`): a learned linear layer from the tower's width to `d_model`; it cannot be left out where
            the two differ.
        vision_layer_norm (`bool`): T5's layer norm on what the decoder attends to, as the text encoder ends with one.
    """

    model_type = "vision_grounded_t5"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    vision_config: PreTrainedConfig | dict | None = None
    freeze_vision_tower: bool = True
    vision_projection: bool = True
    vision_layer_norm: bool = True
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id  # as every T5 checkpoint has it


VisionGroundedT5Config.register_for_auto_class()

__all__ = ["VisionGroundedT5Config"]
