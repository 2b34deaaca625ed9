"""What CodebookT5 and VisionGroundedT5 share: a T5 that takes text rows and picture rows, and writes identifiers.

A batch has text rows (`input_ids`), picture rows (`pixel_values`, or `image_states` that were computed before) or both: then text
rows come first and picture rows after them, in what is encoded, in the labels and in what is generated. `image_states` are what
`kept_states` gives, or `vision_states`.
"""

from dataclasses import dataclass

import torch
from torch import distributed
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from .retrieval_pipeline import RetrievalPipelineMixin
from .retrieving import RetrieveMixin
from .towers import as_sequence, build_tower, load_tower, prefix_tokens, rest_frozen_parts, tower_width, trains

PICTURE_INPUTS = ("pixel_values", "image_states")
TARGETS = ("labels", "target_pixel_values", "target_image_states")


def padded_rows(*tensors: torch.Tensor | None, value: float = 0) -> torch.Tensor:
    """Tensors (rows, length, ...) below each other, padded at the end to the longest; None and rowless ones left out."""
    tensors = [tensor for tensor in tensors if tensor is not None and len(tensor)]
    longest = max(tensor.shape[1] for tensor in tensors)
    padded = []
    for tensor in tensors:
        after = [0, 0] * (tensor.ndim - 2) + [0, longest - tensor.shape[1]]
        padded.append(F.pad(tensor, after, value=value))
    return torch.cat(padded)


@dataclass
class PictureT5Output(Seq2SeqLMOutput):
    """As Seq2SeqLMOutput, with where the decoder may attend in `encoder_last_hidden_state`: encoder_attention_mask (rows, S); and
    over how many tokens the cross-entropy is a mean: num_labels (scalar)."""

    encoder_attention_mask: torch.LongTensor | None = None
    num_labels: torch.LongTensor | None = None


class PictureT5(RetrieveMixin, RetrievalPipelineMixin, T5ForConditionalGeneration):
    """A T5 with a vision tower. Weights are named as T5's, so a T5 checkpoint loads into it; `vision_model.` comes on top.

    A subclass says how picture rows are encoded (`encode`) and ends its `__init__` with `finish_init()`.
    """

    accepts_loss_kwargs = False  # the loss is a mean over this very batch; Trainer must not rescale it
    input_modalities = ("image", "text")

    def __init__(self, config, vision_model=None):
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else build_tower(config.vision_config)
        # One config object for the tower and for us, so that a change (attention kernel, dtype) reaches both.
        self.config.vision_config = self.vision_model.config
        self.vision_width, self.prefix_tokens = tower_width(self.vision_model), prefix_tokens(self.vision_model)

    def finish_init(self):
        """What comes after all modules exist: initial weights, frozen parts."""
        self.post_init()
        self.freeze_tower()
        self.train(self.training)

    def freeze_tower(self) -> None:
        """Freezes the vision tower where the config says so. Once, when the model is made: what is unfrozen or added later
        stays so."""
        if self.config.freeze_vision_tower:
            self.vision_model.requires_grad_(False)

    @property
    def vision_is_frozen(self) -> bool:
        """Whether nothing in the vision tower trains, so that it gives the same states as long as it lives."""
        return not trains(self.vision_model)

    def train(self, mode: bool = True):
        """As `nn.Module.train`, but what is frozen of the vision tower stays in evaluation mode: no dropout where nothing
        trains, no moving statistics in a frozen batch norm."""
        super().train(mode)
        rest_frozen_parts(self.vision_model)
        return self

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', which makes parameters anew, all of them trainable: those of a frozen tower are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model.freeze_tower()
        model.train(model.training)
        return loaded

    def vision_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (P, 3, height, width) -> the tower's last states (P, prefix + patches, vision width).

        They can be kept and given as `image_states` in place of the pictures: a frozen tower then runs once per picture.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            return as_sequence(self.vision_model(pixel_values=pixel_values, return_dict=True).last_hidden_state)

    def kept_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (P, 3, height, width) -> what is worth keeping of them where the tower is frozen: `image_states`."""
        return self.vision_states(pixel_values)

    def kept_settings(self) -> list:
        """What decides, beside the vision tower and the picture, what `kept_states` gives; JSON values and tensors."""
        return ["all states"]

    def picture_states(self, pixel_values=None, image_states=None) -> torch.Tensor | None:
        """(P, prefix + patches, vision width) of whichever is given, None of neither."""
        if pixel_values is not None and image_states is not None:
            raise ValueError("give pixel_values or image_states, not both")
        if image_states is None:
            return None if pixel_values is None else self.vision_states(pixel_values)
        if image_states.ndim != 3 or image_states.shape[-1] != self.vision_width:
            raise ValueError(
                f"image_states of shape {tuple(image_states.shape)}: this model's vision tower gives "
                f"(pictures, states, {self.vision_width}); see vision_states()"
            )
        return image_states.to(next(self.vision_model.parameters()).dtype)

    def encode(
        self, input_ids=None, attention_mask=None, pixel_values=None, image_states=None, inputs_embeds=None, **kwargs
    ) -> tuple[BaseModelOutput, torch.Tensor]:
        """What the decoder attends to, and where.

        Args:
            input_ids (T, S) or inputs_embeds (T, S, d_model), attention_mask (T, S): text rows.
            pixel_values (P, 3, height, width) or image_states (P, prefix + patches, vision width): picture rows.

        Returns an output with `last_hidden_state` (T + P, longest, d_model), text rows first, and its mask (T + P, longest).
        """
        raise NotImplementedError

    def picture_labels(self, target_pixel_values=None, target_image_states=None) -> torch.Tensor:
        """(R, L) labels that stand for pictures as targets."""
        raise ValueError(
            f"{type(self).__name__} cannot write pictures, only identifiers: leave target_pixel_values out "
            "(indexing strategy inputs2targets); CodebookT5 can"
        )

    def all_labels(self, labels, target_pixel_values, target_image_states, text_rows: int, rows: int):
        """Labels of all rows (rows, L), -100 ignored: those given, and the target pictures' behind the other text rows'."""
        if target_pixel_values is not None or target_image_states is not None:
            pictures = self.picture_labels(target_pixel_values, target_image_states)
            given = 0 if labels is None else len(labels)
            if len(pictures) > text_rows or given + len(pictures) != rows:
                raise ValueError(
                    f"{len(pictures)} target pictures and {given} rows of labels for {text_rows} text rows and "
                    f"{rows - text_rows} picture rows: the last text rows have the target pictures, the other rows labels"
                )
            first = text_rows - len(pictures)
            before, after = (None, None) if labels is None else (labels[:first], labels[first:])
            labels = padded_rows(before, pictures, after, value=-100)
        if labels is not None and len(labels) != rows:
            raise ValueError(
                f"{len(labels)} rows of labels for {rows} rows of input: text rows first, then picture rows"
            )
        return labels

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        image_states=None,
        target_pixel_values=None,
        target_image_states=None,
        encoder_outputs=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ) -> PictureT5Output:
        """
        Args:
            input_ids, attention_mask, pixel_values, image_states: as `encode` takes them.
            target_pixel_values (R, 3, height, width) or target_image_states (R, prefix + patches, vision width): CodebookT5
                only. What the last R text rows have to write are these pictures' visual tokens.
            encoder_outputs, attention_mask: what `encode` gave before, in place of all these.
            labels (rows, L): text rows, then picture rows, without the rows that have a target picture; -100 is ignored.

        The loss is the cross-entropy in nats, averaged over the tokens of all rows, plus what `added_loss` says.
        """
        if encoder_outputs is None:
            encoder_outputs, attention_mask = self.encode(
                input_ids, attention_mask, pixel_values, image_states, inputs_embeds, **kwargs
            )
        if decoder_input_ids is not None and (target_pixel_values is not None or target_image_states is not None):
            raise ValueError("target pictures bring their own decoder_input_ids; leave them out")
        text = input_ids if input_ids is not None else inputs_embeds
        text_rows = 0 if text is None else len(text)
        labels = self.all_labels(labels, target_pixel_values, target_image_states, text_rows, len(encoder_outputs[0]))
        output = super().forward(
            attention_mask=attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        num_labels = None if labels is None else (labels != -100).sum()
        output = PictureT5Output(**output, encoder_attention_mask=attention_mask, num_labels=num_labels)
        output = self.finished(output, encoder_outputs)
        if output.loss is not None and self.training and distributed.is_available() and distributed.is_initialized():
            output.loss = self.with_every_gradient(output.loss)
        return output

    def with_every_gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, with 0 added from every trained parameter, under activation checkpointing: DDP then looks for
        none without a gradient and fails, and a batch of sentences alone leaves the tower's, one of pictures alone may leave
        the encoder's. (Parameters that FSDP2 has in parts need it not.)"""
        if not self.is_activation_checkpointing:
            return loss
        trained = (p for p in self.parameters() if p.requires_grad and not hasattr(p, "full_tensor"))
        return loss + 0 * sum(parameter.flatten()[0] for parameter in trained)

    def finished(self, output: PictureT5Output, encoder_outputs) -> PictureT5Output:
        """The output with what a subclass adds to the loss and reports."""
        return output

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """As transformers' `generate`, for text rows and picture rows.

        Stock T5 ignores `pixel_values` without a word; here everything is encoded first and given on as `encoder_outputs`.
        Labels and target pictures, which Seq2SeqTrainer passes along, are ignored.
        """
        for name in TARGETS:
            kwargs.pop(name, None)
        pictures = {name: kwargs.pop(name, None) for name in PICTURE_INPUTS}
        if kwargs.get("encoder_outputs") is None:
            input_ids = kwargs.pop("input_ids", None)
            text = {
                "input_ids": inputs if input_ids is None else input_ids,
                "attention_mask": kwargs.pop("attention_mask", None),
                "inputs_embeds": kwargs.pop("inputs_embeds", None),
            }
            encoded, kwargs["attention_mask"] = self.encode(**text, **pictures)
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
            inputs = None
        return super().generate(inputs, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As transformers'; AutoModel finds the class too (`register_for_auto_class` takes one Auto class only)."""
        module = type(self).__module__.split(".")[-1]
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**auto_map, "AutoModel": f"{module}.{type(self).__name__}"}
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_t5_vision_pretrained(
        cls, t5_name_or_path=None, vision_name_or_path=None, *, t5_config=None, vision_config=None, **config_fields
    ):
        """T5 and a vision tower, each pretrained (a name or a folder) or from scratch (a config or a mapping of its fields).

        Args: config_fields, other fields of this model's config. Weights are float32 whatever the checkpoints have.
        Raises a `ValueError` when a side is given twice or not at all, or when the checkpoint is no T5.
        """
        for side, name, config in (
            ("T5", t5_name_or_path, t5_config),
            ("vision tower", vision_name_or_path, vision_config),
        ):
            if (name is None) == (config is None):
                raise ValueError(f"the {side} comes from a pretrained model or from a config: give one of the two")
        vision = None
        if vision_name_or_path is not None:
            vision = load_tower(vision_name_or_path, "vision_config")
            vision_config = vision.config
        if t5_name_or_path is not None:
            t5_config = AutoConfig.from_pretrained(t5_name_or_path, trust_remote_code=False)
            if not isinstance(t5_config, T5Config):
                raise ValueError(f"{t5_name_or_path} is a {t5_config.model_type} model; a T5 is needed")
        fields = t5_config.to_dict() if isinstance(t5_config, PreTrainedConfig) else dict(t5_config)
        for name in ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "_name_or_path"):
            fields.pop(name, None)
        if isinstance(vision_config, PreTrainedConfig):
            vision_config = vision_config.to_dict()
        config = cls.config_class(**fields | config_fields, vision_config=vision_config)
        if t5_name_or_path is None:
            return cls(config, vision_model=vision)
        # T5's own loading decides what is tied (in v1.1 the output layer is not); the vision tower is filled in after it.
        model = cls.from_pretrained(t5_name_or_path, config=config, dtype=torch.float32)
        if vision is not None:
            model.vision_model.load_state_dict(vision.state_dict())
        return model
