"""CodebookT5: a picture becomes words of T5's vocabulary, and T5 writes the picture's identifier.

    picture -> ViT -> patch states -> nearest word embeddings -> visual tokens \
                                                                                > T5 encoder -> T5 decoder -> identifier
    caption -> tokenizer ------------------------------------> tokens          /

A DSI (2202.06991) for pictures. One encoder reads both; the only thing that tells a picture from a sentence is its words.
"""

from dataclasses import dataclass

import torch
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .configuration_codebook_t5 import CodebookT5Config
from .picture_t5 import PictureT5, PictureT5Output, padded_rows
from .towers import unsharded
from .visual_codebook import (
    CodebookProjection,
    FixedCodebook,
    LearnedCodebook,
    codebook_statistics,
    even_positions,
    merged_positions,
    random_positions,
)


@dataclass
class CodebookT5Output(PictureT5Output):
    """
    As PictureT5Output; `loss` includes `quantizer_loss`. Where the batch has picture rows:

    visual_token_ids (P, num_visual_tokens or fewer): what T5 read, padded.
    quantizer_loss (scalar, `quantization="learned"` only): codebook, commitment and entropy losses, all 0 or more.
    num_words (scalar): visual tokens without end-of-sequence, over which the first two are means.
    codebook_perplexity, codebook_usage (scalars): of this batch's visual tokens; see `codebook_statistics`.
    """

    quantizer_loss: torch.FloatTensor | None = None
    num_words: torch.LongTensor | None = None
    visual_token_ids: torch.LongTensor | None = None
    codebook_perplexity: torch.FloatTensor | None = None
    codebook_usage: torch.FloatTensor | None = None


@dataclass
class CodebookEncoderOutput(BaseModelOutput):
    """As BaseModelOutput, with what the codebook said about the picture rows."""

    quantizer_loss: torch.FloatTensor | None = None
    visual_token_ids: torch.LongTensor | None = None


class CodebookT5(PictureT5):
    config_class = CodebookT5Config
    config: CodebookT5Config
    _keep_in_fp32_modules_strict = ["codebook.words"]
    # a model without them, saved by an older version or a plain T5, starts with its embeddings as they are: see `tie_weights`
    _keys_to_ignore_on_load_missing = [r"codebook\.words"]

    def __init__(self, config: CodebookT5Config, vision_model=None):
        super().__init__(config, vision_model)
        if config.quantization == "learned":
            width = config.codebook_projection_dim or min(self.vision_width, config.d_model)
            self.codebook = LearnedCodebook(
                self.vision_width, config.d_model, width, config.commitment_cost, config.codebook_entropy_weight
            )
        elif self.vision_width != config.d_model:
            raise ValueError(
                f"the vision tower's states have {self.vision_width} channels and T5's word embeddings {config.d_model}, so "
                "they cannot be compared: take towers of one width, or --quantization learned with "
                "--codebook_projection_dim, a space in which both meet"
            )
        else:
            self.codebook = FixedCodebook(config.num_codebook_words, config.d_model)
        if config.visual_token_selection == "attention":
            if not self.prefix_tokens:
                raise ValueError(
                    f"visual_token_selection='attention' needs a class token, which a {self.vision_model.config.model_type} "
                    "has not: take 'even', 'random' or 'merge'"
                )
            self.vision_model.set_attn_implementation("eager")  # the others do not give their weights away
        self.finish_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CodebookProjection):
            init.orthogonal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, FixedCodebook):
            init.copy_(module.words, self.words())  # of new embeddings; they come first

    def tie_weights(self, missing_keys=None, **kwargs):
        """As transformers'. It ends all loading: only then are the embeddings there under whichever name they were saved."""
        super().tie_weights(missing_keys=missing_keys, **kwargs)
        if "codebook.words" in (missing_keys or ()):
            self.take_codebook()

    @torch.no_grad()
    def take_codebook(self):
        """The fixed codebook becomes the word embeddings as they are now. For a start that writes these after the model was
        made; later on, pictures would become other words than T5 has learned to read."""
        if isinstance(self.codebook, FixedCodebook):
            self.codebook.words.copy_(self.words())

    def freeze_tower(self) -> None:
        """As PictureT5's; a fixed codebook passes no gradient, so that the tower before it is always frozen."""
        super().freeze_tower()
        if self.config.quantization == "fixed":
            self.vision_model.requires_grad_(False)

    def words(self) -> torch.Tensor:
        """(num_codebook_words, d_model) embeddings, as they are now, of the words that a patch may become."""
        return unsharded(self.shared.weight)[: self.config.num_codebook_words]

    def vision_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As PictureT5's. With `visual_token_selection="attention"`, prefix and only the patches that become tokens: what
        the class token attends to cannot be told from the last states any more. (P, prefix + up to N - 1, vision width)"""
        if self.config.visual_token_selection != "attention":
            return super().vision_states(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            output = self.vision_model(pixel_values=pixel_values, output_attentions=True, return_dict=True)
        prefix, states = self.prefix_tokens, output.last_hidden_state
        attention = output.attentions[-1][:, :, 0, prefix:].mean(1)  # (P, patches), the class token's, all heads
        count = min(self.config.num_visual_tokens - 1, attention.shape[1])
        chosen = attention.topk(count).indices.sort(1).values + prefix  # in raster order
        chosen = chosen[..., None].expand(-1, -1, states.shape[-1])
        return torch.cat([states[:, :prefix], states.gather(1, chosen)], dim=1)

    def kept_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures -> `image_states`. With `quantization="fixed"` a patch is its word for good, so words are all that is worth
        keeping: (P, patches) int32, where `vision_states` has 4 * width bytes a patch."""
        states = self.vision_states(pixel_values)
        if not isinstance(self.codebook, FixedCodebook):
            return states
        return self.nearest(states[:, self.prefix_tokens :]).int()

    def kept_settings(self) -> list:
        config, settings = self.config, ["states"]
        if isinstance(self.codebook, FixedCodebook):
            settings = ["words", config.codebook_special_token_ids, unsharded(self.codebook.words)]
        if config.visual_token_selection == "attention":
            settings += ["attended to", config.num_visual_tokens - 1]
        return settings

    def picture_states(self, pixel_values=None, image_states=None) -> torch.Tensor | None:
        """As PictureT5's; of `image_states` that are integers, words (P, patches), these themselves."""
        if image_states is None or image_states.is_floating_point() or pixel_values is not None:
            return super().picture_states(pixel_values, image_states)
        if image_states.ndim != 2 or not isinstance(self.codebook, FixedCodebook):
            raise ValueError(
                f"image_states of shape {tuple(image_states.shape)} and type {image_states.dtype}: integers are the words of "
                "patches, (pictures, patches), which stand for a picture with quantization='fixed' alone; see kept_states()"
            )
        return image_states.long()

    def selected(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches that become visual tokens, by `config.visual_token_selection`: at most N - 1 of them.

        Where a picture has fewer patches (or, with "merge", fewer runs), all are taken and its token sequence is shorter.

        Args: patches (P, patches, vision width) states, or (P, patches) words.
        Returns those selected (P, K, vision width) or (P, K), in raster order, and which of them count (P, K) bool.
        """
        rows, total = patches.shape[:2]
        count, selection = self.config.num_visual_tokens - 1, self.config.visual_token_selection
        if selection == "attention" and total > count:
            raise ValueError(
                f"{total} patches in image_states: with visual_token_selection='attention' they have to come from this "
                "model's vision_states() or kept_states(), which keep the patches attended to"
            )
        if selection == "merge":
            positions, kept = merged_positions(patches if patches.ndim == 2 else self.nearest(patches), count)
        else:
            if selection == "random":
                positions = random_positions(rows, total, count, self.training, patches.device)
            else:
                positions = even_positions(total, count, patches.device).expand(rows, -1)
            kept = torch.ones_like(positions, dtype=torch.bool)
        return torch.take_along_dim(patches, positions if patches.ndim == 2 else positions[..., None], dim=1), kept

    def nearest(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch states (..., vision width) -> (...) token ids of the nearest words."""
        special = self.config.codebook_special_token_ids
        if isinstance(self.codebook, FixedCodebook):
            return self.codebook(patches, special)
        return self.codebook.nearest(patches, self.words(), special)

    def quantize(self, states: torch.Tensor):
        """Picture states (P, prefix + patches, vision width), or words (P, patches), -> visual tokens.

        Returns ids (P, K + 1), each row's end-of-sequence after its last word and padding behind it; their mask; and, where
        the codebook is learned, the straight-through path (P, K + 1, d_model) and the quantizer loss, else None, None.
        """
        patches, kept = self.selected(states if states.ndim == 2 else states[:, self.prefix_tokens :])
        path = loss = None
        if patches.ndim == 2:
            ids = patches
        elif isinstance(self.codebook, FixedCodebook):
            ids = self.nearest(patches)
        else:
            special = self.config.codebook_special_token_ids
            ids, path, loss = self.codebook(patches, self.words(), special, kept)
            path = torch.nn.functional.pad(path * kept[..., None], (0, 0, 0, 1))
        eos = self.config.eos_token_id
        ids = torch.nn.functional.pad(
            ids.masked_fill(~kept, self.config.pad_token_id), (0, 1), value=self.config.pad_token_id
        )
        lengths = kept.sum(1, keepdim=True)  # (P, 1), words alone
        ids = ids.scatter(1, lengths, eos[0] if isinstance(eos, list) else eos)
        mask = torch.arange(ids.shape[1], device=ids.device)[None, :] <= lengths
        return ids, mask.long(), path, loss

    def visual_tokens(self, pixel_values=None, image_states=None) -> torch.Tensor:
        """(P, num_visual_tokens or fewer) token ids of pictures, the last one end-of-sequence (before padding)."""
        with torch.no_grad():
            return self.quantize(self.picture_states(pixel_values, image_states))[0]

    def picture_labels(self, target_pixel_values=None, target_image_states=None) -> torch.Tensor:
        with torch.no_grad():
            ids, mask, _, _ = self.quantize(self.picture_states(target_pixel_values, target_image_states))
        return ids.masked_fill(mask == 0, -100)

    def encode(
        self, input_ids=None, attention_mask=None, pixel_values=None, image_states=None, inputs_embeds=None, **kwargs
    ) -> tuple[CodebookEncoderOutput, torch.Tensor]:
        """As PictureT5's; `image_states` may be words (P, patches), see `kept_states`. Sentences and pictures go through T5's
        encoder one after the other: sentences are short, and padded to a picture's tokens they would cost twice the time.
        Where there are both, states of inner layers are not returned.
        """
        embeds = inputs_embeds if input_ids is None else self.shared(input_ids)  # (T, S, d_model)
        states = self.picture_states(pixel_values, image_states)
        inputs, ids, loss = [], None, None
        if embeds is not None:
            if attention_mask is None:
                attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            inputs.append((embeds, attention_mask))
        if states is not None:
            ids, mask, path, loss = self.quantize(states)
            visual = self.shared(ids)  # (P, N, d_model)
            inputs.append((visual if path is None else visual + path, mask))
        if not inputs:
            raise ValueError(
                "nothing to encode: give input_ids (text rows), pixel_values or image_states (picture rows)"
            )
        outputs = [
            self.encoder(inputs_embeds=rows, attention_mask=mask, **{**kwargs, "return_dict": True})
            for rows, mask in inputs
        ]
        output = outputs[0]
        if len(outputs) == 2:
            output = {"last_hidden_state": padded_rows(*(output.last_hidden_state for output in outputs))}
        attention_mask = padded_rows(*(mask for _, mask in inputs))
        return CodebookEncoderOutput(**output, visual_token_ids=ids, quantizer_loss=loss), attention_mask

    def finished(self, output: PictureT5Output, encoder_outputs) -> CodebookT5Output:
        ids = getattr(encoder_outputs, "visual_token_ids", None)
        quantizer_loss = getattr(encoder_outputs, "quantizer_loss", None)
        output = CodebookT5Output(**output)
        if quantizer_loss is not None:
            output.quantizer_loss = quantizer_loss
            if output.loss is not None:
                output.loss = output.loss + quantizer_loss
        if ids is not None:
            words, special = self.config.num_codebook_words, self.config.codebook_special_token_ids
            output.visual_token_ids = ids
            output.num_words = (ids != self.config.pad_token_id).sum() - len(ids)
            output.codebook_perplexity, output.codebook_usage = codebook_statistics(ids, words, special)
        return output


CodebookT5.register_for_auto_class("AutoModelForSeq2SeqLM")

__all__ = ["CodebookT5", "CodebookT5Output"]
