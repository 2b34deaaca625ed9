"""VisionGroundedT5: the T5 decoder attends to a picture, or to a sentence, and writes the picture's identifier.

    picture -> ViT -> states -> projection -> layer norm \
                                                          > keys and values of the decoder's cross-attention -> identifier
    caption -> tokenizer -> T5 encoder -----------------> /

After BLIP's image-grounded decoder (2201.12086), in two steps: indexing (picture -> identifier), then retrieval (caption ->
identifier), as in DSI (2202.06991).
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5LayerNorm

from .configuration_vision_grounded_t5 import VisionGroundedT5Config
from .picture_t5 import PictureT5, padded_rows


class VisionLinear(nn.Linear):
    """Of a VisionProjection; what it makes of states of unit variance has a variance of about 1, times `initializer_factor`
    squared. A class of its own, because transformers asks `_init_weights` only for modules that have parameters of their own."""


class VisionProjection(nn.Module):
    """Picture states (P, S, vision width) -> (P, S, d_model) as the decoder attends to them.

    Class token and patches alike. The layer norm is T5's (scale without mean), as the text encoder ends in one: what the
    decoder attends to has one scale, whichever kind of row it comes from and whatever the tower's is.
    """

    def __init__(self, config: VisionGroundedT5Config, width: int):
        super().__init__()
        self.linear = VisionLinear(width, config.d_model) if config.vision_projection else nn.Identity()
        norm = config.vision_layer_norm
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon) if norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer_norm(self.linear(states)))


class VisionGroundedT5(PictureT5):
    config_class = VisionGroundedT5Config
    config: VisionGroundedT5Config

    def __init__(self, config: VisionGroundedT5Config, vision_model=None):
        super().__init__(config, vision_model)
        if not config.vision_projection and self.vision_width != config.d_model:
            raise ValueError(
                f"the vision tower's states have {self.vision_width} channels and T5's decoder attends to {config.d_model}: "
                "--vision_projection true (a learned linear layer between them), or a tower of T5's width"
            )
        self.vision_projection = VisionProjection(config, self.vision_width)
        self.finish_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)  # the layer norm is T5's own
        if isinstance(module, VisionLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_factor * module.in_features**-0.5)
            init.zeros_(module.bias)

    def encode(
        self, input_ids=None, attention_mask=None, pixel_values=None, image_states=None, inputs_embeds=None, **kwargs
    ) -> tuple[BaseModelOutput, torch.Tensor]:
        """As PictureT5's: text rows through T5's encoder, picture rows through the vision tower and its projection."""
        text = text_mask = pictures = picture_mask = None
        if input_ids is not None or inputs_embeds is not None:
            output = self.encoder(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{**kwargs, "return_dict": True},
            )
            text, text_mask = output.last_hidden_state, attention_mask
            if text_mask is None:
                text_mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        states = self.picture_states(pixel_values, image_states)
        if states is not None:
            pictures = self.vision_projection(states)
            picture_mask = torch.ones(pictures.shape[:2], dtype=torch.long, device=pictures.device)
        if text is None and pictures is None:
            raise ValueError(
                "nothing to encode: give input_ids (text rows), pixel_values or image_states (picture rows)"
            )
        if pictures is None:
            return output, text_mask
        return BaseModelOutput(last_hidden_state=padded_rows(text, pictures)), padded_rows(text_mask, picture_mask)


VisionGroundedT5.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["VisionGroundedT5"]
