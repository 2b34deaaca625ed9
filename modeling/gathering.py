"""Embeddings of every process, with gradients: so that the negatives of a batch come from all ranks."""

import torch
from torch import distributed


class GatherRows(torch.autograd.Function):
    """(B, D) here -> (world size x B, D) everywhere, ranks in order. The same B on every rank.

    Each rank computes the loss of the whole batch, so the gradient of this rank's rows is the sum of what all ranks hold
    for them: `all_reduce`, then the own slice. DDP then averages over ranks, and parameters get exactly the gradient that
    one process with the whole batch would give. (`accelerate.gather` has no such backward: gradients come out wrong.)
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_rows(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Each tensor's rows from all processes; the tensors themselves where there is one process."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return tensors
    return tuple(None if tensor is None else GatherRows.apply(tensor) for tensor in tensors)
