"""Command runs: MLflow's runs with the commits and DVC experiments of their results."""

import json
from typing import TYPE_CHECKING, Any

import click

from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.run_identity import EXPERIMENT_TAG, WEIGHTS_TAG
from mnist_batchnorm.mlflow_sync.run_store import PARENT_TAG, reading
from mnist_batchnorm.mlflow_sync.uri import without_password

if TYPE_CHECKING:
    from mlflow.entities import Run

COLUMNS = ("run", "name", "status", "test accuracy", "commit", "experiments", "weights")


def describe(run: "Run") -> dict[str, Any]:
    """Return a run as ``--json`` prints it."""
    tags = run.data.tags
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "stage": tags.get("dvc.stage"),
        "status": run.info.status,
        "test_accuracy": run.data.metrics.get("test/accuracy"),
        "commit": tags.get("mlflow.source.git.commit"),
        "dirty": tags.get("mlflow.source.git.dirty") == "true",
        "experiments": tags[EXPERIMENT_TAG].split(", ") if EXPERIMENT_TAG in tags else [],
        "weights_sha256": tags.get(WEIGHTS_TAG),
    }


def row(run: dict[str, Any]) -> tuple[str, ...]:
    accuracy = run["test_accuracy"]
    return (
        run["run_id"],
        run["name"],
        run["status"].lower(),
        "-" if accuracy is None else f"{accuracy:.4f}",
        (run["commit"] or "-")[:7] + ("+" if run["dirty"] else ""),
        ", ".join(run["experiments"]) or "-",
        (run["weights_sha256"] or "-")[:12],
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(as_json: bool) -> None:
    """List MLflow's runs with their commits and DVC experiments, newest first.

    A + after a commit means that the result is not committed yet, but was made on top of that
    commit. The runs of single seeds are left out.
    """
    with reading(load_params().sync.experiment, repository()) as store:
        found = [describe(run) for run in store.search("") if PARENT_TAG not in run.data.tags]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"no runs in {without_password(store.uri)}; `mnist-bn sync` logs them")
        return
    table = [COLUMNS, *map(row, found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        click.echo("  ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)).rstrip())
