"""A job of benchmarks/training.py, and the stopwatch that measures its epochs."""

import os
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import nn

from mnist_batchnorm.core.params import TrainParams
from mnist_batchnorm.core.paths import PREPARED
from mnist_batchnorm.training.devices import DeviceSplit, resolve_device
from mnist_batchnorm.training.loop import architecture

BOTH = "both"  # key of a time that two networks share


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        variants: the networks to train.
        params: training parameters; the first epoch is not counted.
        device: cpu or cuda.
        images: number of training images; None for all.
        submitted: time of submission, by `time.time`.
    """

    variants: tuple[str, ...]
    params: TrainParams
    device: str
    images: int | None
    submitted: float

    @property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    def splits(self) -> tuple[DeviceSplit, DeviceSplit]:
        """Read the images to train on, and those to validate on."""
        train, valid = (
            DeviceSplit.load(PREPARED / f"{name}.safetensors", self.torch_device)
            for name in ("train", "valid")
        )
        return DeviceSplit(train.inputs[: self.images], train.labels[: self.images]), valid

    def network(self, variant: str) -> nn.Sequential:
        """Make a network with its initial weights."""
        return architecture(variant, self.params).build(self.params.seed).to(self.torch_device)


_process: dict[str, Any] = {}  # set by the initializer of a process


def enter_process(barrier: Barrier, one_core: bool, threads: int | None) -> None:
    """Prepare a new process."""
    _process["barrier"] = barrier
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if threads is not None:
        torch.set_num_threads(threads)


def release_others() -> None:
    """Abort the barrier, after a failure of this process."""
    _process["barrier"].abort()


def synchronize() -> None:
    """Wait until the GPU is idle."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


class Stopwatch:
    """Measures the epochs of a process.

    Attributes:
        epochs: of each network, or of `BOTH`: seconds of training and of evaluation.
        startup: seconds from the job's submission to the first epoch.
    """

    def __init__(self, job: Job) -> None:
        self.epochs: dict[str, list[tuple[float, float]]] = {}
        self.startup: float | None = None
        self._job = job
        self._since = 0.0

    def lap(self) -> float:
        """Return the seconds since the last lap; wait for the GPU first."""
        synchronize()
        if self.startup is None:
            self.startup = time.time() - self._job.submitted
        last, self._since = self._since, time.perf_counter()
        return self._since - last

    def record(self, network: str, training: float, evaluation: float) -> None:
        """Note an epoch; after the first, wait for the row's other process."""
        epochs = self.epochs.setdefault(network, [])
        epochs.append((training, evaluation))
        if len(epochs) == 1:
            _process["barrier"].wait()
        self.lap()
