"""How much of its codebook a CodebookT5 uses while it is trained and evaluated, for the logs."""

import torch

NAMES = ("codebook_perplexity", "codebook_usage")


class CodebookUse:
    """Means over batches of the figures in `CodebookT5Output`, of training and of evaluation apart.

    Sums stay on the device until a figure is asked for, so no step waits for them. Batches without pictures do not count.
    """

    def __init__(self, model):
        self.sums: dict[bool, torch.Tensor] = {}  # training? -> (3,) float32: both sums and the number of batches
        model.register_forward_hook(self.take)

    def take(self, model, inputs, output) -> None:
        values = [getattr(output, name, None) for name in NAMES]
        if values[0] is not None:
            values = torch.stack([*(value.detach().float() for value in values), torch.ones_like(values[0]).float()])
            known = self.sums.get(model.training)
            self.sums[model.training] = values if known is None else known + values

    def figures(self, training: bool, accelerator) -> dict[str, float]:
        """By name, of all processes since they were asked last; {} where no batch had pictures. Every process has to call it."""
        sums = self.sums.pop(training, torch.zeros(len(NAMES) + 1, device=accelerator.device))
        *sums, batches = accelerator.reduce(sums, reduction="sum").tolist()
        return {name: value / batches for name, value in zip(NAMES, sums, strict=True)} if batches else {}
