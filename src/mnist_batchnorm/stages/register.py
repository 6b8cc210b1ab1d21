"""Stage register: the ONNX files become a version, and champion if every rule allows it.

The champion is decided here, from files, and recorded in a file; MLflow's model registry shows it.
"""

import click

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.promotion.registration import register
from mnist_batchnorm.promotion.rules import format_decision


@click.command()
@click.option("--require", is_flag=True, help="Fail unless these files are then the champion.")
def command(require: bool) -> None:
    """Register models/bn.onnx and bn-folded.onnx, and make them champion if every rule allows it.

    Writes models/registry.json and reports/promotion.json. Exit status: 0 judged, whatever the
    outcome; 1 with --require, they are not the champion; 2 there is nothing to judge.
    """
    ledger, version = register(load_params().registration)
    decision = version.decision
    click.echo(f"version {version.version}: {decision.outcome}")
    click.echo(format_decision(decision))
    click.echo(ledger.headline)
    if require and decision.outcome == "refused":
        raise CheckFailedError(
            f"version {version.version} is not the champion: {decision.describe_refusals()}"
        )
