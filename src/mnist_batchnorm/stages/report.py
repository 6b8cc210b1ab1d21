"""Stage report: the plots, one self-contained page and the model card."""

import click

from mnist_batchnorm.core.paths import REPORTS
from mnist_batchnorm.reporting.page import write_report
from mnist_batchnorm.reporting.results import read_results


@click.command()
def command() -> None:
    """Draw the plots and write the HTML report and the model card (reports)."""
    results = read_results()
    write_report(results, REPORTS)
    accuracy = {variant: n.test.accuracy for variant, n in results.networks.items()}
    click.echo(f"test accuracy: batch norm {accuracy['bn']:.4f}, plain {accuracy['plain']:.4f}")
    click.echo(f"parity: {'proven' if results.parity.proven else 'NOT PROVEN'}")
    click.echo(f"read {REPORTS / 'index.html'}")
