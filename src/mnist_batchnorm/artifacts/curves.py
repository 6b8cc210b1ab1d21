"""TODO."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_batchnorm.core.files import write_text

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Epoch:
    """One row of the learning curve: means over a whole split, measured in eval mode."""

    epoch: int
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float


def write_curve(path: Path, curve: "Sequence[Epoch]") -> None:
    """Write the learning curve as CSV, one row an epoch."""
    text = io.StringIO()
    rows = [asdict(epoch) for epoch in curve]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


CURVE_COLUMNS = ("epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
