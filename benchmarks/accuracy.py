"""Accuracy of both networks over several seeds: the engine against autograd, and the lecture.

    python benchmarks/accuracy.py            test accuracy by the engine and by the plain loop
    python benchmarks/accuracy.py --lecture  train on all 60,000, watch the test images

Run after `dvc repro`, from the repository root; parameters are those of params.yaml.
"""

import argparse
import platform
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from scipy import stats
from torch import nn
from tqdm import tqdm

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.core.params import Params, load_params
from mnist_batchnorm.core.paths import PREPARED, RAW, VARIANTS
from mnist_batchnorm.stages.prepare import prepare
from mnist_batchnorm.training.devices import DeviceSplit, make_deterministic, resolve_device
from mnist_batchnorm.training.loop import architecture, fit, measure

Runs = dict[str, list[float]]


def mean_and_deviation(values: list[float]) -> str:
    """Format values as ``mean ± sample standard deviation``."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def train_all(
    params: Params, seeds: int, folder: Path, by_autograd: bool = False
) -> tuple[dict[str, list[list[Epoch]]], Runs]:
    """Train each variant from each seed; return its curves and its test accuracies."""
    device = resolve_device(params.train.device)
    train, valid, test = (
        DeviceSplit.load(folder / f"{name}.safetensors", device)
        for name in ("train", "valid", "test")
    )
    curves: dict[str, list[list[Epoch]]] = {variant: [] for variant in VARIANTS}
    accuracies: Runs = {variant: [] for variant in VARIANTS}
    for seed in tqdm(range(seeds), unit="seed"):
        chosen = params.train.model_copy(update={"seed": seed})
        for variant in VARIANTS:
            model: nn.Module = architecture(variant, chosen).build(seed).to(device)
            if by_autograd:
                model.register_forward_hook(lambda *_: None)  # which the engine does not know
            curves[variant].append(fit(model, train, valid, chosen))
            accuracies[variant].append(measure(model, test)[1])
    return curves, accuracies


def print_against_autograd(engine: Runs, autograd: Runs) -> None:
    """Print one row a seed, the means, and what a paired t test makes of the difference."""
    columns = {
        "bn": engine["bn"],
        "bn by autograd": autograd["bn"],
        "plain": engine["plain"],
        "plain by autograd": autograd["plain"],
    }
    print(f"| seed | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for seed, row in enumerate(zip(*columns.values(), strict=True)):
        print(f"| {seed} | {' | '.join(f'{value:.4f}' for value in row)} |")
    print(f"| mean ± sd | {' | '.join(map(mean_and_deviation, columns.values()))} |\n")
    for variant in VARIANTS:
        test = stats.ttest_rel(engine[variant], autograd[variant])
        low, high = test.confidence_interval(0.95)
        print(
            f"{variant}: engine - autograd {low:+.4f} to {high:+.4f} (95 % interval, paired), "
            f"p = {test.pvalue:.2f}"
        )


def print_lecture(curves: dict[str, list[list[Epoch]]]) -> None:
    """Print train and valid accuracy after the first and the last epoch."""
    print("| epoch | variant | train accuracy | valid (= test) accuracy |\n|---|---|---|---|")
    for at in (0, -1):
        for variant in VARIANTS:
            rows = [curve[at] for curve in curves[variant]]
            train = mean_and_deviation([row.train_accuracy for row in rows])
            valid = mean_and_deviation([row.valid_accuracy for row in rows])
            print(f"| {rows[0].epoch} | {variant} | {train} | {valid} |")


def main() -> None:
    """Parse the command line, train, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lecture", action="store_true", help="the lecture's protocol")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (10; lecture: 5)")
    options = parser.parse_args()
    seeds = options.seeds or (5 if options.lecture else 10)
    params = load_params()
    make_deterministic()
    if options.lecture:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            whole = params.prepare.model_copy(update={"valid_size": 0})
            prepare(RAW, folder, folder / "data.json", whole)
            curves, _ = train_all(params, seeds, folder)
    else:
        _, engine = train_all(params, seeds, PREPARED)
        _, autograd = train_all(params, seeds, PREPARED, by_autograd=True)
    print(f"{seeds} seeds, {params.train.epochs} epochs, torch {torch.__version__}, ", end="")
    print(f"device {resolve_device(params.train.device)}, {platform.machine()}\n")
    if options.lecture:
        print_lecture(curves)
    else:
        print_against_autograd(engine, autograd)


if __name__ == "__main__":
    main()
