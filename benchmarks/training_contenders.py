"""The training loops that benchmarks/training.py compares, and what takes their times."""

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import TrainParams, load_params
from mnist_batchnorm.core.paths import PREPARED, RAW
from mnist_batchnorm.training.devices import DeviceSplit, make_deterministic, resolve_device
from mnist_batchnorm.training.loop import architecture, fit, measure, shuffled

BOTH = "both"  # key of a time that two networks share


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        variants: the networks to train.
        params: how; of the epochs, the first one is not counted.
        device: cpu, or cuda.
        images: to train on, from the first; None for all.
        submitted: when it was, `time.time`.
    """

    variants: tuple[str, ...]
    params: TrainParams
    device: str
    images: int | None
    submitted: float

    @property
    def torch_device(self) -> torch.device:
        """PyTorch's name of the device."""
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


_process: dict[str, Any] = {}  # what the initializer leaves for a process's job


def enter_process(barrier: Barrier, one_core: bool, threads: int | None) -> None:
    """Prepare a new process."""
    _process["barrier"] = barrier
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if threads is not None:
        torch.set_num_threads(threads)


def release_others() -> None:
    """Let nobody wait for this process, which has failed."""
    _process["barrier"].abort()


def synchronize() -> None:
    """Wait for what PyTorch has given the GPU to do."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


class Stopwatch:
    """Takes the times of a process's epochs.

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


@contextlib.contextmanager
def torchvision_sets(job: Job) -> Iterator[list[Any]]:
    """Yield the images to train and to validate on as torchvision's MNIST with ToTensor."""
    from torch.utils.data import Subset
    from torchvision.datasets import MNIST
    from torchvision.transforms import ToTensor

    indices = [load_split(PREPARED / f"{n}.safetensors").index.tolist() for n in ("train", "valid")]
    held_out = load_params().prepare.valid_size > 0  # else the test images are watched
    with TemporaryDirectory() as root:
        raw = Path(root, "MNIST/raw")
        raw.mkdir(parents=True)
        for path in RAW.glob("*-ubyte"):
            (raw / path.name).symlink_to(path.resolve())
        train = MNIST(root, train=True, transform=ToTensor())
        valid = MNIST(root, train=held_out, transform=ToTensor())
        yield [Subset(train, indices[0][: job.images]), Subset(valid, indices[1])]


def run_lecture(job: Job, watch: Stopwatch) -> None:
    """Train as the lecture describes it: a batch is loaded, and both networks take a step."""
    from torch.utils.data import DataLoader

    device, batch_size = job.torch_device, job.params.batch_size
    models = [job.network(variant) for variant in job.variants]
    optimizers = [torch.optim.Adam(model.parameters(), lr=job.params.lr) for model in models]
    with torchvision_sets(job) as (train_set, valid_set):
        train = DataLoader(train_set, batch_size=batch_size, shuffle=True, drop_last=True)
        valid = DataLoader(valid_set, batch_size=batch_size)
        watch.lap()
        for _ in range(job.params.epochs):
            for images, labels in train:
                inputs, targets = images.to(device).flatten(1), labels.to(device)
                for model, optimizer in zip(models, optimizers, strict=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model.train()(inputs), targets).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            training = watch.lap()
            for loader in (train, valid):
                evaluate_loader(models, loader, device)
            watch.record(BOTH, training, watch.lap())


@torch.no_grad()
def evaluate_loader(models: Sequence[nn.Module], loader: Any, device: torch.device) -> list[float]:
    """Return the accuracy of each network on a loader's images, which are loaded once for all."""
    right, seen = [0] * len(models), 0
    for images, labels in loader:
        inputs, targets = images.to(device).flatten(1), labels.to(device)
        seen += len(targets)
        for i, model in enumerate(models):
            right[i] += int((model.eval()(inputs).argmax(dim=1) == targets).sum())
    return [count / seen for count in right]


def plain_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: DeviceSplit, order: Tensor
) -> None:
    """Take one step for each row of ``order``, indices ``[steps, batch]``."""
    model.train()
    for batch in order:
        loss = F.cross_entropy(model(split.inputs[batch]), split.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def run_plain(job: Job, watch: Stopwatch) -> None:
    """Train in the plain loop, one network after another."""
    train, valid = job.splits()
    for variant in job.variants:
        model = job.network(variant)
        optimizer = torch.optim.Adam(model.parameters(), lr=job.params.lr, fused=True)
        generator = torch.Generator().manual_seed(job.params.seed)
        watch.lap()
        for _ in range(job.params.epochs):
            order = shuffled(len(train.labels), job.params.batch_size, generator)
            plain_epoch(model, optimizer, train, order.to(job.torch_device))
            training = watch.lap()
            measure(model, train), measure(model, valid)
            watch.record(variant, training, watch.lap())


def run_engine(job: Job, watch: Stopwatch) -> None:
    """Train with this project's engine, one network after another."""
    make_deterministic()
    train, valid = job.splits()
    for variant in job.variants:
        model = job.network(variant)

        def on_epoch(_: Epoch, model: nn.Module = model, variant: str = variant) -> None:
            epoch = watch.lap()
            measure(model, train), measure(model, valid)  # once more: only the sum is known
            evaluation = watch.lap()
            watch.record(variant, epoch - evaluation, evaluation)

        watch.lap()
        fit(model, train, valid, job.params, on_epoch)


def run_jax(job: Job, watch: Stopwatch) -> None:
    """Train with JAX, one network after another."""
    if importlib.util.find_spec("jax") is None:
        raise UserError("not installed (extra bench)")
    from benchmarks import jax_training

    jax_training.run(job, watch)
