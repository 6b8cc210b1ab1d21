"""Time of an epoch: the lecture's way, a plain PyTorch loop, this project's engine, and JAX.

    python -m benchmarks.training                the table
    python -m benchmarks.training --device cuda  the same on a GPU
    python -m benchmarks.training --check        that they do the same mathematics

Run after `dvc repro prepare`, from the repository root, on an idle machine. JAX comes with the
extra `bench` (in `requirements.lock`, so `make setup` brings it); without it its rows say so.

All train both networks of params.yaml on the same images, with the same batch size and number of
steps, and after each epoch evaluate both on the training and the validation images:

- lecture: torchvision's MNIST, ToTensor and a DataLoader; both networks in one loop; its faster
  row is what the others' speed is measured by;
- plain loop: the images in memory as one tensor, nn.Module, autograd, Adam(fused=True);
- this project: `fit`, as the pipeline calls it, in two processes at once, a network each;
- JAX: the same step in a jitted `jax.lax.scan` over an epoch's batches.

Every row is measured in processes of its own, started anew for each repeat; rows alternate, so a
busy moment of the machine hits them alike. The first epoch warms up; figures are medians over the
other epochs, then over repeats. An epoch is both networks' training and evaluation: what the
slower process takes where there are two. Peak memory is that of the larger process; JAX's include
PyTorch, which this file imports. The rows' loops are in training_contenders.py and jax_training.py.

The floor is a step's arithmetic at the pace of one core: the FLOPs of its matrix products over the
best rate that `torch.mm(out=)` reaches at any of their shapes, plus the bytes that must move (each
batch once; weight, gradient and Adam's two moments of each parameter in, all but the gradient out)
over the bandwidth of a sweep over as much memory. The share is the floor of both networks' steps
over the sum of the times that they took, on whatever cores.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.training_check import check
from benchmarks.training_contenders import run_engine, run_jax, run_lecture, run_plain
from benchmarks.training_job import (
    BOTH,
    Job,
    Stopwatch,
    enter_process,
    release_others,
    synchronize,
)
from mnist_batchnorm.artifacts.splits import load_split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import TrainParams, load_params
from mnist_batchnorm.core.paths import PREPARED, RAW, VARIANTS
from mnist_batchnorm.network.model import Architecture
from mnist_batchnorm.training.devices import describe_device, resolve_device
from mnist_batchnorm.training.loop import architecture

PACKAGES = ("torch", "torchvision", "jax", "jaxlib")

# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a process measured; seconds, of an epoch where not said otherwise.

    Attributes:
        training: of each network, or of `BOTH`.
        evaluation: likewise.
        startup: once: interpreter, imports, data.
        warm_up: once: how much longer the first epochs took, of all networks together.
        memory: peak resident set in MiB, None where the system does not tell.
    """

    training: dict[str, float]
    evaluation: dict[str, float]
    startup: float
    warm_up: float
    memory: float | None


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: as the table shows it.
        runs_on: what of the CPU it uses, as the table shows it.
        run: measures the epochs of a job.
        processes: the networks that each process trains.
        one_core: keep each process to one core.
        threads: of PyTorch; None for its default.
    """

    name: str
    runs_on: str
    run: Callable[[Job, Stopwatch], None]
    processes: tuple[tuple[str, ...], ...] = (VARIANTS,)
    one_core: bool = False
    threads: int | None = None


LECTURE = (
    Contender("lecture", "all cores", run_lecture),
    # PyTorch's threads wait for one another: on a busy machine they are slower than one alone
    Contender("lecture", "one core", run_lecture, one_core=True, threads=1),
)
CONTENDERS = (
    *LECTURE,
    Contender("plain loop", "one core", run_plain, one_core=True, threads=1),
    Contender(
        "**this project**", "a core for each network", run_engine, (("bn",), ("plain",)), threads=1
    ),
    Contender("**this project**", "one core", run_engine, one_core=True, threads=1),
    Contender("JAX", "all cores", run_jax),
    Contender("JAX", "one core", run_jax, one_core=True),
)


def measure_job(run: Callable[[Job, Stopwatch], None], job: Job) -> Measured:
    """Do a process's job."""
    watch = Stopwatch(job)
    try:
        run(job, watch)
    except BaseException:
        release_others()
        raise
    counted = {network: epochs[1:] for network, epochs in watch.epochs.items()}
    training, evaluation = (
        {network: statistics.median(e[part] for e in epochs) for network, epochs in counted.items()}
        for part in (0, 1)
    )
    first = sum(sum(epochs[0]) for epochs in watch.epochs.values())
    warm_up = max(0.0, first - sum(training.values()) - sum(evaluation.values()))
    assert watch.startup is not None
    return Measured(training, evaluation, watch.startup, warm_up, peak_memory())


def peak_memory() -> float | None:
    """Return this process's largest resident set so far in MiB, None where Linux is not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


@contextlib.contextmanager
def processes(
    count: int, one_core: bool, threads: int | None
) -> Iterator[Callable[..., list[Any]]]:
    """Yield a function that calls another in new processes, once for each of its arguments."""
    context = multiprocessing.get_context("spawn")  # nothing inherited, as a user starts them
    arguments = (context.Barrier(count), one_core, threads)
    with ProcessPoolExecutor(count, context, enter_process, arguments) as pool:
        yield lambda *call: list(pool.map(*call))


def measure_row(
    contender: Contender, params: TrainParams, device: str, images: int | None
) -> list[Measured]:
    """Run a row's processes once, side by side."""
    if contender.one_core and not hasattr(os, "sched_setaffinity"):
        raise UserError("this system cannot keep a process to one core")
    count = len(contender.processes)
    with processes(count, contender.one_core, contender.threads) as call:
        now = time.time()
        jobs = [Job(v, params, device, images, submitted=now) for v in contender.processes]
        return call(measure_job, [contender.run] * count, jobs)


# --- the floor ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What the device can do: FLOPs and bytes a second."""

    flops: float
    bytes: float


def products(
    widths: Sequence[int], batch: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield a step's matrix products, as left and right factor and result.

    For each layer the output and the weight's gradient, and, save for the first layer, its input's
    gradient.
    """
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shapes = ((batch, inputs), (outputs, inputs), (batch, outputs))
        x, weight, y = (torch.ones(shape, device=device) for shape in shapes)
        yield x, weight.t(), y
        yield y.t(), x, weight
        if i > 0:
            yield y, weight, x


def product_flops(left: Tensor, right: Tensor) -> int:
    """Count a matrix product's multiplications and additions."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def step_flops(widths: Sequence[int], batch: int) -> int:
    """Count those of all of a step's matrix products."""
    return sum(product_flops(a, b) for a, b, _ in products(widths, batch, "meta"))


def step_bytes(parameters: int, widths: Sequence[int], batch: int) -> int:
    """Count what a step must read and write at least, in float32."""
    return 4 * (7 * parameters + batch * widths[0])


def best_seconds(call: Callable[[], object], calls: int = 200, repeats: int = 20) -> float:
    """Return the shortest mean time of some calls: the machine at its best."""

    def once() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - started) / calls

    return min(once() for _ in range(repeats))


def measure_rates(job: Job) -> Rates:
    """Measure what one core, or the GPU, reaches at the shapes of a step."""
    network = architecture("plain", job.params)
    flops = 0.0
    for left, right, out in products(network.widths, job.params.batch_size, job.torch_device):
        seconds = best_seconds(partial(torch.mm, left, right, out=out))
        flops = max(flops, product_flops(left, right) / seconds)
    swept = torch.ones(4, parameter_count(network), device=job.torch_device)
    seconds = best_seconds(partial(torch.neg, swept, out=swept))
    return Rates(flops, 2 * swept.nbytes / seconds)


def parameter_count(network: Architecture) -> int:
    """Count a network's weights and biases."""
    return sum(parameter.numel() for parameter in network.build().parameters())


def floor_seconds(variant: str, params: TrainParams, rates: Rates) -> float:
    """Return the least time that a step of a network can take at these rates."""
    network, batch = architecture(variant, params), params.batch_size
    moved = step_bytes(parameter_count(network), network.widths, batch)
    return step_flops(network.widths, batch) / rates.flops + moved / rates.bytes


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What one repeat of a row says; seconds.

    Attributes:
        step: of each network, or of `BOTH`.
        epoch: of both networks, evaluation included.
        rate: images trained on a second, both networks', without evaluation.
        startup: until the first epoch.
        warm_up: how much longer the first epoch took.
        memory: MiB, NaN where unknown.
    """

    step: dict[str, float]
    epoch: float
    rate: float
    startup: float
    warm_up: float
    memory: float


def figures(measured: Sequence[Measured], steps: int, batch: int) -> Figures:
    """Put the processes of a row together: they ran side by side, so the slowest counts."""
    training = [sum(process.training.values()) for process in measured]
    evaluation = [sum(process.evaluation.values()) for process in measured]
    return Figures(
        step={name: t / steps for process in measured for name, t in process.training.items()},
        epoch=max(a + b for a, b in zip(training, evaluation, strict=True)),
        rate=len(VARIANTS) * steps * batch / max(training),
        startup=max(process.startup for process in measured),
        warm_up=max(process.warm_up for process in measured),
        memory=max(process.memory or math.nan for process in measured),
    )


def medians(repeats: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""

    def median(name: str) -> float:
        values: list[float] = [getattr(repeat, name) for repeat in repeats]
        return statistics.median(values)

    names = repeats[0].step
    step = {name: statistics.median(repeat.step[name] for repeat in repeats) for name in names}
    return Figures(step, *(median(field.name) for field in fields(Figures)[1:]))


def table_row(contender: Contender, row: Figures, lecture: float, floor: float) -> str:
    """Format a row, from the lecture's epoch and the floor of both networks' steps in seconds."""
    steps = " + ".join(f"{row.step[name] * 1e6:,.0f}" for name in VARIANTS if name in row.step)
    cells = [
        contender.name,
        contender.runs_on,
        steps or f"{row.step[BOTH] * 1e6:,.0f} together",
        f"{row.epoch:.2f}",
        f"{lecture / row.epoch:.1f}",
        f"{row.rate:,.0f}",
        f"{floor / sum(row.step.values()):.0%}",
        f"{row.startup:.1f} + {row.warm_up:.1f}",
        f"{row.memory:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "contender",
    "CPU",
    f"step of {' + '.join(VARIANTS)}, µs",
    "epoch of both, s",
    "times the lecture's speed",
    "images/s",
    "share of the floor",
    "start + warm-up, s",
    "peak memory, MiB",
)


def describe_machine(device: str) -> str:
    """Name the device, the processor and the versions."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    versions = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    where = f"{describe_device(resolve_device(device))}, {processor}, {os.cpu_count()} CPUs"
    return f"{where}; {', '.join(versions)}, Python {platform.python_version()}"


def print_table(
    results: dict[Contender, list[Figures]],
    absent: dict[Contender, str],
    rates: Rates,
    params: TrainParams,
) -> None:
    """Print the floor and the rows."""
    floors = {variant: floor_seconds(variant, params, rates) for variant in VARIANTS}
    floor = " + ".join(f"{floors[variant] * 1e6:.0f}" for variant in VARIANTS)
    print(
        f"Floor of a step: {floor} µs ({' + '.join(VARIANTS)}) at {rates.flops / 1e9:.1f} GFLOP/s "
        f"and {rates.bytes / 1e9:.1f} GB/s\n"
    )
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    lecture = min(medians(results[row]).epoch for row in LECTURE if row not in absent)
    for contender, repeats in results.items():
        if contender in absent:
            cells = [contender.name, contender.runs_on, absent[contender]]
            print(f"| {' | '.join(cells)} |{' |' * (len(HEAD) - len(cells))}")
        else:
            print(table_row(contender, medians(repeats), lecture, sum(floors.values())))


def compare(params: TrainParams, device: str, images: int | None, repeats: int) -> None:
    """Measure every row in turn, again and again, and print the table."""
    steps = len(load_split(PREPARED / "train.safetensors").labels[:images]) // params.batch_size
    if steps == 0:
        raise UserError(f"--images {images} is less than a batch ({params.batch_size})")
    if not any(RAW.glob("train-images*")):
        raise UserError(f"no images in {RAW}; run `dvc repro download` first")
    print(
        f"{steps:,} steps of {params.batch_size} images an epoch, {params.epochs - 1} epochs "
        f"after one of warm-up, {repeats} times; {describe_machine(device)}\n",
        flush=True,
    )
    rates: list[Rates] = []
    results: dict[Contender, list[Figures]] = {contender: [] for contender in CONTENDERS}
    absent: dict[Contender, str] = {}
    with tqdm(total=repeats * len(CONTENDERS), unit="run", disable=None) as progress:
        for _ in range(repeats):
            with processes(1, one_core=True, threads=1) as call:
                rates += call(measure_rates, [Job(VARIANTS, params, device, images, time.time())])
            for contender in CONTENDERS:
                progress.set_description(contender.name)
                if contender not in absent:
                    try:
                        measured = measure_row(contender, params, device, images)
                        results[contender].append(figures(measured, steps, params.batch_size))
                    except UserError as error:
                        absent[contender] = str(error)
                progress.update()
    best = Rates(max(rate.flops for rate in rates), max(rate.bytes for rate in rates))
    print_table(results, absent, best, params)


def main() -> int:
    """Parse the command line; compare or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare results, not times")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each row")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="after the warm-up")
    parser.add_argument("--images", type=int, metavar="N", help="train on only so many")
    options = parser.parse_args()
    if min(options.repeats, options.epochs, options.images or 1) < 1:
        parser.error("--repeats, --epochs and --images must be at least 1")
    try:
        params = load_params().train.model_copy(update={"epochs": 1 + options.epochs})
        if options.check:
            return check(params)
        resolve_device(options.device)
        compare(params, options.device, options.images, options.repeats)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
