"""The results of one network, gathered from the files of stages train and evaluate."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.curves import read_curve
from mnist_batchnorm.artifacts.metrics import (
    EvaluationMetrics,
    TrainMetrics,
    read_evaluation_metrics,
    read_train_metrics,
)
from mnist_batchnorm.artifacts.predictions import read_confusion, read_predictions
from mnist_batchnorm.artifacts.splits import Split
from mnist_batchnorm.core.arrays import Float64


@dataclass(frozen=True)
class NetworkResults:
    """The results of one network."""

    curve: dict[str, Float64]  # by column, [epochs]
    training: TrainMetrics
    test: EvaluationMetrics
    confusion: npt.NDArray[np.int64]  # [10, 10], rows actual
    per_class_accuracy: dict[int, float]  # of each class that has test images
    predicted: npt.NDArray[np.int64]  # [n], class of each test image
    probability: Float64  # [n], of the predicted class


def read_network(variant: str, test: Split) -> NetworkResults:
    """Read the results of one network.

    Raises:
        UserError: A file is missing or malformed, or is about other test images.
    """
    predicted, probability = read_predictions(variant, test)
    confusion, per_class_accuracy = read_confusion(variant)
    return NetworkResults(
        curve=read_curve(variant),
        training=read_train_metrics(variant),
        test=read_evaluation_metrics(variant),
        confusion=confusion,
        per_class_accuracy=per_class_accuracy,
        predicted=predicted,
        probability=probability,
    )
