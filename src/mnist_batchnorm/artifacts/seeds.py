"""Both networks over many seeds: ``reports/metrics/seeds.json``, ``reports/curves/seeds.csv``."""

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from mnist_batchnorm.artifacts.reading import Record, read_record, read_table
from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import write_csv
from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS, VARIANTS

MEASURES = ("valid_loss", "valid_accuracy")
SEED_CURVE_COLUMNS = ("variant", "seed", "epoch", *MEASURES)


class Moments(Record):
    """A figure over seeds: its mean, sample standard deviation, and value from each seed."""

    mean: FiniteFloat
    sd: FiniteFloat
    values: list[FiniteFloat]


class Difference(Moments):
    """A difference over seeds, and the 95 % confidence interval of its mean."""

    interval_95: tuple[FiniteFloat, FiniteFloat]


class SeedMeasures(Record):
    """One network on the test images, after training."""

    test_accuracy: Moments
    test_loss: Moments


class SeedDifferences(Record):
    """Batch norm minus plain, seed by seed."""

    test_accuracy: Difference


class SeedMetrics(Record):
    """``reports/metrics/seeds.json``."""

    seeds: Annotated[int, Field(ge=2)]
    device: str
    bn: SeedMeasures
    plain: SeedMeasures
    bn_minus_plain: SeedDifferences

    @model_validator(mode="after")
    def _a_value_for_each_seed(self) -> Self:
        for moments in (
            *(getattr(self[v], name) for v in VARIANTS for name in SeedMeasures.model_fields),
            self.difference,
        ):
            if len(moments.values) != self.seeds:
                raise ValueError(f"{self.seeds} seeds and {len(moments.values)} values do not fit")
        return self

    def __getitem__(self, variant: str) -> SeedMeasures:
        return {"bn": self.bn, "plain": self.plain}[variant]

    @property
    def difference(self) -> Difference:
        """Test accuracy of batch norm minus that of plain."""
        return self.bn_minus_plain.test_accuracy


@dataclass(frozen=True)
class SeedRuns:
    """The runs of both networks from seeds 0, 1, ..."""

    metrics: SeedMetrics
    epoch: Float64  # [epochs], from 1
    curves: dict[str, dict[str, Float64]]  # by network and measure, [seeds, epochs]


def write_seeds(runs: SeedRuns) -> None:
    """Write the metrics as JSON, and the curves as CSV with one row per network, seed and epoch."""
    runs.metrics.write(SEEDS)
    rows = [
        (variant, seed, int(epoch), *(curves[measure][seed, index] for measure in MEASURES))
        for variant, curves in runs.curves.items()
        for seed in range(runs.metrics.seeds)
        for index, epoch in enumerate(runs.epoch)
    ]
    write_csv(SEED_CURVES, SEED_CURVE_COLUMNS, rows)


def read_seeds() -> SeedRuns:
    """Read the files of stage seeds.

    Raises:
        UserError: A file is missing or malformed, or the two are about different runs.
    """
    metrics = read_record(SEEDS, SeedMetrics, "seeds")
    table = read_table(SEED_CURVES, SEED_CURVE_COLUMNS, "seeds", categories={"variant": VARIANTS})
    runs, rows = len(VARIANTS) * metrics.seeds, len(table["epoch"])
    shape = (len(VARIANTS), metrics.seeds, rows // runs)
    variant, seed, epoch = (axis.ravel() for axis in np.indices(shape))
    for name, expected in {"variant": variant, "seed": seed, "epoch": epoch + 1}.items():
        if not np.array_equal(table[name], expected):
            raise UserError(
                f"{SEED_CURVES} is about other runs than {SEEDS}; run `dvc repro seeds`"
            )
    return SeedRuns(
        metrics=metrics,
        epoch=np.arange(1.0, shape[-1] + 1),
        curves={
            name: {measure: table[measure].reshape(shape)[index] for measure in MEASURES}
            for index, name in enumerate(VARIANTS)
        },
    )
