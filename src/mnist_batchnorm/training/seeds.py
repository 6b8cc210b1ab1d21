"""Many seeds: train both networks from each, and write the statistics over the seeds.

A single run shows the result of one seed; how far the networks differ beyond the influence of the
seed takes many. Replica i equals a single run with seed i, in the senses of
tests/training/test_fused.py.
"""

from typing import TYPE_CHECKING

import click
import numpy as np

from mnist_batchnorm.artifacts.seeds import (
    MEASURES,
    Difference,
    Moments,
    SeedDifferences,
    SeedMeasures,
    SeedMetrics,
    SeedRuns,
    write_seeds,
)
from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.core.errors import as_expected_error
from mnist_batchnorm.core.files import discard
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training.reproducible import make_reproducible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mnist_batchnorm.training.replicas import Replicas

CONFIDENCE = 0.95


def train_and_summarize(count: int) -> None:
    """Train from seeds 0 to ``count`` - 1; write and print the statistics."""
    params = load_params().train
    if params.portable:
        make_reproducible()
    from mnist_batchnorm.training.replicas import train_seeds  # PyTorch, after its settings

    try:
        results = train_seeds(range(count), params)
    except KeyboardInterrupt:
        click.echo("the same command goes on after the last whole epoch of each network", err=True)
        raise
    except (MemoryError, RuntimeError) as error:
        if expected := as_expected_error(error):
            raise expected from None
        raise
    runs = summarize(results)
    write_seeds(runs)
    for replicas in results.values():
        discard(replicas.checkpoint)
    for variant in VARIANTS:
        accuracy = runs.metrics[variant].test_accuracy
        click.echo(f"{variant}: test accuracy {accuracy.mean:.4f} ± {accuracy.sd:.4f} (sd)")
    low, high = runs.metrics.difference.interval_95
    click.echo(f"bn - plain: {low:+.4f} to {high:+.4f} (95 % interval of the mean, paired)")


def summarize(results: "Mapping[str, Replicas]") -> SeedRuns:
    """Compute the statistics over the replicas of both networks, paired by seed."""
    accuracy = {variant: np.array(results[variant].test_accuracy) for variant in VARIANTS}
    measures = {
        variant: SeedMeasures(
            test_accuracy=moments(accuracy[variant]),
            test_loss=moments(np.array(results[variant].test_loss)),
        )
        for variant in VARIANTS
    }
    gain = accuracy["bn"] - accuracy["plain"]
    difference = Difference(**moments(gain).model_dump(), interval_95=confidence_interval(gain))
    rows = {variant: results[variant].rows for variant in VARIANTS}
    return SeedRuns(
        metrics=SeedMetrics(
            seeds=len(gain),
            device=results["bn"].device,
            bn=measures["bn"],
            plain=measures["plain"],
            bn_minus_plain=SeedDifferences(test_accuracy=difference),
        ),
        epoch=np.array([row["epoch"] for row in rows["bn"]], dtype=np.float64),
        curves={
            variant: {name: np.array([row[name] for row in rows[variant]]).T for name in MEASURES}
            for variant in VARIANTS
        },
    )


def moments(values: Float64) -> Moments:
    """Return the mean, the sample standard deviation and the values themselves."""
    return Moments(mean=float(values.mean()), sd=float(values.std(ddof=1)), values=values.tolist())


def confidence_interval(differences: Float64) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences, by Student's t.

    Paired, because the networks share their seeds, and so their initial linear layers and batches.
    """
    from scipy import special  # importing scipy.stats takes half a second longer

    error = differences.std(ddof=1) / len(differences) ** 0.5
    half = error * special.stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2)
    return float(differences.mean() - half), float(differences.mean() + half)
