"""The interface of the trainers: `fused.FusedTrainer` and those of `autograd`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Progress = Callable[[int], None]  # called with the number of steps since its last call


class Trainer(Protocol):
    """Trains R networks with cross-entropy and Adam."""

    tensors: dict[str, Tensor]  # everything that a step changes, by name

    def run(self, order: Tensor, progress: Progress = ...) -> Tensor:
        """Take one step per batch of ``order``, rows of the data, int64 ``[R, steps, batch]``.

        Returns the mean cross-entropy (nats) of each batch before its step, ``[R, steps]``.
        """
        ...


def ignore_progress(_: int) -> None: ...
