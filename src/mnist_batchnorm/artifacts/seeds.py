"""TODO."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, FiniteFloat, model_validator

from mnist_batchnorm.artifacts.reading import Floats, Record, read_record, read_table
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS, VARIANTS

if TYPE_CHECKING:
    from mnist_batchnorm.training.replicas import Replicas

CONFIDENCE = 0.95


def summarize(results: "dict[str, Replicas]", seeds: Sequence[int]) -> dict[str, Any]:
    """Return the content of ``reports/metrics/seeds.json``: figures over seeds, by network.

    The interval is that of the mean of the paired differences, by Student's t: the two networks
    share their seeds, and so their initial linear layers and their batches.
    """
    accuracy = {variant: np.array(results[variant].test_accuracy) for variant in VARIANTS}
    gain = accuracy["bn"] - accuracy["plain"]
    return {
        "seeds": len(seeds),
        "device": results["bn"].device,
        **{
            variant: {
                "test_accuracy": moments(accuracy[variant]),
                "test_loss": moments(np.array(results[variant].test_loss)),
            }
            for variant in VARIANTS
        },
        "bn_minus_plain": {
            "test_accuracy": moments(gain) | {"interval_95": interval(gain)},
        },
    }


def moments(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return mean, sample standard deviation and the values themselves."""
    return {
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        "values": values.tolist(),
    }


def interval(differences: npt.NDArray[np.float64]) -> list[float]:
    """Return the confidence interval of the mean of paired differences, by Student's t."""
    from scipy import special  # scipy.stats takes half a second more to import

    error = differences.std(ddof=1) / len(differences) ** 0.5
    half = error * special.stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2)
    return [float(differences.mean() - half), float(differences.mean() + half)]


def curves(results: "dict[str, Replicas]", seeds: Sequence[int]) -> str:
    """Return the learning curves as CSV, a row an epoch of each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "epoch", "valid_loss", "valid_accuracy"])
    for variant, replicas in results.items():
        for index, seed in enumerate(seeds):
            for row in replicas.rows:
                loss, accuracy = row["valid_loss"][index], row["valid_accuracy"][index]
                writer.writerow([variant, seed, row["epoch"], loss, accuracy])
    return text.getvalue()


SEED_CURVE_COLUMNS = ("variant", "seed", "epoch", "valid_loss", "valid_accuracy")


class Moments(Record):
    """A figure over seeds: its mean, sample standard deviation, and value from each seed."""

    mean: FiniteFloat
    sd: FiniteFloat
    values: list[FiniteFloat]


class Difference(Moments):
    """A difference over seeds, and the 95 % interval of its mean."""

    interval_95: tuple[FiniteFloat, FiniteFloat]


class SeedMeasures(Record):
    """What one network came to on the test images."""

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
        """Return what one network came to."""
        return {"bn": self.bn, "plain": self.plain}[variant]

    @property
    def difference(self) -> Difference:
        """By how much batch norm is more accurate."""
        return self.bn_minus_plain.test_accuracy


@dataclass(frozen=True)
class SeedRuns:
    """What stage seeds found out about both networks, from seeds 0, 1, ...

    Attributes:
        metrics: after training.
        epoch: float64 ``[epochs]``.
        curves: for each network ``valid_loss`` and ``valid_accuracy``, float64 ``[seeds, epochs]``.
    """

    metrics: SeedMetrics
    epoch: Floats
    curves: dict[str, dict[str, Floats]]


def read_seeds() -> SeedRuns:
    """Gather what stage seeds wrote.

    Raises:
        UserError: A file is missing or malformed, or the two are about other runs.
    """
    metrics = read_record(SEEDS, SeedMetrics, "seeds")
    table = read_table(SEED_CURVES, SEED_CURVE_COLUMNS, "seeds", words={"variant": VARIANTS})
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
            name: {
                measure: table[measure].reshape(shape)[index]
                for measure in ("valid_loss", "valid_accuracy")
            }
            for index, name in enumerate(VARIANTS)
        },
    )
