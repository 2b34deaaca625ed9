"""Random draws that belong to what is drawn: the same ones whoever draws them, and whether or not a run was stopped before."""

import contextlib
import hashlib

import torch


def number_of(*parts) -> int:
    """63 bits of a hash of the parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def drawing_from(seed: int):
    """Within it torch's CPU generator draws from that seed, and goes on as before after it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


class RowDraws(torch.utils.data.Dataset):
    """The rows of a dataset that draws at random, whose draws belong to seed, epoch and row alone.

    A DataLoader's workers, its batches fetched ahead, and the batches that a resumed run passes by would else shift them.
    """

    def __init__(self, rows, seed: int):
        self.rows, self.seed = rows, seed
        self.epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # workers that outlive an epoch see the next one

    def set_epoch(self, epoch: int) -> None:
        """Before rows are asked for; rows that change from epoch to epoch are told, too."""
        self.epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        with drawing_from(number_of(self.seed, self.epoch.item(), row)):
            return self.rows[row]
