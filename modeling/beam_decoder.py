"""The decoder of a T5 over all beams of a query at once.

The beams of a query are positions over one copy of the encoder's keys and values. Of themselves, beams share prefixes: what a
position has written (its keys and values) stays where it is, and a beam is a list of the positions it came by. So no cache is
ever reordered.

Modules are called, not their weights: adapters (LoRA) and quantised layers count.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5ForConditionalGeneration


class BeamDecoder:
    """Decodes B queries, each with R beams, step by step; R may be another at every step.

    Args:
        model: a T5, in evaluation mode.
        states: (B, S, d_model) what its encoder gave. mask: (B, S), 0 where the decoder must not look; None: everywhere.
        positions: the most beams x steps of one query.
    """

    def __init__(
        self, model: T5ForConditionalGeneration, states: torch.Tensor, mask: torch.Tensor | None, positions: int
    ):
        self.stack, self.config = model.decoder, model.config
        self.rows, self.positions, self.used = len(states), positions, 0
        attentions = [block.layer[1].EncDecAttention for block in self.stack.block]
        self.encoded = [(self.heads(own.k(states)), self.heads(own.v(states))) for own in attentions]  # (B, H, S, d_kv)
        self.mask = None
        if mask is not None:
            dtype = self.encoded[0][0].dtype
            self.mask = torch.where(mask.bool(), 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None]  # (B, 1, 1, S)
        self.written: list[torch.Tensor] = []  # a layer: (2, B * positions, H * d_kv), keys and values of all positions
        # (B, R, t) positions that each beam came by
        self.ways = torch.empty(self.rows, 1, 0, dtype=torch.int64, device=states.device)

    def heads(self, states: torch.Tensor) -> torch.Tensor:
        """(M, T, H * d_kv) -> (M, H, T, d_kv)"""
        return states.unflatten(-1, (-1, self.config.d_kv)).transpose(1, 2)

    def __call__(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """One pass.

        Args:
            tokens: (B, R, L) what each beam has written since the last pass, L = 1 unless more is known already.
            parents: (B, R) which beam of the last pass each one goes on from.

        Returns: (B, R, L, d_model) the last states, as the output layer takes them.
        """
        rows, beams, length = tokens.shape
        past = self.ways.shape[2]
        own = self.used + torch.arange(tokens.numel(), device=tokens.device).view_as(tokens)
        self.ways = torch.cat([self.ways.gather(1, parents[..., None].expand(-1, -1, past)), own], dim=2)
        self.used += tokens.numel()
        bias = self.position_bias(length, past)
        states = self.stack.embed_tokens(tokens.flatten(1))  # (B, R * L, d_model)
        for number, block in enumerate(self.stack.block):
            states = bounded(states + self.among_beams(number, block.layer[0], states, bias))
            states = bounded(states + self.to_encoded(number, block.layer[1], states))
            states = bounded(block.layer[2](states))
        states = self.stack.final_layer_norm(states)
        if self.config.scale_decoder_outputs:
            states = states * self.config.d_model**-0.5
        return states.view(rows, beams, length, -1)

    def position_bias(self, length: int, past: int) -> torch.Tensor:
        """(1, H, L, past + L) of the last L positions of a way to all of it; no position sees a later one."""
        attention = self.stack.block[0].layer[0].SelfAttention
        bias = attention.compute_bias(length, past + length, past_seen_tokens=past)
        later = torch.ones(length, past + length, dtype=torch.bool, device=bias.device).triu(past + 1)
        return bias.masked_fill(later, -torch.inf)

    def among_beams(self, number: int, layer: nn.Module, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attention of each beam to the positions it came by: (B, R * L, d_model) -> the same."""
        attention, normed = layer.SelfAttention, layer.layer_norm(states)
        rows, beams, total = self.ways.shape
        length = bias.shape[2]
        both = torch.stack([attention.k(normed), attention.v(normed)]).flatten(1, 2)  # (2, B * R * L, H * d_kv)
        if number == len(self.written):
            self.written.append(both.new_empty(2, self.rows * self.positions, both.shape[2]))
        self.written[number][:, self.used - both.shape[1] : self.used] = both
        keys, values = (
            self.heads(kept.index_select(0, self.ways.flatten()).view(rows * beams, total, -1))
            for kept in self.written[number]
        )
        query = self.heads(attention.q(normed).view(rows * beams, length, -1))
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.to(query.dtype), scale=1.0)
        return attention.o(seen.transpose(1, 2).reshape(rows, beams * length, -1))

    def to_encoded(self, number: int, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Attention of all beams to the encoder's one copy: (B, R * L, d_model) -> the same."""
        attention = layer.EncDecAttention
        query = self.heads(attention.q(layer.layer_norm(states)))
        seen = F.scaled_dot_product_attention(query, *self.encoded[number], attn_mask=self.mask, scale=1.0)
        return attention.o(seen.transpose(1, 2).flatten(2))


def bounded(states: torch.Tensor) -> torch.Tensor:
    """As T5 itself does: in float16, infinity becomes the largest number."""
    if states.dtype != torch.float16:
        return states
    most = torch.finfo(torch.float16).max - 1000
    return states.clamp(-most, most)
