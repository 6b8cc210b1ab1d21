"""Stage evaluate: both networks on the test images, held back until training has ended."""

import csv
import io
from collections.abc import Iterable
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mnist_batchnorm.artifacts.splits import CLASSES, Split, load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import write_json, write_text
from mnist_batchnorm.core.paths import MODELS, REPORTS, TEST_SPLIT, VARIANTS
from mnist_batchnorm.core.threads import one_thread
from mnist_batchnorm.network.model import load_checkpoint


def network_logits(
    model: nn.Module, images: npt.NDArray[np.uint8], batch_size: int
) -> npt.NDArray[np.float32]:
    """Run a network in eval mode on the CPU, in one thread: sums do not depend on the cores.

    Args:
        model: in eval mode, on the CPU.
        images: uint8 ``[n, 28, 28]``.
        batch_size: images at once.

    Returns:
        logits, float32 ``[n, 10]``.
    """
    inputs = torch.from_numpy(network_input(images))
    with torch.inference_mode(), one_thread():
        return torch.cat([model(batch) for batch in torch.split(inputs, batch_size)]).numpy()


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return log probabilities, float64 ``[n, classes]``, without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def calibration_error(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], bins: int
) -> float:
    """Return the expected calibration error, 0 (calibrated) to 1.

    The mean gap between confidence and accuracy over equal-width confidence bins, weighted by
    the images in each (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3).

    Args:
        confidence: ``[n]``, probability given to the predicted class.
        correct: ``[n]``, whether the prediction was right.
        bins: number of bins between 0 and 1; a bin includes its upper edge.
    """
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def confusion_matrix(
    labels: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Count images by actual class (row) and predicted class (column), int64 ``[10, 10]``."""
    pairs = labels.astype(np.int64) * CLASSES + predicted
    return np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def evaluate(
    logits: npt.NDArray[np.float32], split: Split, bins: int
) -> tuple[dict[str, Any], str, str]:
    """Measure a network's logits against the labels.

    Returns:
        The metrics, the confusion matrix as CSV (a row per actual class, last the class's
        accuracy, empty without images), and each image's prediction as CSV (position in the IDX
        file, actual, predicted, its probability).
    """
    log_probability = log_softmax(logits)
    predicted = logits.argmax(axis=1).astype(np.uint8)
    correct = predicted == split.labels
    confidence = np.exp(log_probability.max(axis=1))
    matrix = confusion_matrix(split.labels, predicted)
    metrics = {
        "accuracy": float(correct.mean()),
        "loss": float(-log_probability[np.arange(len(split)), split.labels].mean()),
        "calibration_error": calibration_error(confidence, correct, bins),
        "errors": int((~correct).sum()),
    }
    confusion = _csv(
        [
            ["actual", *range(CLASSES), "accuracy"],
            *(
                [digit, *row, float(row[digit] / row.sum()) if row.any() else ""]
                for digit, row in enumerate(matrix)
            ),
        ]
    )
    predictions = _csv(
        [
            ["index", "actual", "predicted", "probability"],
            *(
                (i, a, p, f"{c:.6f}")
                for i, a, p, c in zip(split.index, split.labels, predicted, confidence, strict=True)
            ),
        ]
    )
    return metrics, confusion, predictions


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS), metavar="[bn] [plain]")
def command(variants: tuple[str, ...]) -> None:
    """Measure the networks on the test images: those named, by default both."""
    from mnist_batchnorm.core.params import load_params

    params = load_params().evaluate
    split = load_split(TEST_SPLIT)
    measured = {}
    for variant in variants or VARIANTS:
        path = MODELS / f"{variant}.safetensors"
        logits = network_logits(load_checkpoint(path).model(), split.images, params.batch_size)
        if not np.isfinite(logits).all():
            raise CheckFailedError(f"{path} gives logits that are not finite; train it again")
        measured[variant] = evaluate(logits, split, params.calibration_bins)
    for variant, (metrics, confusion, predictions) in measured.items():
        write_json(REPORTS / f"metrics/test-{variant}.json", metrics)
        write_text(REPORTS / f"confusion/{variant}.csv", confusion)
        write_text(REPORTS / f"predictions/{variant}.csv", predictions)
        click.echo(
            f"{variant}: test accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, "
            f"calibration error {metrics['calibration_error']:.4f}"
        )
