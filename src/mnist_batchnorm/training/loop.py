"""The training loop: epochs over data that lies on the device as tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.network.frozen import statistics_untouched
from mnist_batchnorm.network.model import Architecture
from mnist_batchnorm.training.autograd import AutogradTrainer, OneByOne
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.fused import FusedTrainer, blocks_of
from mnist_batchnorm.training.trainer import Progress, Trainer

if TYPE_CHECKING:
    from mnist_batchnorm.core.params import TrainParams
    from mnist_batchnorm.training.checkpoint import Unfinished

EVALUATION_BATCH = 10_000  # images; bounds memory, no effect on the statistics


@torch.inference_mode()
def measure(model: nn.Module, split: DeviceSplit) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and accuracy (0 to 1) over a split, in eval mode.

    Every module is in its mode of before when this returns, and the running statistics have not
    moved: that is checked, not assumed.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    loss = 0.0
    correct = 0
    with statistics_untouched(model):
        for start in range(0, len(split.labels), EVALUATION_BATCH):
            labels = split.labels[start : start + EVALUATION_BATCH]
            logits = model(split.inputs[start : start + EVALUATION_BATCH])
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
    for module, training in modes.items():
        module.training = training
    return loss / len(split.labels), correct / len(split.labels)


def trainer_of(
    models: Sequence[nn.Module], data: DeviceSplit, batch_size: int, lr: float
) -> Trainer:
    """Choose the fast step for networks that it is proven for, autograd for any other."""
    if blocks_of(models[0]) is None:
        click.echo("the fast step does not know this network: it takes the plain loop", err=True)
        one = len(models) == 1
        return AutogradTrainer(models[0], data, lr) if one else OneByOne(models, data, lr)
    return FusedTrainer(models, data.inputs, data.labels, batch_size, lr)


def seed_layers(seed: int, epoch: int) -> None:
    """Seed what layers draw in an epoch, as dropout does, so that a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)


def shuffled(n: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return one epoch's batches, int64 ``[steps, batch_size]``, the remainder dropped.

    The order comes from a CPU generator, so it is the same on every device and, from the same
    seed, for both networks.
    """
    order = torch.randperm(n, generator=generator)
    return order[: n - n % batch_size].view(-1, batch_size)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return how many whole batches ``n`` training images make.

    Raises:
        UserError: Not one.
    """
    if n < batch_size:
        raise UserError(
            f"params.yaml: train.batch_size: {batch_size} is more than the {n} training images"
        )
    return n // batch_size


def fit(
    model: nn.Module,
    train: DeviceSplit,
    valid: DeviceSplit,
    params: "TrainParams",
    on_epoch: Callable[[Epoch], None] = lambda _: None,
    progress: Progress = lambda _: None,
    unfinished: "Unfinished | None" = None,
) -> list[Epoch]:
    """Train with cross-entropy and Adam (Kingma & Ba 2015) and return the learning curve.

    Args:
        model: on the splits' device; trained in place and left in eval mode.
        train: what to learn from; it needs at least one whole batch.
        valid: what to watch.
        params: epochs, batch size, step size and the seed of the batches' order.
        on_epoch: called with each epoch's row as the epoch ends, those of `unfinished` first.
        progress: called with the number of steps taken since it was last called.
        unfinished: where the state after each epoch is kept, and taken up if it is there.

    Raises:
        CheckFailedError: The loss is no longer finite.
        UserError: There are fewer training images than one batch.
    """
    steps = steps_per_epoch(len(train.labels), params.batch_size)
    trainer = trainer_of([model], train, params.batch_size, params.lr)
    generator = torch.Generator().manual_seed(params.seed)
    rows = unfinished.restore(trainer.tensors, [generator]) if unfinished else []
    curve = [Epoch(**row) for row in rows]
    for epoch in curve:
        progress(steps)
        on_epoch(epoch)
    for number in range(len(curve) + 1, params.epochs + 1):
        order = shuffled(len(train.labels), params.batch_size, generator)
        seed_layers(params.seed, number)
        losses = trainer.run(order[None], progress)
        require_finite(losses, number, params.lr)
        epoch = Epoch(number, *measure(model, train), *measure(model, valid))
        if not math.isfinite(epoch.train_loss + epoch.valid_loss):
            raise diverged(f"after epoch {number}", params.lr)
        curve.append(epoch)
        if unfinished:
            unfinished.keep(trainer.tensors, [generator], [asdict(row) for row in curve])
        on_epoch(epoch)
    model.eval()
    return curve


def require_finite(losses: Tensor, epoch: int, lr: float) -> None:
    """Find the first step of an epoch whose loss is no number.

    Args:
        losses: of each replica and step, ``[R, steps]``.
        epoch: which one, from 1.
        lr: Adam's step size.

    Raises:
        CheckFailedError: There is such a step.
    """
    broken = (~losses.isfinite()).any(0).nonzero()
    if len(broken):
        step, steps = int(broken[0]) + 1, losses.shape[1]
        raise diverged(f"in epoch {epoch}, step {step:,} of {steps:,}", lr)


def diverged(when: str, lr: float) -> CheckFailedError:
    """Make the error for a loss that is NaN or infinite."""
    return CheckFailedError(
        f"the loss is no longer finite {when} (lr {lr}): lower train.lr in params.yaml"
    )


def architecture(variant: str, params: "TrainParams") -> Architecture:
    """Return the network that ``variant`` and the parameters mean."""
    return Architecture(
        widths=(SIDE * SIDE, *params.hidden, CLASSES),
        batch_norm=variant == "bn",
        bn_momentum=params.bn_momentum,
        bn_eps=params.bn_eps,
    )
