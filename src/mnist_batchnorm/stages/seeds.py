"""Stage seeds: both networks from many seeds, the replicas of each as one batched computation.

One run says what one seed gave. How much of the difference between the networks is the seed's, only
many runs can tell. A replica is the run of its seed; tests/test_engine.py says in what sense.
"""

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.training.replicas import run


@click.command()
def command() -> None:
    """Train both networks from many seeds and say how far their accuracies differ.

    How many, params.yaml says; `mnist-bn train --seeds N` takes another number.
    """
    run(load_params().seeds.count)
