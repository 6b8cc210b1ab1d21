"""Stage sync: bring MLflow to the state of the files, and leave alone what is there.

The files are the truth and MLflow is a view of them: runs that are missing, half written or were
interrupted are completed from ``reports/`` and ``models/``, and its model registry from
``models/registry.json``. Doing it twice, or two at once, is doing it once.
"""

import click

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import hashes, write_json
from mnist_batchnorm.core.paths import REGISTRY, SYNCED, repository
from mnist_batchnorm.mlflow_sync.sync import _bring
from mnist_batchnorm.mlflow_sync.up_to_date import remembered, state_of, still_there, told_of


@click.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also what every commit and DVC experiment holds whose outputs are in DVC's cache.",
)
@click.option("--require", is_flag=True, help="Fail unless MLflow has all of it afterwards.")
def command(everything: bool, require: bool) -> None:
    """Bring MLflow to the state of the files.

    Completes runs, their artefacts, and the model registry. A store that cannot be reached is worth
    a warning, not a failed pipeline: nothing is lost, the same command goes on later. Exit status:
    0 done or warned; 1 with --require, MLflow does not have all of it; 2 there is nothing to tell.
    """
    root = repository()
    record = {"files": hashes([path for path in told_of() if path != REGISTRY])}
    state = state_of(root, everything)
    held = remembered(root, everything)
    if held and held.state == state and still_there(root, held):
        click.echo("MLflow has all of it")
    else:
        lines = _bring(root, everything, state)
        for line in lines:
            click.echo(line)
        if require and not lines:
            raise CheckFailedError("MLflow does not have all of it")
    # DVC's out, about what was to be told: the same whether the store could be reached or not
    write_json(SYNCED, record)
