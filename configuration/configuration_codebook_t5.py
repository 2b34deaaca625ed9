"""Configuration of the T5 that reads a picture as words of its own vocabulary (DSI 2202.06991 for pictures)."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, T5Config
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


@strict
class CodebookT5Config(T5Config):
    r"""
    T5Config, and how patch states become words. The defaults are the original's: 32 visual tokens from random patches,
    nearest word by cosine, nothing learned in between.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): any vision tower AutoModel knows, with its `model_type`.
        freeze_vision_tower (`bool`): no gradient, always in evaluation mode. With `quantization="fixed"` the tower is frozen
            whatever is said here: no gradient passes the choice of the nearest word.
        num_visual_tokens (`int`): length of a picture's token sequence, the end-of-sequence token included.
        visual_token_selection (`str`): which patches become tokens; see `modeling/visual_codebook.py`. `"random"` (in
            training drawn anew each time, in evaluation always the same draw), `"even"` (spaced evenly), `"attention"` (those
            the class token attends to most in the last layer) or `"merge"` (runs of patches with the same word count once).
        num_codebook_words (`int`): only token ids below it can be visual tokens, so that tokens added later for identifiers
            never are. Default: `vocab_size` at creation. `codebook_fields(tokenizer)` tells it exactly.
        codebook_special_token_ids (`list[int]`): ids below `num_codebook_words` that are no words. Default: padding,
            end of sequence, and 2 (unknown, in T5's layout).
        quantization (`str`): `"fixed"` (nearest word embedding, as the embeddings were before training) or `"learned"`
            (linear projections of patch states and of words into one space, straight-through estimator and commitment loss).
        codebook_projection_dim (`int`): width of that space. Default: the smaller of T5's and the tower's width.
        commitment_cost (`float`): beta of VQ-VAE (1711.00937).
        codebook_entropy_weight (`float`): weight of the penalty that keeps many words in use (MAGVIT-v2 2310.05737); with 0
            the learned codebook shrinks to a dozen words.
    """

    model_type = "codebook_t5"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}
    keys_to_ignore_at_inference = [
        "past_key_values", "quantizer_loss", "visual_token_ids", "codebook_perplexity", "codebook_usage",
    ]  # fmt: skip

    vision_config: PreTrainedConfig | dict | None = None
    freeze_vision_tower: bool = True
    num_visual_tokens: int = 32
    visual_token_selection: Literal["random", "even", "attention", "merge"] = "random"
    num_codebook_words: int | None = None
    codebook_special_token_ids: list[int] | tuple[int, ...] | None = None
    quantization: Literal["fixed", "learned"] = "fixed"
    codebook_projection_dim: int | None = None
    commitment_cost: float | int = 0.25
    codebook_entropy_weight: float | int = 1.0
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id  # as every T5 checkpoint has it
        if self.num_codebook_words is None:
            self.num_codebook_words = self.vocab_size
        if self.codebook_special_token_ids is None:
            eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
            ids = {self.pad_token_id, *eos, 2} - {None}
            self.codebook_special_token_ids = sorted(i for i in ids if i < self.num_codebook_words)
        self.codebook_special_token_ids = list(self.codebook_special_token_ids)

    def validate_codebook(self):
        """Raises a `ValueError` that names the field, its value and what it may be."""
        if self.num_visual_tokens < 2:
            raise ValueError(f"num_visual_tokens={self.num_visual_tokens}: 2 or more (the last is end-of-sequence)")
        if self.num_codebook_words > self.vocab_size:
            raise ValueError(f"num_codebook_words={self.num_codebook_words}, but the vocabulary has {self.vocab_size}")
        for name in ("commitment_cost", "codebook_entropy_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more")
        if self.codebook_projection_dim is not None and self.quantization == "fixed":
            raise ValueError("codebook_projection_dim is of quantization='learned'; quantization is 'fixed'")

    @staticmethod
    def codebook_fields(tokenizer) -> dict:
        """The fields that say which tokens are words: those that are neither special nor added to the tokenizer."""
        no_words = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        words = set(tokenizer.get_vocab().values()) - no_words
        if not words:
            raise ValueError("the tokenizer has no words: all of its tokens are special or added")
        end = max(words) + 1
        return {
            "num_codebook_words": end,
            "codebook_special_token_ids": sorted(i for i in range(end) if i not in words),
        }


CodebookT5Config.register_for_auto_class()

__all__ = ["CodebookT5Config"]
