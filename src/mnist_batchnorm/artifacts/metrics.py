"""TODO."""

from mnist_batchnorm.artifacts.reading import Record


class TrainMetrics(Record):
    """``reports/metrics/train-*.json``."""

    device: str
    torch: str | None = None  # its version; commits from before 2026-11-25 do not say


class EvaluationMetrics(Record):
    """``reports/metrics/test-*.json``."""

    accuracy: float
    loss: float
    calibration_error: float
    errors: int


class DataMetrics(Record):
    """``reports/metrics/data.json``."""

    protocol: str
    images: dict[str, int]
    per_class: dict[str, dict[int, int]]
    train_pixel_mean: float
    train_pixel_std: float
