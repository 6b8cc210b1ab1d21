"""Accuracy of both networks over several seeds, and the lecture's own protocol.

    python benchmarks/accuracy.py            test accuracy after the last epoch, five seeds
    python benchmarks/accuracy.py --lecture  train on all 60,000, watch the test images

Run after `dvc repro`, from the repository root; parameters are those of params.yaml.
"""

import argparse
import platform
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from mnist_batchnorm.layout import PREPARED, RAW, VARIANTS
from mnist_batchnorm.params import Params, load_params
from mnist_batchnorm.prepare import prepare
from mnist_batchnorm.train import (
    DeviceSplit,
    Epoch,
    architecture,
    fit,
    make_deterministic,
    measure,
    resolve_device,
)


def mean_and_deviation(values: list[float]) -> str:
    """Format values as ``mean ± sample standard deviation``."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def train_all(
    params: Params, seeds: int, folder: Path
) -> tuple[dict[str, list[list[Epoch]]], dict[str, list[float]]]:
    """Train each variant from each seed; return its curves and its test accuracies."""
    device = resolve_device(params.train.device)
    train, valid, test = (
        DeviceSplit.load(folder / f"{name}.safetensors", device)
        for name in ("train", "valid", "test")
    )
    curves: dict[str, list[list[Epoch]]] = {variant: [] for variant in VARIANTS}
    accuracies: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in tqdm(range(seeds), unit="seed"):
        chosen = params.train.model_copy(update={"seed": seed})
        for variant in VARIANTS:
            model = architecture(variant, chosen).build(seed).to(device)
            curves[variant].append(fit(model, train, valid, chosen))
            accuracies[variant].append(measure(model, test)[1])
    return curves, accuracies


def print_test_accuracy(accuracies: dict[str, list[float]]) -> None:
    """Print one row a seed and the mean over them."""
    bn, plain = accuracies["bn"], accuracies["plain"]
    print("| seed | bn | plain | bn - plain |\n|---|---|---|---|")
    for seed, (a, b) in enumerate(zip(bn, plain, strict=True)):
        print(f"| {seed} | {a:.4f} | {b:.4f} | {a - b:+.4f} |")
    gains = [a - b for a, b in zip(bn, plain, strict=True)]
    cells = [mean_and_deviation(values) for values in (bn, plain, gains)]
    print(f"| mean ± sd | {' | '.join(cells)} |")


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
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1")
    options = parser.parse_args()
    params = load_params()
    make_deterministic()
    with TemporaryDirectory() as scratch:
        folder = PREPARED
        if options.lecture:
            folder = Path(scratch)
            whole = params.prepare.model_copy(update={"valid_size": 0})
            prepare(RAW, folder, folder / "data.json", whole)
        curves, accuracies = train_all(params, options.seeds, folder)
    print(
        f"{options.seeds} seeds, {params.train.epochs} epochs, torch {torch.__version__}, ", end=""
    )
    print(f"device {resolve_device(params.train.device)}, {platform.machine()}\n")
    if options.lecture:
        print_lecture(curves)
    else:
        print_test_accuracy(accuracies)


if __name__ == "__main__":
    main()
