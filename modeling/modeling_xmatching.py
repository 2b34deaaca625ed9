"""XMatchingModel: a sentence vector and an image vector, compared.

    sentence -> text tower -> last k layers concatenated -> pooled -> head -> L2 \
                                                                                 > cosine
    picture  -> vision tower ---------------------------> pooled -> head -> L2 /

The sentence-level form of Vokenization's cross-modal matching (2010.06775) that Maria (2105.13073) retrieves with.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .caption_bank import CaptionBankMixin
from .configuration_xmatching import XMatchingConfig
from .gathering import gather_rows
from .losses import hardest_hinge_loss, hinge_loss, info_nce_loss, paired_hinge_loss, sigmoid_loss
from .retrieval_pipeline import RetrievalPipelineMixin
from .sentence_transformers_files import write_sentence_transformers_files
from .towers import (
    build_tower,
    load_tower,
    pooler_width,
    rest_frozen_parts,
    tower_width,
    trains,
    unsharded,
)
from .two_towers import fill_head, is_two_towers, load_two_towers, own_fields

# CLIP's bound (2103.00020, section 2.5): a sharper softmax makes training unstable. SigLIP's sigmoids have none; its own is 117.
MAX_LOGIT_SCALE = 100.0


@dataclass
class XMatchingOutput(ModelOutput):
    """
    loss (scalar, when `return_loss`): the loss named by `config.loss_type`.
    logits_per_image (image batch, text batch): cosine, times the learned scale and plus the bias where the loss has them.
    logits_per_text (text batch, image batch): its transpose.
    text_embeds (text batch, projection_dim), image_embeds (image batch, projection_dim): L2-normalised.
    text_model_output, vision_model_output: what `get_text_features` and `get_image_features` returned; only where
        `output_hidden_states` or `output_attentions` asks for it, in the call or in the config.
    """

    loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self):
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class HeadLayer(nn.Linear):
    """A layer of a head, and how it starts. Said here and not in `Head`: transformers asks `_init_weights` only for modules that
    have parameters of their own."""

    starts_as_identity = False


class Head(nn.Module):
    """Pooled tower state (B, width) -> embedding (B, projection_dim).

    "mlp": ReLU and dropout after each hidden layer, as in Maria. "linear": dropout, then one layer, which starts as the
    identity where the widths agree, so that a pretrained sentence space is where training starts. "none": the state itself.
    Before all of that a state x becomes sign(x) |x|^power.
    """

    def __init__(
        self, kind: str, width: int, hidden_sizes: list[int], dropout: float, projection_dim: int, power: float = 1.0
    ):
        super().__init__()
        if kind == "none" and width != projection_dim:
            raise ValueError(
                f"without a head the pooled width {width} is the embedding's, but projection_dim is {projection_dim}"
            )
        sizes = {"none": [], "linear": [projection_dim], "mlp": [*hidden_sizes, projection_dim]}[kind]
        self.kind, self.power = kind, power
        self.layers = nn.ModuleList(HeadLayer(n_in, n_out) for n_in, n_out in zip([width, *sizes], sizes, strict=False))
        if kind == "linear":
            self.layers[0].starts_as_identity = width == projection_dim
        self.dropout = nn.Dropout(dropout)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        if self.power != 1:
            pooled = pooled.sign() * pooled.abs().clamp(min=1e-6) ** self.power  # a root is infinitely steep at 0
        if self.kind == "linear":
            pooled = self.dropout(pooled)
        for depth, layer in enumerate(self.layers):
            if depth > 0:
                pooled = self.dropout(F.relu(pooled))
            pooled = layer(pooled)
        return pooled


def embedding(vectors: torch.Tensor, output=None, asked: tuple[str, ...] = ()) -> BaseModelOutputWithPooling:
    """L2-normalised vectors (B, projection_dim) as `pooler_output`, with the tower's last states and what else is asked for."""
    rest = {name: getattr(output, name, None) for name in ("last_hidden_state", *asked)}
    return BaseModelOutputWithPooling(pooler_output=F.normalize(vectors, dim=-1), **rest)


class XMatchingModel(CaptionBankMixin, RetrievalPipelineMixin, PreTrainedModel):
    config_class = XMatchingConfig
    config: XMatchingConfig
    base_model_prefix = "xmatching"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over this very batch; Trainer must not rescale it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: XMatchingConfig, text_model=None, vision_model=None):
        super().__init__(config)
        self.text_model = text_model if text_model is not None else build_tower(config.text_config)
        self.vision_model = vision_model if vision_model is not None else build_tower(config.vision_config)
        # One config object for the tower and for us, so that a change (attention kernel, dtype) reaches both.
        self.config.text_config, self.config.vision_config = self.text_model.config, self.vision_model.config

        layers = getattr(config.text_config, "num_hidden_layers", None)
        if layers is not None and config.text_pooling_layers > layers + 1:
            raise ValueError(
                f"text_pooling_layers={config.text_pooling_layers}, but the text tower has {layers} layers"
            )
        head = (config.head_hidden_sizes, config.head_dropout, config.projection_dim)
        width_of = pooler_width if config.text_pooling == "pooler" else tower_width
        text_width = width_of(self.text_model) * config.text_pooling_layers
        self.text_head = Head(config.text_head, text_width, *head, config.text_head_power)
        self.vision_head = Head(config.vision_head, tower_width(self.vision_model), *head, config.vision_head_power)
        # log of the inverse temperature, and a bias; only where the loss learns them, so that every parameter has a gradient.
        # One element, not a scalar: FSDP2 shards parameters along their first dimension.
        has_scale, has_bias = config.loss_type in ("info_nce", "sigmoid"), config.loss_type == "sigmoid"
        self.logit_scale = nn.Parameter(torch.empty(1)) if has_scale else None
        self.logit_bias = nn.Parameter(torch.empty(1)) if has_bias else None
        self.hardness = 1.0  # of "hardest_hinge"; a trainer's warm-up raises it from 0

        self.post_init()
        self.freeze_towers()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, XMatchingModel):
            if module.logit_scale is not None:
                init.constant_(module.logit_scale, math.log(self.config.logit_scale_init))
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init)
        elif isinstance(module, HeadLayer):  # towers initialise themselves
            if module.starts_as_identity:
                init.eye_(module.weight)
                init.zeros_(module.bias)
            else:  # nn.Linear's own start, as in Maria
                bound = module.in_features**-0.5
                init.uniform_(module.weight, -bound, bound)
                init.uniform_(module.bias, -bound, bound)

    def freeze_towers(self) -> None:
        """Freezes what the config says is frozen. Once, when the model is made: what is unfrozen or added later stays so."""
        for side in ("text", "vision"):
            if getattr(self.config, f"freeze_{side}_tower"):
                self.tower(side).requires_grad_(False)

    def tower(self, side: str) -> PreTrainedModel:
        """Args: side, "text" or "vision"."""
        return {"text": self.text_model, "vision": self.vision_model}[side]

    def is_frozen(self, side: str) -> bool:
        """Whether nothing in the tower trains, so that it gives the same states as long as it lives. Args: as `tower`."""
        return not trains(self.tower(side))

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but what is frozen stays in evaluation mode: no dropout in a frozen tower, no moving statistics
        in a frozen batch norm."""
        super().train(mode)
        for tower in (self.text_model, self.vision_model):
            rest_frozen_parts(tower)
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', which makes parameters anew, all of them trainable: those of frozen towers are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model.freeze_towers()
        model.train(model.training)
        return loaded

    def asked(self, kwargs: dict) -> tuple[str, ...]:
        """Which of "hidden_states" and "attentions" are to be returned: `output_...` in the keywords, else in the config."""
        names, config = ("hidden_states", "attentions"), self.config
        given = {name: kwargs.get(f"output_{name}") for name in names}
        return tuple(n for n in names if (getattr(config, f"output_{n}") if given[n] is None else given[n]))

    def pool_text(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, **kwargs):
        """Tower and pooling: (the tower's output, pooled states (B, k * width) that the head takes)."""
        layers = self.config.text_pooling_layers
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        kwargs |= {f"output_{name}": True for name in self.asked(kwargs)}
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states", False) or layers > 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.text_model)):
            output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states = torch.cat(output.hidden_states[-layers:], -1) if layers > 1 else output.last_hidden_state
        pooled = getattr(output, "pooler_output", None)
        if self.config.text_pooling == "pooler" and pooled is not None:
            return output, pooled
        if self.config.text_pooling != "mean":  # states: (B, T, k * width)
            return output, states[:, 0]
        if attention_mask is None:
            return output, states.mean(1)
        weights = attention_mask.to(states.dtype)[..., None]  # (B, T, 1)
        return output, (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def pool_image(self, pixel_values, **kwargs):
        """Tower and pooling: (the tower's output, pooled states (B, width) that the head takes)."""
        kwargs |= {f"output_{name}": True for name in self.asked(kwargs)}
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.vision_model)):
            output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        states = output.last_hidden_state  # (B, tokens, width), or a feature map (B, width, height, width)
        pooled = getattr(output, "pooler_output", None)
        if self.config.vision_pooling == "mean":
            pooled = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
        elif self.config.vision_pooling == "first" or pooled is None:
            pooled = states[:, 0] if states.ndim == 3 else states.mean((2, 3))
        return output, pooled.flatten(1)

    def get_text_features(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args: input_ids (B, T); attention_mask (B, T), 1 for tokens and 0 for padding, all ones when absent.
        Returns `pooler_output` (B, projection_dim), L2-normalised, and the tower's `last_hidden_state`; with
            `output_hidden_states` or `output_attentions` those, too.
        """
        output, pooled = self.pool_text(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        return embedding(self.text_head(pooled), output, self.asked(kwargs))

    def get_image_features(
        self, pixel_values=None, pixel_attention_mask=None, spatial_shapes=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Args: pixel_values (B, 3, height, width); of a tower that sees patches (SigLIP 2) what its processor gives, with
            pixel_attention_mask and spatial_shapes.
        Returns `pooler_output` (B, projection_dim), L2-normalised, and the tower's `last_hidden_state`; with
            `output_hidden_states` or `output_attentions` those, too.
        """
        patches = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        kwargs |= {name: value for name, value in patches.items() if value is not None}
        output, pooled = self.pool_image(pixel_values, **kwargs)
        return embedding(self.vision_head(pooled), output, self.asked(kwargs))

    def scale(self) -> torch.Tensor | float:
        """The inverse temperature that multiplies cosines; 1 for losses without one."""
        if self.logit_scale is None:
            return 1.0
        scale = unsharded(self.logit_scale).exp()
        return scale.clamp(max=MAX_LOGIT_SCALE) if self.config.loss_type == "info_nce" else scale

    def compute_loss(self, text_embeds, image_embeds, image_ids=None) -> torch.Tensor:
        """The loss of `config.loss_type` over a batch of embeddings (B, D); see `losses.py`."""
        ids = image_ids if self.config.mask_same_image else None
        batch, loss_type = (text_embeds, image_embeds, ids), self.config.loss_type
        hinge = {"margin": self.config.loss_margin, "reduction": self.config.loss_reduction}
        if loss_type == "paired_hinge":
            return paired_hinge_loss(*batch, **hinge)
        if loss_type == "hinge":
            return hinge_loss(*batch, **hinge)
        if loss_type == "hardest_hinge":
            return hardest_hinge_loss(*batch, **hinge, hardness=self.hardness)
        if loss_type == "info_nce":
            return info_nce_loss(*batch, self.scale())
        return sigmoid_loss(*batch, self.scale(), unsharded(self.logit_bias))

    def batch_loss(self, text_embeds, image_embeds, image_ids=None) -> torch.Tensor:
        """`compute_loss` over this process's batch, or over all processes' where negatives are gathered.

        In float32 even under autocast: bfloat16 has three digits of a cosine, which a temperature of 0.01 turns into noise.
        """
        with torch.autocast(text_embeds.device.type, enabled=False):
            text_embeds, image_embeds = text_embeds.float(), image_embeds.float()
            if self.config.negatives == "gathered":
                text_embeds, image_embeds, image_ids = gather_rows(text_embeds, image_embeds, image_ids)
            return self.compute_loss(text_embeds, image_embeds, image_ids)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        image_ids=None,
        text_states=None,
        image_states=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        return_loss=None,
        return_dict=None,
        **kwargs,
    ) -> XMatchingOutput:
        """
        Args:
            input_ids, attention_mask (B, T): captions.
            pixel_values (B, 3, height, width): row i is the picture of caption i.
            pixel_attention_mask, spatial_shapes: what else the processor of a tower that sees patches gives (SigLIP 2).
            image_ids (B,) int64: equal for rows that show the same picture.
            text_states, image_states (B, ...): what `pool_text` and `pool_image` gave before, instead of captions and
                pictures; with a frozen tower they need computing only once.
            return_loss: True for the loss; by default whether `image_ids` are given.

        One side alone gives that side's embeddings.
        """
        text = vision = logits = loss = None
        if text_states is not None:
            text = embedding(self.text_head(text_states))
        elif input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
        if image_states is not None:
            vision = embedding(self.vision_head(image_states))
        elif pixel_values is not None:
            vision = self.get_image_features(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        if text is not None and vision is not None:
            logits = self.scale() * text.pooler_output @ vision.pooler_output.T  # (text batch, image batch)
            logits = logits if self.logit_bias is None else logits + self.logit_bias
            if return_loss or (return_loss is None and image_ids is not None):
                loss = self.batch_loss(text.pooler_output, vision.pooler_output, image_ids)
        output = XMatchingOutput(
            loss=loss,
            logits_per_image=None if logits is None else logits.T,
            logits_per_text=logits,
            text_embeds=None if text is None else text.pooler_output,
            image_embeds=None if vision is None else vision.pooler_output,
            # accelerate copies every tensor of the output to float32 under mixed precision: no more of them than are wanted
            text_model_output=text if self.asked(kwargs) else None,
            vision_model_output=vision if self.asked(kwargs) else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """As transformers'; sentence-transformers opens the folder, too."""
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_sentence_transformers_files(save_directory)

    @classmethod
    def from_text_vision_pretrained(
        cls,
        text_model_name_or_path=None,
        vision_model_name_or_path=None,
        *,
        text_config=None,
        vision_config=None,
        **kwargs,
    ) -> "XMatchingModel":
        """Two towers, each pretrained (a name or a folder) or from scratch (a config), and fresh heads.

        Of a two-tower checkpoint (CLIP, SigLIP) the fitting tower is taken; both towers of one, and the model starts as that
        checkpoint is, see `from_two_towers`. Other keywords are fields of XMatchingConfig.
        """
        if is_two_towers(text_model_name_or_path, vision_model_name_or_path):
            return cls.from_two_towers(load_two_towers(text_model_name_or_path), **kwargs)
        text = (
            load_tower(text_model_name_or_path, "text_config") if text_model_name_or_path else build_tower(text_config)
        )
        if vision_model_name_or_path:
            vision = load_tower(vision_model_name_or_path, "vision_config")
        else:
            vision = build_tower(vision_config)
        config = XMatchingConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), **kwargs)
        return cls(config, text_model=text, vision_model=vision)

    @classmethod
    def from_two_towers(cls, whole: PreTrainedModel, **kwargs) -> "XMatchingModel":
        """A CLIP or SigLIP with its own pooling, projections, scale and bias: the same logits, before anything is trained.

        Keywords are fields of XMatchingConfig, in place of the model's own.
        """
        text, vision, fields = whole.text_model, whole.vision_model, own_fields(whole) | kwargs
        config = XMatchingConfig(text_config=text.config.to_dict(), vision_config=vision.config.to_dict(), **fields)
        model = cls(config, text_model=text, vision_model=vision)
        fill_head(model.text_head, getattr(whole, "text_projection", None))
        fill_head(model.vision_head, getattr(whole, "visual_projection", None))
        return model


XMatchingModel.register_for_auto_class("AutoModel")

__all__ = ["XMatchingModel", "XMatchingOutput"]
