"""Stage seeds: both networks from many seeds, and how far their accuracies differ."""

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.training.seeds import train_and_summarize


@click.command()
def command() -> None:
    """Train both networks from many seeds and write how far their accuracies differ.

    The number of seeds is seeds.count in params.yaml; `mnist-bn train --seeds N` overrides it.
    """
    train_and_summarize(load_params().seeds.count)
