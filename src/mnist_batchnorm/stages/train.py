"""Stage train: both networks at once, each in a process of its own, shown and recorded by this one.

The process of a network is ``python -m mnist_batchnorm.stages.train VARIANT``; it tells of its progress in
JSON lines. This one imports neither PyTorch nor MLflow.
"""

import sys

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training.live import live_runs
from mnist_batchnorm.training.processes import train
from mnist_batchnorm.training.worker import main


@click.command()
@click.argument("variants", nargs=-1, type=click.Choice(VARIANTS), metavar="[bn] [plain]")
@click.option(
    "--seeds", type=click.IntRange(2, 10_000), metavar="N", help="Seeds 0 to N-1; see below."
)
def command(variants: tuple[str, ...], seeds: int | None) -> None:
    """Train the networks; write their weights, learning curves and last epochs' metrics.

    Both at once, or those named. What is interrupted goes on after its last whole epoch when the
    same command runs again, to the same result, bit for bit.

    With --seeds, train both from N seeds instead, as one computation each, and write how far their
    accuracies differ to reports/metrics/seeds.json, as `mnist-bn seeds` does.
    """
    if seeds and variants:
        raise click.UsageError("--seeds trains both networks: leave their names out")
    load_params()  # so that a mistake in it is told once
    if seeds:
        from mnist_batchnorm.training.replicas import run

        run(seeds)
        return
    with live_runs() as tracker:
        train(list(dict.fromkeys(variants or VARIANTS)), tracker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
