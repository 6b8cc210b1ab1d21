"""TODO."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from mnist_batchnorm.artifacts.seeds import curves, summarize
from mnist_batchnorm.core.errors import as_users_mistake
from mnist_batchnorm.core.files import discard, write_json, write_text
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS, SPLITS, VARIANTS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mnist_batchnorm.core.params import TrainParams
    from mnist_batchnorm.training.devices import DeviceSplit


class StoppedError(Exception):
    """Ends a thread after Ctrl-C, which reaches the main thread alone."""


@dataclass(frozen=True)
class Replicas:
    """What became of the replicas of one network.

    Attributes:
        rows: after each epoch, ``epoch`` and, a number a seed, ``valid_loss`` and
            ``valid_accuracy``.
        test_loss, test_accuracy: after the last, a number a seed.
        checkpoint: the file of the state after the last epoch.
        device: type of the device that they ran on, ``cpu`` or ``cuda``.
    """

    rows: list[dict[str, Any]]
    test_loss: list[float]
    test_accuracy: list[float]
    checkpoint: Path
    device: str


def train_replicas(
    variant: str,
    models: "Sequence[nn.Module]",
    seeds: Sequence[int],
    splits: "dict[str, DeviceSplit]",
    params: "TrainParams",
    device: "torch.device",
    progress: Callable[[int], None],
) -> Replicas:
    """Train replicas of a network in one computation and measure each.

    Args:
        variant: ``bn`` or ``plain``.
        models: the networks with their initial weights, on the device; trained in place.
        seeds: of the batches' order, one a network.
        splits: train, valid and test, on the device.
        params: of stage train; its own seed is not used.
        device: where.
        progress: called with the number of steps taken since it was last called.

    Raises:
        CheckFailedError: A loss is no longer finite.
        UserError: There are fewer training images than one batch.
    """
    import torch

    from mnist_batchnorm.training.checkpoint import Unfinished, identity
    from mnist_batchnorm.training.loop import (
        diverged,
        measure,
        require_finite,
        seed_layers,
        shuffled,
        steps_per_epoch,
        trainer_of,
    )

    train, valid, test = (splits[name] for name in SPLITS)
    steps = steps_per_epoch(len(train.labels), params.batch_size)
    asked = params.model_dump(mode="json", exclude={"device", "seed"})
    key = identity({"variant": variant, "seeds": list(seeds), **asked}, SPLITS, device)
    unfinished = Unfinished(f"{variant}-{len(seeds)}-seeds", key)

    trainer = trainer_of(models, train, params.batch_size, params.lr)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = unfinished.restore(trainer.tensors, generators)
    progress(len(rows) * steps)
    for number in range(len(rows) + 1, params.epochs + 1):
        order = [shuffled(len(train.labels), params.batch_size, g) for g in generators]
        seed_layers(seeds[0], number)
        require_finite(trainer.run(torch.stack(order), progress), number, params.lr)
        loss, accuracy = zip(*(measure(model, valid) for model in models), strict=True)
        if not np.isfinite(loss).all():
            raise diverged(f"after epoch {number}", params.lr)
        rows.append({"epoch": number, "valid_loss": loss, "valid_accuracy": accuracy})
        unfinished.keep(trainer.tensors, generators, rows)
    loss, accuracy = zip(*(measure(model, test) for model in models), strict=True)
    if not np.isfinite(loss).all():
        raise diverged("on the test images", params.lr)
    return Replicas(rows, list(loss), list(accuracy), unfinished.path, device.type)


def train_seeds(seeds: Sequence[int], params: "TrainParams") -> dict[str, Replicas]:
    """Train both networks from each seed, side by side.

    Raises:
        KeyboardInterrupt: After both have been stopped; the same command goes on from the last
            whole epoch.
    """
    if params.portable:
        from mnist_batchnorm.training.reproducible import make_portable

        make_portable()
    from mnist_batchnorm.training.devices import (
        DeviceSplit,
        describe_device,
        make_deterministic,
        resolve_device,
    )
    from mnist_batchnorm.training.fused import blocks_of
    from mnist_batchnorm.training.loop import architecture, steps_per_epoch

    device = resolve_device("cpu" if params.portable else params.device)
    make_deterministic()
    # here and not in the threads: PyTorch draws initial weights from one generator for all
    models = {
        variant: [architecture(variant, params).build(seed).to(device) for seed in seeds]
        for variant in VARIANTS
    }
    splits = {name: DeviceSplit.load(path, device) for name, path in SPLITS.items()}
    steps = steps_per_epoch(len(splits["train"].labels), params.batch_size)
    click.echo(
        f"training {' and '.join(VARIANTS)} from {len(seeds)} seeds on {describe_device(device)}",
        err=True,
    )
    total = params.epochs * steps * len(VARIANTS)
    stopped, lock = threading.Event(), threading.Lock()
    # CUDA captures a graph only while no other thread uses the device, and layers that draw, as
    # dropout does, draw from one generator
    known = all(blocks_of(model) for (model, *_) in models.values())
    threads = len(VARIANTS) if known and device.type == "cpu" else 1
    with (
        tqdm(total=total, unit="step", disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):

        def progress(taken: int) -> None:
            if stopped.is_set():
                raise StoppedError
            with lock:
                bar.update(taken)

        def train(variant: str) -> Replicas:
            of = models[variant]
            return train_replicas(variant, of, seeds, splits, params, device, progress)

        trainings = {variant: pool.submit(train, variant) for variant in VARIANTS}
        try:
            wait(trainings.values(), return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # for what still runs: the other has failed, or Ctrl-C
        errors = [error for training in trainings.values() if (error := training.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
            raise error
        return {variant: training.result() for variant, training in trainings.items()}


def run(count: int) -> None:
    """Train from seeds 0 to ``count`` - 1 and write what came of it."""
    seeds = range(count)
    try:
        results = train_seeds(seeds, load_params().train)
    except KeyboardInterrupt:
        click.echo("the same command goes on after the last whole epoch of each network", err=True)
        raise
    except (MemoryError, RuntimeError) as error:
        if known := as_users_mistake(error):
            raise known from None
        raise
    summary = summarize(results, seeds)
    write_json(SEEDS, summary)
    write_text(SEED_CURVES, curves(results, seeds))
    for replicas in results.values():
        discard(replicas.checkpoint)
    for variant in VARIANTS:
        of = summary[variant]["test_accuracy"]
        click.echo(f"{variant}: test accuracy {of['mean']:.4f} ± {of['sd']:.4f} (sd)")
    low, high = summary["bn_minus_plain"]["test_accuracy"]["interval_95"]
    click.echo(f"bn - plain: {low:+.4f} to {high:+.4f} (95 % interval of the mean, paired)")
