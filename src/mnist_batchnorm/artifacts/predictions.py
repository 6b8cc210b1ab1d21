"""TODO."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.reading import read_table
from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.errors import UserError

CONFUSION_COLUMNS = ("actual", *map(str, range(CLASSES)), "accuracy")

PREDICTION_COLUMNS = ("index", "actual", "predicted", "probability")


def read_confusion(path: Path) -> tuple[npt.NDArray[np.int64], dict[int, float]]:
    """Read a confusion matrix, int64 ``[10, 10]``, and the accuracy of each class with images.

    Raises:
        UserError: The file is missing or malformed.
    """
    table = read_table(path, CONFUSION_COLUMNS, "evaluate", gaps=("accuracy",))
    actual, *counts, accuracy = table.values()
    if not np.array_equal(actual, np.arange(CLASSES)):
        raise UserError(
            f"{path} is not what `dvc repro evaluate` writes: its rows are not the classes 0 to 9"
        )
    known = {digit: float(share) for digit, share in enumerate(accuracy) if not np.isnan(share)}
    return np.stack(counts, axis=1).astype(np.int64), known
