"""Stage evaluate: both networks on the test images, held back until training has ended."""

import click
import numpy as np

from mnist_batchnorm.artifacts.metrics import TEST_METRICS, EvaluationMetrics
from mnist_batchnorm.artifacts.predictions import write_confusion, write_predictions
from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import CHECKPOINTS, TEST_SPLIT, VARIANTS
from mnist_batchnorm.network.evaluation import compute_logits, evaluate
from mnist_batchnorm.network.model import load_checkpoint


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS), metavar="[bn] [plain]")
def command(variants: tuple[str, ...]) -> None:
    """Measure the networks on the test images: those named, by default both."""
    params = load_params().evaluate
    test = load_split(TEST_SPLIT)
    inputs = network_input(test.images)
    evaluations = {}
    for variant in variants or VARIANTS:
        path = CHECKPOINTS[variant]
        logits = compute_logits(load_checkpoint(path).model(), inputs, params.batch_size)
        if not np.isfinite(logits).all():
            raise CheckFailedError(f"{path} gives logits that are not finite; train it again")
        evaluations[variant] = evaluate(logits, test.labels, params.calibration_bins)
    for variant, evaluation in evaluations.items():
        metrics = EvaluationMetrics.model_validate(evaluation, from_attributes=True)
        metrics.write(TEST_METRICS[variant])
        write_confusion(variant, evaluation.confusion)
        write_predictions(variant, test, evaluation.predicted, evaluation.probability)
        click.echo(
            f"{variant}: test accuracy {metrics.accuracy:.4f}, loss {metrics.loss:.4f}, "
            f"calibration error {metrics.calibration_error:.4f}"
        )
