"""Tool runs: MLflow's runs beside the commits and DVC experiments that hold their results."""

import json
from typing import TYPE_CHECKING, Any

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.run_identity import EXPERIMENT_TAG, WEIGHTS_TAG
from mnist_batchnorm.mlflow_sync.run_store import PARENT_TAG, opened
from mnist_batchnorm.mlflow_sync.uri import without_password

if TYPE_CHECKING:
    from mlflow.entities import Run

COLUMNS = ("run", "name", "status", "test accuracy", "commit", "experiments", "weights")


def describe(run: "Run") -> dict[str, Any]:
    """Return what ``--json`` prints of a run."""
    tags = run.data.tags
    dirty = tags.get("mlflow.source.git.dirty") == "true"
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "stage": tags.get("dvc.stage"),
        "status": run.info.status,
        "test_accuracy": run.data.metrics.get("test/accuracy"),
        "commit": tags.get("mlflow.source.git.commit"),
        "dirty": dirty,
        "experiments": tags[EXPERIMENT_TAG].split(", ") if EXPERIMENT_TAG in tags else [],
        "weights_sha256": tags.get(WEIGHTS_TAG),
    }


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """Return a run's cells in the table."""
    accuracy, weights = run["test_accuracy"], run["weights_sha256"]
    commit = (run["commit"] or "-")[:7] + ("+" if run["dirty"] else "")
    return (
        run["run_id"],
        run["name"],
        run["status"].lower(),
        "-" if accuracy is None else f"{accuracy:.4f}",
        commit,
        ", ".join(run["experiments"]) or "-",
        (weights or "-")[:12],
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(as_json: bool) -> None:
    """List MLflow's runs beside their commits and DVC experiments, the newest first.

    A + after a commit: the result is in no commit yet, that one is what it was made on top of. The
    runs of single seeds are left out.
    """
    with opened(load_params().sync.experiment, repository()) as runs:
        found = [describe(run) for run in runs.search("") if PARENT_TAG not in run.data.tags]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"no runs in {without_password(runs.uri)}; `mnist-bn sync` tells MLflow of them")
        return
    table = [COLUMNS, *map(row, found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        click.echo("  ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)).rstrip())
