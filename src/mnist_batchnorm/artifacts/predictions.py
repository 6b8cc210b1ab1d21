"""Predictions on the test images: ``reports/predictions/*.csv`` and ``reports/confusion/*.csv``."""

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.reading import read_table
from mnist_batchnorm.artifacts.splits import CLASSES, Split
from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_csv
from mnist_batchnorm.core.paths import REPORTS, TEST_SPLIT, VARIANTS

PREDICTIONS = {variant: REPORTS / f"predictions/{variant}.csv" for variant in VARIANTS}
CONFUSIONS = {variant: REPORTS / f"confusion/{variant}.csv" for variant in VARIANTS}
PREDICTION_COLUMNS = ("index", "actual", "predicted", "probability")
CONFUSION_COLUMNS = ("actual", *map(str, range(CLASSES)), "accuracy")


def write_predictions(
    variant: str, test: Split, predicted: npt.NDArray[np.uint8], probability: Float64
) -> None:
    """Write the prediction for each test image and its probability, rounded to six decimals."""
    columns = (test.index, test.labels, predicted, (f"{p:.6f}" for p in probability))
    write_csv(PREDICTIONS[variant], PREDICTION_COLUMNS, zip(*columns, strict=True))


def read_predictions(variant: str, test: Split) -> tuple[npt.NDArray[np.int64], Float64]:
    """Read the predicted class of each test image and its probability, both ``[n]``.

    Raises:
        UserError: The file is missing or malformed, or is about other images.
    """
    path = PREDICTIONS[variant]
    table = read_table(path, PREDICTION_COLUMNS, "evaluate")
    if not (
        np.array_equal(table["index"], test.index) and np.array_equal(table["actual"], test.labels)
    ):
        raise UserError(f"{path} is about other images than {TEST_SPLIT}; run `dvc repro evaluate`")
    return table["predicted"].astype(np.int64), table["probability"]


def write_confusion(variant: str, matrix: npt.NDArray[np.int64]) -> None:
    """Write a confusion matrix, rows actual, and the accuracy of each class that has images."""
    rows = [
        [digit, *row, float(row[digit] / row.sum()) if row.any() else ""]
        for digit, row in enumerate(matrix)
    ]
    write_csv(CONFUSIONS[variant], CONFUSION_COLUMNS, rows)


def read_confusion(variant: str) -> tuple[npt.NDArray[np.int64], dict[int, float]]:
    """Read a confusion matrix, int64 ``[10, 10]``, and the accuracy of each class with images."""
    path = CONFUSIONS[variant]
    table = read_table(path, CONFUSION_COLUMNS, "evaluate", optional=("accuracy",))
    actual, *counts, accuracy = table.values()
    if not np.array_equal(actual, np.arange(CLASSES)):
        raise UserError(
            f"{path} is not what `dvc repro evaluate` writes: its rows are not the classes 0 to 9"
        )
    known = {digit: float(share) for digit, share in enumerate(accuracy) if not np.isnan(share)}
    return np.stack(counts, axis=1).astype(np.int64), known
