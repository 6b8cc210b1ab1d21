"""The training loop: epochs over data that lies on the device as tensors."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mnist_batchnorm.dataset import CLASSES, SIDE, load_split, network_input
from mnist_batchnorm.engine import CHUNK, FusedTrainer, blocks_of
from mnist_batchnorm.errors import CheckFailedError, UserError
from mnist_batchnorm.frozen import statistics_untouched
from mnist_batchnorm.model import Architecture

if TYPE_CHECKING:
    from mnist_batchnorm.params import TrainParams
    from mnist_batchnorm.resume import Unfinished

EVALUATION_BATCH = 10_000  # images; bounds memory, no effect on the statistics

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve: means over a whole split, measured in eval mode."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


@dataclass(frozen=True)
class DeviceSplit:
    """A split as the loop wants it, on the device.

    Attributes:
        inputs: float32 ``[n, 784]``, pixel / 255.
        labels: int64 ``[n]``.
    """

    inputs: Tensor
    labels: Tensor

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "DeviceSplit":
        """Read a prepared split onto the device."""
        split = load_split(path)
        inputs = torch.from_numpy(network_input(split.images))
        labels = torch.from_numpy(split.labels.astype("int64"))
        return cls(inputs.to(device), labels.to(device))


def resolve_device(name: str) -> torch.device:
    """Turn ``train.device`` into a device that exists; ``auto`` prefers a CUDA GPU.

    Raises:
        UserError: A GPU was named and there is none such.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"params.yaml: train.device: {name}: this PyTorch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()} CUDA GPUs; use auto or cpu"
        )
    return device


def describe_device(device: torch.device) -> str:
    """Name a device for people: ``cpu`` or ``cuda:0 (NVIDIA …)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def make_deterministic() -> None:
    """Make the same seed give the same weights, bit for bit, on the same kind of machine."""
    # cuBLAS needs it set before its first call:
    # https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # torch.use_deterministic_algorithms(True), but without 1.4 s for importing a compiler
    torch.set_deterministic_debug_mode("error")
    # NaN into memory that is written next anyway
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)  # these layers are too small to share out, and sums keep one order


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


class Trainer(Protocol):
    """Takes steps with cross-entropy and Adam; see `FusedTrainer`, the fast one."""

    tensors: dict[str, Tensor]

    def run(self, order: Tensor, progress: Progress) -> Tensor:
        """Take a step for each batch of ``order``, int64 ``[R, steps, batch]``."""
        ...


class AutogradTrainer:
    """Any network, by autograd and `torch.optim.Adam`: what the fast step is held to."""

    def __init__(self, model: nn.Module, data: DeviceSplit, lr: float) -> None:
        self._model, self._data = model, data
        self._optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, parameter in model.named_parameters():
            # as Adam itself would in its first step; here for a checkpoint to fill
            state = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            self._optimizer.state[parameter] = state
            self.tensors |= {f"{name}.{key}": tensor for key, tensor in state.items()}

    def run(self, order: Tensor, progress: Progress = lambda _: None) -> Tensor:
        """Take a step for each batch; see `FusedTrainer.run`."""
        (batches,) = order.to(self._data.labels.device)
        self._model.train()
        losses = []
        for number, batch in enumerate(batches, start=1):
            loss = F.cross_entropy(self._model(self._data.inputs[batch]), self._data.labels[batch])
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            losses.append(loss.detach())
            if number % CHUNK == 0 or number == len(batches):
                progress((number - 1) % CHUNK + 1)
        return torch.stack(losses)[None]


class OneByOne:
    """Replicas of a network that the engine does not know, one after another."""

    def __init__(self, models: Sequence[nn.Module], data: DeviceSplit, lr: float) -> None:
        self._trainers = [AutogradTrainer(model, data, lr) for model in models]
        self.tensors = {
            f"{replica}.{name}": tensor
            for replica, trainer in enumerate(self._trainers)
            for name, tensor in trainer.tensors.items()
        }

    def run(self, order: Tensor, progress: Progress = lambda _: None) -> Tensor:
        """Take a step for each batch; see `FusedTrainer.run`."""
        *others, last = zip(self._trainers, order[:, None], strict=True)
        losses = [trainer.run(batches) for trainer, batches in others]
        trainer, batches = last
        return torch.cat([*losses, trainer.run(batches, progress)])


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
