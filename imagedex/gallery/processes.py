"""Several processes that encode one gallery, as `accelerate launch` starts them: one looks and writes down, all encode."""

import datetime
import os


class Processes:
    """This process among all; alone, each call gives back what it was given."""

    def __init__(self):
        self.state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            # without `cpu` it does not see the others on a CPU; the others wait while the first reads all files
            self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=7))

    @property
    def share(self) -> tuple[int, int]:
        """This process's number, and how many there are."""
        return (self.state.process_index, self.state.num_processes) if self.state else (0, 1)

    @property
    def is_first(self) -> bool:
        return self.share[0] == 0

    def from_first(self, make):
        """What `make()` gives in the first process, in all. An error there ends all of them."""
        if self.state is None:
            return make()
        from accelerate.utils import broadcast_object_list

        value, error = None, None
        if self.is_first:
            try:
                value = make()
            except Exception as raised:
                error = raised
        value, error = broadcast_object_list([value, error])
        if error is not None:
            raise error
        return value

    def joined(self, own: dict) -> dict:
        """The mappings of all processes as one; all have come this far."""
        if self.state is None:
            return own
        from accelerate.utils import gather_object

        return {key: value for part in gather_object([own]) for key, value in part.items()}
