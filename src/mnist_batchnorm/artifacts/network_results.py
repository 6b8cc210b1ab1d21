"""TODO."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS
from mnist_batchnorm.artifacts.metrics import EvaluationMetrics, TrainMetrics
from mnist_batchnorm.artifacts.predictions import PREDICTION_COLUMNS, read_confusion
from mnist_batchnorm.artifacts.reading import Floats, read_record, read_table
from mnist_batchnorm.artifacts.splits import Split
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import CHECKPOINT_KEY, REPORTS, TEST_SPLIT


@dataclass(frozen=True)
class Network:
    """What the earlier stages found out about one network.

    Attributes:
        curve: float64 ``[epochs]`` for each column of the learning curve.
        training: where and by what it was trained.
        test: metrics on the test images.
        confusion: int64 ``[10, 10]``, rows actual, columns predicted.
        per_class_accuracy: of the classes that the test images hold.
        predicted: int64 ``[n]``, the class given to each test image.
        probability: float64 ``[n]``, of that class.
    """

    curve: dict[str, Floats]
    training: TrainMetrics
    test: EvaluationMetrics
    confusion: npt.NDArray[np.int64]
    per_class_accuracy: dict[int, float]
    predicted: npt.NDArray[np.int64]
    probability: Floats


def read_training(variant: str) -> tuple[TrainMetrics, dict[str, Floats]]:
    """Read what stage train wrote about one network: of its end, and the learning curve.

    Raises:
        UserError: A file is missing or malformed.
    """
    return (
        read_record(REPORTS / f"metrics/train-{variant}.json", TrainMetrics, "train"),
        read_table(REPORTS / f"curves/{variant}.csv", CURVE_COLUMNS, "train"),
    )


def read_network(variant: str, test: Split) -> Network:
    """Gather what train and evaluate wrote about one network.

    Raises:
        UserError: A file is missing or malformed, or is about other test images.
    """
    path = REPORTS / f"predictions/{variant}.csv"
    predictions = read_table(path, PREDICTION_COLUMNS, "evaluate")
    if not (
        np.array_equal(predictions["index"], test.index)
        and np.array_equal(predictions["actual"], test.labels)
    ):
        raise UserError(f"{path} is about other images than {TEST_SPLIT}; run `dvc repro evaluate`")
    confusion, per_class_accuracy = read_confusion(REPORTS / f"confusion/{variant}.csv")
    training, curve = read_training(variant)
    return Network(
        curve=curve,
        training=training,
        test=read_record(REPORTS / f"metrics/test-{variant}.json", EvaluationMetrics, "evaluate"),
        confusion=confusion,
        per_class_accuracy=per_class_accuracy,
        predicted=predictions["predicted"].astype(np.int64),
        probability=predictions["probability"],
    )


def trained_on(checkpoint: Path) -> str:
    """Return the SHA-256 of the images that a checkpoint says it was trained on.

    Raises:
        UserError: The file is missing or is not a checkpoint of this project.
    """
    try:
        with safe_open(checkpoint, "np") as stored:
            metadata = json.loads((stored.metadata() or {})[CHECKPOINT_KEY])
        return str(metadata["provenance"]["train_sha256"])
    except FileNotFoundError:
        raise UserError(f"no {checkpoint}; run `dvc repro train` first") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint of this project: {type(error).__name__}: {error}"
        ) from None
