"""TODO."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Progress = Callable[[int], None]


class Trainer(Protocol):
    """Takes steps with cross-entropy and Adam; see `FusedTrainer`, the fast one."""

    tensors: dict[str, Tensor]

    def run(self, order: Tensor, progress: Progress) -> Tensor:
        """Take a step for each batch of ``order``, int64 ``[R, steps, batch]``."""
        ...
