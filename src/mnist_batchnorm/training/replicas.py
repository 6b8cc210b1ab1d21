"""Replicas: both networks from many seeds, the replicas of each as one batched computation."""

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mnist_batchnorm.core.params import TrainParams
from mnist_batchnorm.core.paths import SPLITS, VARIANTS
from mnist_batchnorm.training.checkpoint import TrainingCheckpoint, cache_key
from mnist_batchnorm.training.devices import (
    DeviceSplit,
    describe_device,
    make_deterministic,
    resolve_device,
)
from mnist_batchnorm.training.fused import fusible_blocks
from mnist_batchnorm.training.loop import (
    architecture,
    divergence_error,
    measure,
    run_epochs,
    steps_per_epoch,
)
from mnist_batchnorm.training.trainer import Progress


class StoppedError(Exception):
    """Ends a thread after Ctrl-C, which reaches the main thread alone."""


@dataclass(frozen=True)
class Replicas:
    """The trained replicas of one network; measurements have one number per seed."""

    rows: list[dict[str, Any]]  # per epoch: epoch, valid_loss, valid_accuracy
    test_loss: list[float]
    test_accuracy: list[float]
    checkpoint: Path  # of the state after the last epoch
    device: str  # "cpu" or "cuda"


def train_replicas(
    variant: str,
    models: Sequence[nn.Module],
    seeds: Sequence[int],
    splits: dict[str, DeviceSplit],
    params: TrainParams,
    device: torch.device,
    progress: Progress,
) -> Replicas:
    """Train replicas of a network in one computation and measure each.

    ``models`` have their initial weights and are trained in place, each with the batches of its
    seed; the seed in ``params`` is ignored.
    """
    train, valid, test = (splits[name] for name in SPLITS)
    hyperparameters = params.model_dump(mode="json", exclude={"device", "seed"})
    key = cache_key({"variant": variant, "seeds": list(seeds), **hyperparameters}, SPLITS, device)
    checkpoint = TrainingCheckpoint(f"{variant}-{len(seeds)}-seeds", key)

    def measure_epoch() -> dict[str, Any]:
        loss, accuracy = zip(*(measure(model, valid) for model in models), strict=True)
        return {"valid_loss": loss, "valid_accuracy": accuracy}

    rows = list(run_epochs(models, seeds, train, params, measure_epoch, progress, checkpoint))
    loss, accuracy = zip(*(measure(model, test) for model in models), strict=True)
    if not np.isfinite(loss).all():
        raise divergence_error("on the test images", params.lr)
    return Replicas(rows, list(loss), list(accuracy), checkpoint.path, device.type)


def train_seeds(seeds: Sequence[int], params: TrainParams) -> dict[str, Replicas]:
    """Train both networks from each seed, in parallel.

    Raises:
        KeyboardInterrupt: After both have been stopped; the same command resumes after the last
            whole epoch.
    """
    device = resolve_device("cpu" if params.portable else params.device)
    make_deterministic()
    # outside the threads: PyTorch draws all initial weights from one global generator
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
    # CUDA captures a graph only while no other thread uses the device, and layers such as dropout
    # draw from one global generator
    fusible = all(fusible_blocks(replicas[0]) for replicas in models.values())
    threads = len(VARIANTS) if fusible and device.type == "cpu" else 1
    with (
        tqdm(total=total, unit="step", disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):

        def progress(steps: int) -> None:
            if stopped.is_set():
                raise StoppedError
            with lock:
                bar.update(steps)

        trainings = {
            variant: pool.submit(
                train_replicas, variant, models[variant], seeds, splits, params, device, progress
            )
            for variant in VARIANTS
        }
        try:
            wait(trainings.values(), return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()  # stops the other training after a failure, or both after Ctrl-C
        errors = [error for training in trainings.values() if (error := training.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
            raise error
        return {variant: training.result() for variant, training in trainings.items()}
