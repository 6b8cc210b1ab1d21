"""Summary of the prepared splits: ``reports/metrics/data.json``."""

from pydantic import Field

from mnist_batchnorm.artifacts.reading import Record, read_record
from mnist_batchnorm.core.paths import REPORTS

DATA_SUMMARY = REPORTS / "metrics/data.json"


class DataSummary(Record):
    """Images per split and class, the training pixels' moments (0 to 1) and SHA-256 of files."""

    protocol: str
    images: dict[str, int]
    per_class: dict[str, dict[int, int]]
    train_pixel_mean: float
    train_pixel_std: float
    sha256: dict[str, dict[str, str]] = Field(default_factory=dict)


def read_data_summary() -> DataSummary:
    """Read the summary of the prepared splits."""
    return read_record(DATA_SUMMARY, DataSummary, "prepare")
