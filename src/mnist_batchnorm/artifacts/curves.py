"""Learning curves: ``reports/curves/{bn,plain}.csv``."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from mnist_batchnorm.artifacts.reading import read_table
from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.files import write_csv
from mnist_batchnorm.core.paths import REPORTS, VARIANTS


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve: means over a whole split, measured in eval mode."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


CURVES = {variant: REPORTS / f"curves/{variant}.csv" for variant in VARIANTS}
CURVE_COLUMNS = tuple(field.name for field in fields(Epoch))


def write_curve(variant: str, curve: Sequence[Epoch]) -> None:
    """Write a network's learning curve as CSV, one row per epoch."""
    write_csv(CURVES[variant], CURVE_COLUMNS, [astuple(epoch) for epoch in curve])


def read_curve(variant: str) -> dict[str, Float64]:
    """Read a network's learning curve: float64 ``[epochs]`` for each column."""
    return read_table(CURVES[variant], CURVE_COLUMNS, "train")
