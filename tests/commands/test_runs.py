"""`mnist-bn runs`: a line for each run, beside the commit and the experiments of its result."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params
from tests.conftest import MnistBn
from tests.support import recorded, store


@pytest.fixture(scope="module")
def known(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results git, two experiments and MLflow have."""
    folder = tmp_path_factory.mktemp("known") / "project"
    recorded.record(folder, prepared, params)
    head = recorded.git(folder, "rev-parse", "HEAD")
    for name in ("wide", "narrow"):
        recorded.git(folder, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", head)
    recorded.sync(folder)
    return folder


@pytest.fixture
def folder(known: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as working folder."""
    store.use_settings(monkeypatch)
    monkeypatch.chdir(known)
    return known


def listed(mnist_bn: MnistBn) -> list[Any]:
    done = mnist_bn("runs", "--json")
    assert (done.status, done.err) == (0, "")
    found: list[Any] = json.loads(done.out)
    return found


def test_json_has_a_run_of_each_result(folder: Path, mnist_bn: MnistBn) -> None:
    by_name = {run["name"]: run for run in listed(mnist_bn)}
    assert by_name.keys() == {"narrow/bn", "narrow/plain", "narrow/seeds"}
    ids = {run.info.run_name: run.info.run_id for run in store.all_runs(folder)}
    for variant in ("bn", "plain"):
        test = json.loads((folder / f"reports/metrics/test-{variant}.json").read_text())
        assert by_name[f"narrow/{variant}"] == {
            "run_id": ids[f"narrow/{variant}"],
            "name": f"narrow/{variant}",
            "stage": "train",
            "status": "FINISHED",
            "test_accuracy": test["accuracy"],
            "commit": recorded.git(folder, "rev-parse", "HEAD"),
            "dirty": False,
            "experiments": ["narrow", "wide"],
            "weights_sha256": digest(folder / f"models/{variant}.safetensors"),
        }


def test_table_has_a_line_a_run(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("runs")
    assert (done.status, done.err) == (0, "")
    head, *lines = [line.split("  ") for line in done.out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in [head, *lines]]
    assert cells[0] == [
        *("run", "name", "status", "test accuracy", "commit", "experiments", "weights")
    ]
    commit = recorded.git(folder, "rev-parse", "HEAD")[:7]
    for run, line in zip(listed(mnist_bn), cells[1:], strict=True):
        accuracy = "-" if run["test_accuracy"] is None else f"{run['test_accuracy']:.4f}"
        weights = (run["weights_sha256"] or "-")[:12]
        expected = [run["run_id"], run["name"], "finished", accuracy, commit]
        assert line == [*expected, "narrow, wide", weights]


def test_result_that_is_not_committed_has_a_plus(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("ml*"))
    monkeypatch.chdir(copy)
    before = recorded.git(copy, "rev-parse", "HEAD")
    store.write_checkpoint(copy / "models/plain.safetensors", "trained again")
    store.edit(copy / "params.yaml", "lr: 0.01", "lr: 0.02")
    recorded.write_lock()
    (copy / "mlflow.db").write_bytes(store.empty_database())
    assert mnist_bn("sync").status == 0
    lines = mnist_bn("runs").out.splitlines()
    (line,) = [line for line in lines if "  workspace/plain  " in line]
    assert f"  {before[:7]}+  -  " in line
    after = recorded.commit(copy, "again")
    assert mnist_bn("sync").status == 0
    (line,) = [line for line in mnist_bn("runs").out.splitlines() if "/plain  " in line]
    assert f"  {after[:7]}/plain  " in line
    assert f"  {after[:7]}  -  " in line


def test_store_without_runs_says_how_to_get_some(
    project: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.use_settings(monkeypatch)
    (project / "mlflow.db").write_bytes(store.empty_database())
    done = mnist_bn("runs")
    assert done.status == 2
    assert "no run has been tracked yet; run `dvc repro sync` first" in done.err
    assert store.client(project).get_experiment_by_name("mnist-batchnorm") is None  # it only reads
    store.client(project).create_experiment("mnist-batchnorm")
    done = mnist_bn("runs")
    assert (done.status, done.err) == (0, "")
    assert done.out == (f"no runs in sqlite:///{project}/mlflow.db; `mnist-bn sync` logs them\n")
    assert json.loads(mnist_bn("runs", "--json").out) == []


def test_without_a_store_it_is_a_line(
    project: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.use_settings(monkeypatch)
    done = mnist_bn("runs")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        f"error: no run has been tracked yet: no sqlite:///{project}/mlflow.db; "
        "run `dvc repro sync` first\n"
    )
    (project / "mlflow.db").write_text("garbage")
    done = mnist_bn("runs")
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: MLflow at sqlite:///{project}/mlflow.db: ")


@pytest.mark.parametrize("server", store.BAD_SERVERS)
@pytest.mark.usefixtures("folder")
def test_bad_server_is_a_line(
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    server: Callable[[], AbstractContextManager[str]],
) -> None:
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", "//user:secret@"))
        done = mnist_bn("runs")
    assert (done.status, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: MLflow at {uri}: ")
    assert "secret" not in line
