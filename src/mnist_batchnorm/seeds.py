"""Stage seeds: both networks from many seeds, the replicas of each as one batched computation.

One run says what one seed gave. How much of the difference between the networks is the seed's, only
many runs can tell. A replica is the run of its seed; tests/test_engine.py says in what sense.
"""

import csv
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mnist_batchnorm.errors import as_users_mistake
from mnist_batchnorm.files import discard, write_json, write_text
from mnist_batchnorm.layout import SEED_CURVES, SEEDS, SPLITS, VARIANTS
from mnist_batchnorm.params import load_params

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mnist_batchnorm.fit import DeviceSplit
    from mnist_batchnorm.params import TrainParams

CONFIDENCE = 0.95


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

    from mnist_batchnorm.fit import (
        diverged,
        measure,
        require_finite,
        seed_layers,
        shuffled,
        steps_per_epoch,
        trainer_of,
    )
    from mnist_batchnorm.resume import Unfinished, identity

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
        from mnist_batchnorm.portable import make_portable

        make_portable()
    from mnist_batchnorm.engine import blocks_of
    from mnist_batchnorm.fit import (
        DeviceSplit,
        architecture,
        describe_device,
        make_deterministic,
        resolve_device,
        steps_per_epoch,
    )

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


def summarize(results: dict[str, Replicas], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the content of ``reports/metrics/seeds.json``: figures over seeds, by network.

    The interval is that of the mean of the paired differences, by Student's t: the two networks
    share their seeds, and so their initial linear layers and their batches.
    """
    accuracy = {variant: np.array(results[variant].test_accuracy) for variant in VARIANTS}
    gain = accuracy["bn"] - accuracy["plain"]
    return {
        "seeds": len(seeds),
        "device": results["bn"].device,
        **{
            variant: {
                "test_accuracy": moments(accuracy[variant]),
                "test_loss": moments(np.array(results[variant].test_loss)),
            }
            for variant in VARIANTS
        },
        "bn_minus_plain": {
            "test_accuracy": moments(gain) | {"interval_95": interval(gain)},
        },
    }


def moments(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return mean, sample standard deviation and the values themselves."""
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        "values": values.tolist(),
    }


def interval(differences: npt.NDArray[np.float64]) -> list[float]:
    """Return the confidence interval of the mean of paired differences, by Student's t."""
    from scipy import special  # scipy.stats takes half a second more to import

    error = differences.std(ddof=1) / len(differences) ** 0.5
    half = error * special.stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2)
    return [float(differences.mean() - half), float(differences.mean() + half)]


def curves(results: dict[str, Replicas], seeds: Sequence[int]) -> str:
    """Return the learning curves as CSV, a row an epoch of each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "epoch", "valid_loss", "valid_accuracy"])
    for variant, replicas in results.items():
        for index, seed in enumerate(seeds):
            for row in replicas.rows:
                loss, accuracy = row["valid_loss"][index], row["valid_accuracy"][index]
                writer.writerow([variant, seed, row["epoch"], loss, accuracy])
    return text.getvalue()


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


@click.command()
def command() -> None:
    """Train both networks from many seeds and say how far their accuracies differ.

    How many, params.yaml says; `mnist-bn train --seeds N` takes another number.
    """
    run(load_params().seeds.count)
