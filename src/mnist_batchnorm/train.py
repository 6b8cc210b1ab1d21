"""Stage train: one network, seeded and deterministic, its data on the device as tensors."""

import csv
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

from mnist_batchnorm.dataset import CLASSES, SIDE, load_split, network_input
from mnist_batchnorm.errors import CheckFailedError, UserError
from mnist_batchnorm.files import digest, write_json, write_text
from mnist_batchnorm.frozen import statistics_untouched
from mnist_batchnorm.layout import MODELS, PREPARED, REPORTS, VARIANTS
from mnist_batchnorm.model import Architecture, Checkpoint, save_checkpoint

if TYPE_CHECKING:
    from mnist_batchnorm.params import TrainParams

EVALUATION_BATCH = 10_000  # images; bounds memory, no effect on the statistics
PROGRESS_STEPS = 50  # between looks at the loss: each look waits for a GPU


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


def make_deterministic() -> None:
    """Make the same seed give the same weights, bit for bit, on the same kind of machine."""
    # cuBLAS needs it set before its first call:
    # https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
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


def batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield one epoch's shuffled batches as int64 ``[batch_size]`` indices, the remainder dropped.

    The order comes from a CPU generator, so it is the same on every device and, from the same
    seed, for both networks.
    """
    order = torch.randperm(n, generator=generator)
    yield from order[: n - n % batch_size].view(-1, batch_size)


def fit(
    model: nn.Module,
    train: DeviceSplit,
    valid: DeviceSplit,
    params: "TrainParams",
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> list[Epoch]:
    """Train with cross-entropy and Adam (Kingma & Ba 2015) and return the learning curve.

    Args:
        model: on the splits' device; trained in place and left in eval mode.
        train: what to learn from; it needs at least one whole batch.
        valid: what to watch.
        params: epochs, batch size, step size and the seed of the batches' order.
        on_epoch: called with each epoch's row as the epoch ends.

    Raises:
        CheckFailedError: The loss is no longer finite.
        UserError: There are fewer training images than one batch.
    """
    steps = len(train.labels) // params.batch_size
    if steps == 0:
        raise UserError(
            f"params.yaml: train.batch_size: {params.batch_size} is more than the "
            f"{len(train.labels)} training images"
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=params.lr, fused=True)
    generator = torch.Generator().manual_seed(params.seed)
    curve: list[Epoch] = []
    with tqdm(total=params.epochs * steps, unit="step", disable=None) as progress:
        for number in range(1, params.epochs + 1):
            model.train()
            for step, batch in enumerate(batches(len(train.labels), params.batch_size, generator)):
                index = batch.to(train.labels.device)
                logits, labels = model(train.inputs[index]), train.labels[index]
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if not progress.disable and step % PROGRESS_STEPS == 0:
                    progress.set_description(f"epoch {number}/{params.epochs}")
                    right = (logits.argmax(dim=1) == labels).float().mean()
                    progress.set_postfix(
                        loss=f"{loss.item():.3f}", accuracy=f"{right.item():.2f}", refresh=False
                    )
                progress.update()
            epoch = Epoch(number, *measure(model, train), *measure(model, valid))
            if not math.isfinite(epoch.train_loss + epoch.valid_loss):
                raise CheckFailedError(
                    f"the loss is no longer finite after epoch {number} "
                    f"(lr {params.lr}): lower train.lr in params.yaml"
                )
            tqdm.write(
                f"epoch {number:>{len(str(params.epochs))}}/{params.epochs}"
                f"  train loss {epoch.train_loss:.4f} accuracy {epoch.train_accuracy:.4f}"
                f"  valid loss {epoch.valid_loss:.4f} accuracy {epoch.valid_accuracy:.4f}",
                file=sys.stderr,
            )
            curve.append(epoch)
            on_epoch(epoch)
    model.eval()
    return curve


def write_curve(path: Path, curve: list[Epoch]) -> None:
    """Write the learning curve as CSV, one row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in curve)
    write_text(path, text.getvalue())


def architecture(variant: str, params: "TrainParams") -> Architecture:
    """Return the network that ``variant`` and the parameters mean."""
    return Architecture(
        widths=(SIDE * SIDE, *params.hidden, CLASSES),
        batch_norm=variant == "bn",
        bn_momentum=params.bn_momentum,
        bn_eps=params.bn_eps,
    )


@click.command()
@click.argument("variant", type=click.Choice(VARIANTS))
def command(variant: str) -> None:
    """Train one network; write its weights, learning curve and last epoch's metrics."""
    from mnist_batchnorm.params import load_params
    from mnist_batchnorm.tracking import live_run

    params = load_params().train
    device = resolve_device(params.device)
    make_deterministic()
    click.echo(f"training {variant} on {describe_device(device)}", err=True)

    train_file, valid_file = PREPARED / "train.safetensors", PREPARED / "valid.safetensors"
    train, valid = (DeviceSplit.load(path, device) for path in (train_file, valid_file))
    network = architecture(variant, params)
    model = network.build(params.seed).to(device)
    with live_run(variant, device=str(device)) as run:
        curve = fit(model, train, valid, params, on_epoch=run.log_epoch)

    provenance = {
        "variant": variant,
        "train_sha256": digest(train_file),
        "params": params.model_dump(mode="json", exclude={"device"}),  # auto or cpu: the same
        "device": device.type,
    }
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_checkpoint(MODELS / f"{variant}.safetensors", Checkpoint(network, state, provenance))
    write_curve(REPORTS / f"curves/{variant}.csv", curve)
    last = {"device": device.type, **asdict(curve[-1])}
    write_json(REPORTS / f"metrics/train-{variant}.json", last)


def describe_device(device: torch.device) -> str:
    """Name a device for people: ``cpu`` or ``cuda:0 (NVIDIA …)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
