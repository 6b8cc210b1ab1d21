"""Stage train: both networks in parallel, each in a process of its own (`training.worker`).

This process shows and records their progress; it imports neither PyTorch nor MLflow.
"""

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training.live import live_runs
from mnist_batchnorm.training.processes import train_in_parallel


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS), metavar="[bn] [plain]")
@click.option(
    "--seeds", type=click.IntRange(2, 10_000), metavar="N", help="Seeds 0 to N-1; see below."
)
def command(variants: tuple[str, ...], seeds: int | None) -> None:
    """Train the networks; write their weights, learning curves and last epochs' metrics.

    Both in parallel, or those named. An interrupted training resumes after its last whole epoch
    when the same command runs again, with the same result, bit for bit.

    With --seeds, train both from N seeds instead, as one computation each, and write how far their
    accuracies differ to reports/metrics/seeds.json, as `mnist-bn seeds` does.
    """
    if seeds and variants:
        raise click.UsageError("--seeds trains both networks: leave their names out")
    load_params()  # so that a mistake in params.yaml is reported once, not by each process
    if seeds:
        from mnist_batchnorm.training.seeds import train_and_summarize

        train_and_summarize(seeds)
        return
    with live_runs() as tracker:
        train_in_parallel(list(dict.fromkeys(variants or VARIANTS)), tracker)
