"""The training loop: epochs over data that is on the device as tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.network.frozen import statistics_untouched
from mnist_batchnorm.network.model import Architecture
from mnist_batchnorm.training.autograd import AutogradTrainer, SequentialTrainer
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.fused import FusedTrainer, fusible_blocks
from mnist_batchnorm.training.trainer import Progress, Trainer, ignore_progress

if TYPE_CHECKING:
    from mnist_batchnorm.core.params import TrainParams
    from mnist_batchnorm.training.checkpoint import TrainingCheckpoint

EVALUATION_BATCH_SIZE = 10_000  # images; bounds memory


@torch.inference_mode()
def measure(model: nn.Module, split: DeviceSplit) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and accuracy (0 to 1) over a split, in eval mode.

    Restores the mode of every module, and checks that no running statistic has changed.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    loss = 0.0
    correct = 0
    with statistics_untouched(model):
        for start in range(0, len(split.labels), EVALUATION_BATCH_SIZE):
            labels = split.labels[start : start + EVALUATION_BATCH_SIZE]
            logits = model(split.inputs[start : start + EVALUATION_BATCH_SIZE])
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
    for module, training in modes.items():
        module.training = training
    return loss / len(split.labels), correct / len(split.labels)


def make_trainer(
    models: Sequence[nn.Module], data: DeviceSplit, batch_size: int, lr: float
) -> Trainer:
    """Choose the fused step for networks that it supports, autograd for any other."""
    if fusible_blocks(models[0]) is None:
        click.echo(
            "the fused step does not support this network: it is trained by the plain loop",
            err=True,
        )
        if len(models) == 1:
            return AutogradTrainer(models[0], data, lr)
        return SequentialTrainer(models, data, lr)
    return FusedTrainer(models, data.inputs, data.labels, batch_size, lr)


def seed_global_generator(seed: int, epoch: int) -> None:
    """Seed the generator of layers such as dropout, so that a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + epoch) % 2**63)


def shuffled_batches(n: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return one epoch's batches, int64 ``[steps, batch_size]``; the remainder is dropped.

    The generator is on the CPU, so the order is the same on every device and for both networks.
    """
    order = torch.randperm(n, generator=generator)
    return order[: n - n % batch_size].view(-1, batch_size)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of whole batches among ``n`` images; none is a UserError."""
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
    progress: Progress = ignore_progress,
    checkpoint: "TrainingCheckpoint | None" = None,
) -> list[Epoch]:
    """Train with cross-entropy and Adam (Kingma & Ba 2015) and return the learning curve.

    Args:
        model: on the splits' device; trained in place and left in eval mode.
        train: training data, at least one whole batch.
        valid: validation data.
        params: epochs, batch size, learning rate and the seed of the batches' order.
        on_epoch: called with each epoch's row, first with those restored from the checkpoint.
        progress: called with the number of steps since its last call.
        checkpoint: saves the state after each epoch; training resumes from it if it exists.

    Raises:
        CheckFailedError: The loss is no longer finite.
        UserError: There are fewer training images than one batch.
    """

    def measure_epoch() -> dict[str, float]:
        train_loss, train_accuracy = measure(model, train)
        valid_loss, valid_accuracy = measure(model, valid)
        return asdict(Epoch(0, train_loss, train_accuracy, valid_loss, valid_accuracy))

    curve: list[Epoch] = []
    rows = run_epochs([model], [params.seed], train, params, measure_epoch, progress, checkpoint)
    for row in rows:
        curve.append(Epoch(**row))
        on_epoch(curve[-1])
    model.eval()
    return curve


def run_epochs(
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    train: DeviceSplit,
    params: "TrainParams",
    measure_epoch: Callable[[], dict[str, Any]],
    progress: Progress,
    checkpoint: "TrainingCheckpoint | None",
) -> Iterator[dict[str, Any]]:
    """Train replicas, each with batches in the order of its seed; yield a row after each epoch.

    A row is the number of the epoch and what `measure_epoch` returns. The first rows are those
    restored from the checkpoint.
    """
    steps = steps_per_epoch(len(train.labels), params.batch_size)
    trainer = make_trainer(models, train, params.batch_size, params.lr)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = checkpoint.restore(trainer.tensors, generators) if checkpoint else []
    for row in tuple(rows):
        progress(steps)
        yield row
    for number in range(len(rows) + 1, params.epochs + 1):
        order = [shuffled_batches(len(train.labels), params.batch_size, g) for g in generators]
        seed_global_generator(seeds[0], number)
        losses = trainer.run(torch.stack(order), progress)
        require_finite(losses, number, params.lr)
        row = measure_epoch() | {"epoch": number}
        if not np.isfinite(np.hstack(list(row.values()))).all():
            raise divergence_error(f"after epoch {number}", params.lr)
        rows.append(row)
        if checkpoint:
            checkpoint.save(trainer.tensors, generators, rows)
        yield row


def require_finite(losses: Tensor, epoch: int, lr: float) -> None:
    """Raise a CheckFailedError that names the first step of ``losses [R, steps]`` not finite."""
    broken = (~losses.isfinite()).any(0).nonzero()
    if len(broken):
        step, steps = int(broken[0]) + 1, losses.shape[1]
        raise divergence_error(f"in epoch {epoch}, step {step:,} of {steps:,}", lr)


def divergence_error(when: str, lr: float) -> CheckFailedError:
    """Return the error for a loss that is NaN or infinite."""
    return CheckFailedError(
        f"the loss is no longer finite {when} (lr {lr}): lower train.lr in params.yaml"
    )


def architecture(variant: str, params: "TrainParams") -> Architecture:
    """Return the architecture of ``bn`` or ``plain`` with these parameters."""
    return Architecture(
        widths=(SIDE * SIDE, *params.hidden, CLASSES),
        batch_norm=variant == "bn",
        bn_momentum=params.bn_momentum,
        bn_eps=params.bn_eps,
    )
