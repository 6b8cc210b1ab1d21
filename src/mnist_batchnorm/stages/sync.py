"""Stage sync: update MLflow to match the files, which are the truth.

RunStore that are missing, incomplete or were interrupted are completed from ``reports/`` and
``models/``, and the model registry from ``models/registry.json``. Idempotent, also when two syncs
run at once.
"""

import click

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.core.paths import REGISTRY, SYNCED, repository
from mnist_batchnorm.mlflow_sync.up_to_date import is_up_to_date, source_state, synced_files


@click.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also what every commit and DVC experiment holds whose outputs are in DVC's cache.",
)
@click.option("--require", is_flag=True, help="Fail unless MLflow has all of it afterwards.")
def command(everything: bool, require: bool) -> None:
    """Update MLflow to match the files.

    Completes runs, their artifacts, and the model registry. A store that cannot be reached is worth
    a warning, not a failed pipeline: nothing is lost, the same command goes on later. Exit status:
    0 done or warned; 1 with --require, MLflow does not have all of it; 2 there are no results.
    """
    root = repository()
    files = synced_files()
    state = source_state(root, everything, files)
    if is_up_to_date(root, everything, state):
        click.echo("MLflow has all of it")
    else:
        from mnist_batchnorm.mlflow_sync.sync import update_mlflow

        lines = update_mlflow(root, everything, state)
        for line in lines:
            click.echo(line)
        if require and not lines:
            raise CheckFailedError("MLflow does not have all of it")
    # DVC's output depends on the files alone, whether the store could be reached or not
    record = {path: sha256 for path, sha256 in files.items() if path != REGISTRY.as_posix()}
    write_json(SYNCED, {"files": record})
