"""What the tests of tracking share: an MLflow store, a folder to track from, and bad servers."""

import contextlib
import functools
import http.server
import json
import shutil
import socket
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import save_file

from mnist_batchnorm.core.paths import CHECKPOINT_KEY
from mnist_batchnorm.mlflow_sync.connection import ENVIRONMENT
from mnist_batchnorm.mlflow_sync.points import Point, curve_points
from mnist_batchnorm.mlflow_sync.run_identity import KEY_TAG
from mnist_batchnorm.mlflow_sync.run_store import PARENT_TAG, RunStore
from mnist_batchnorm.mlflow_sync.uri import tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DVC_YAML = """\
stages:
  seeds:
    cmd: mnist-bn seeds
    deps:
      - train.py
      - data/prepared/train.safetensors
      - data/prepared/valid.safetensors
    params:
      - seeds
      - train
  train:
    cmd: mnist-bn train
    deps:
      - train.py
      - data/prepared/train.safetensors
      - data/prepared/valid.safetensors
    params:
      - train
"""


@functools.cache
def empty_database() -> bytes:
    """MLflow's database without runs: it takes seconds to create, so once is enough."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow itself sets it for whoever comes after
        # an experiment remembers where its artefacts are: this one is none that a test uses
        RunStore.open("elsewhere", Path(folder))
        return (Path(folder) / "mlflow.db").read_bytes()


def move_artifacts(database: Path, old: Path, new: Path) -> None:
    """Change the folder of the artifacts in a SQLite database, which has absolute paths."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        columns = connection.execute(
            "SELECT m.name, p.name FROM sqlite_master m, pragma_table_info(m.name) p"
            " WHERE m.type = 'table' AND (p.name LIKE '%artifact%' OR p.name LIKE '%location%')"
        ).fetchall()
        for table, column in columns:
            connection.execute(
                f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?)', (str(old), str(new))
            )


def copy_project(source: Path, target: Path) -> None:
    """Copy a folder with its store, which then has its artifacts in the copy."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    move_artifacts(target / "mlflow.db", source, target)
    note = target / "mlflow.db.synced"
    if note.exists():
        note.unlink()  # it is about the source
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # by run id: the copy's runs have the same


def use_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what tracking sets for its process, so that it is undone after the test."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)


def make_trainable(folder: Path) -> None:
    """Write what stage train depends on, beside params.yaml."""
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "train.py").write_text("print('train')\n")
    prepared = folder / "data/prepared"
    prepared.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        if not (prepared / f"{split}.safetensors").exists():
            (prepared / f"{split}.safetensors").write_bytes(split.encode())


def row(epoch: int, loss: float = 0.5) -> dict[str, float]:
    """A row of a learning curve."""
    return {
        "epoch": epoch,
        "train_loss": loss / epoch,
        "train_accuracy": 1 - loss / epoch,
        "valid_loss": 1.1 * loss / epoch,
        "valid_accuracy": 1 - 1.1 * loss / epoch,
    }


def curve(epochs: int, loss: float = 0.5) -> list[Point]:
    """A learning curve of so many epochs."""
    return [point for epoch in range(1, epochs + 1) for point in curve_points(row(epoch, loss))]


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that a file holds."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def write_checkpoint(path: Path, content: str = "weights") -> None:
    """Write a file that says what a checkpoint says, and holds no numbers."""
    provenance = {"train_sha256": sha256(content.encode()).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({}, path, {CHECKPOINT_KEY: json.dumps({"provenance": provenance})})


def client(folder: Path) -> "MlflowClient":
    """Connect to the store of a folder: its database, or the server that is set."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri(folder), tracking_uri(folder))


def all_runs(folder: Path) -> "list[Run]":
    """Every run in the store, the oldest first."""
    found = client(folder)
    ids = [e.experiment_id for e in found.search_experiments()]
    result: list[Run] = found.search_runs(ids, order_by=["attributes.start_time ASC"])
    return result


def artifacts(folder: Path, run: "Run") -> dict[str, bytes]:
    """Every file that was logged to a run, by its path."""
    import mlflow.artifacts

    if not client(folder).list_artifacts(run.info.run_id):
        return {}
    uri = tracking_uri(folder)
    top = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, tracking_uri=uri))
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}


def stage_of(run: "Run") -> str:
    """The stage that a run is of."""
    stage: str = run.data.tags["dvc.stage"]
    return stage


def history(folder: Path, run: "Run", metric: str) -> list[tuple[int, float]]:
    """Every point of a metric, repeated ones too, by step."""
    points = client(folder).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def aliases(folder: Path) -> dict[str, dict[str, int]]:
    """Version of each alias, by registered model."""
    return {
        model.name: {alias: int(version) for alias, version in model.aliases.items()}
        for model in client(folder).search_registered_models()
    }


def shown(folder: Path) -> dict[str, Any]:
    """All that MLflow shows but ids and times: runs with every point, models, versions, aliases."""
    found, runs = client(folder), all_runs(folder)
    keys = {
        run.info.run_id: (
            run.info.run_name,
            *(run.data.tags[tag] for tag in (KEY_TAG, "dvc.stage")),
        )
        for run in runs
    }
    ids = [experiment.experiment_id for experiment in found.search_experiments()]
    models = found.search_logged_models(ids)
    kind = {model.model_id: (model.name, model.tags["sha256"]) for model in models}
    result = {
        "runs": {
            keys[run.info.run_id]: {
                "status": run.info.status,
                "params": run.data.params,
                "tags": {k: v for k, v in run.data.tags.items() if k != PARENT_TAG},
                "parent": keys.get(run.data.tags.get(PARENT_TAG, "")),
                "points": {m: history(folder, run, m) for m in run.data.metrics},
                "data": sorted(d.dataset.digest for d in run.inputs.dataset_inputs),
                "artifacts": artifacts(folder, run),
            }
            for run in runs
        },
        "models": sorted(
            (*kind[model.model_id], model.status, keys.get(model.source_run_id, ()), model.params)
            for model in models
        ),
        "versions": {
            (version.name, int(version.version)): (
                version.tags,
                version.description,
                keys.get(version.run_id),
                kind.get(version.source.removeprefix("models:/")),
            )
            for version in found.search_model_versions()
        },
        "aliases": aliases(folder),
    }
    assert len(result["runs"]) == len(runs), "two runs of one name and key"
    return result


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers every request with 500."""

    def do_GET(self) -> None:
        self.send_error(500)

    def do_POST(self) -> None:
        self.send_error(500)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """The address of a server that is down."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """The address of a server that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def failing() -> Iterator[str]:
    """The address of a server that answers 500."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


BAD_SERVERS = [refusing, hanging, failing]
