"""Evaluation of a trained network: logits, loss, accuracy, calibration and confusion matrix."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mnist_batchnorm.core.arrays import Float32, Float64, calibration_bins
from mnist_batchnorm.core.threads import one_thread


@dataclass(frozen=True)
class Evaluation:
    """A network's logits measured against the labels."""

    accuracy: float
    loss: float  # mean cross-entropy, nats
    calibration_error: float
    errors: int
    predicted: npt.NDArray[np.uint8]  # [n]
    probability: Float64  # [n], of the predicted class
    confusion: npt.NDArray[np.int64]  # [classes, classes], rows actual


def compute_logits(model: nn.Module, inputs: Float32, batch_size: int) -> Float32:
    """Return the logits ``[n, classes]`` of a network in eval mode on the CPU.

    Computed in one thread, so that the bits do not depend on the number of cores.
    """
    batches = torch.split(torch.from_numpy(inputs), batch_size)
    with torch.inference_mode(), one_thread():
        return torch.cat([model(batch) for batch in batches]).numpy()


def evaluate(logits: Float32, labels: npt.NDArray[np.uint8], bins: int) -> Evaluation:
    """Measure logits ``[n, classes]`` against labels ``[n]``; ``bins`` are the calibration's."""
    from scipy.special import log_softmax  # the package imports without it, for the gate alone

    log_probability = log_softmax(logits.astype(np.float64), axis=1)
    predicted = logits.argmax(axis=1).astype(np.uint8)
    correct = predicted == labels
    probability = np.exp(log_probability.max(axis=1))
    return Evaluation(
        accuracy=float(correct.mean()),
        loss=float(-log_probability[np.arange(len(labels)), labels].mean()),
        calibration_error=calibration_error(probability, correct, bins),
        errors=int((~correct).sum()),
        predicted=predicted,
        probability=probability,
        confusion=confusion_matrix(labels, predicted, logits.shape[1]),
    )


def calibration_error(probability: Float64, correct: npt.NDArray[np.bool_], bins: int) -> float:
    """Return the expected calibration error, 0 (calibrated) to 1.

    The mean gap between the probability of the prediction and the accuracy over the bins, weighted
    by the images in each (Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3).
    """
    bin_of = calibration_bins(probability, bins)
    gaps = np.bincount(bin_of, weights=probability - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(probability))


def confusion_matrix(
    labels: npt.NDArray[np.uint8], predicted: npt.NDArray[np.uint8], classes: int
) -> npt.NDArray[np.int64]:
    """Count images by actual class (row) and predicted class (column)."""
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
