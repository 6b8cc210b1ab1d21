"""The training loops that benchmarks/training.py compares."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.training_job import BOTH, Job, Stopwatch
from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import PREPARED, RAW
from mnist_batchnorm.training.devices import DeviceSplit, make_deterministic
from mnist_batchnorm.training.loop import fit, measure, shuffled_batches


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
            order = shuffled_batches(len(train.labels), job.params.batch_size, generator)
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
