"""Metrics of each network: ``reports/metrics/train-*.json`` and ``test-*.json``."""

from dataclasses import asdict

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.reading import Record, read_record
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.core.paths import REPORTS, VARIANTS

TRAIN_METRICS = {variant: REPORTS / f"metrics/train-{variant}.json" for variant in VARIANTS}
TEST_METRICS = {variant: REPORTS / f"metrics/test-{variant}.json" for variant in VARIANTS}


class TrainMetrics(Record):
    """Where a network was trained; the file also holds the last row of its learning curve."""

    device: str
    torch: str | None = None  # version; missing in commits from before 2026-11-25


class EvaluationMetrics(Record):
    """A network on the test images: loss in nats, expected calibration error, number of errors."""

    accuracy: float
    loss: float
    calibration_error: float
    errors: int


def write_train_metrics(variant: str, metrics: TrainMetrics, last: Epoch) -> None:
    """Write a network's training metrics and the last row of its learning curve."""
    write_json(TRAIN_METRICS[variant], metrics.model_dump() | asdict(last))


def read_train_metrics(variant: str) -> TrainMetrics:
    """Read a network's training metrics."""
    return read_record(TRAIN_METRICS[variant], TrainMetrics, "train")


def read_evaluation_metrics(variant: str) -> EvaluationMetrics:
    """Read a network's metrics on the test images."""
    return read_record(TEST_METRICS[variant], EvaluationMetrics, "evaluate")
