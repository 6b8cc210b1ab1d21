"""Runs and notes that commit 1098850 wrote, when all modules lay in one folder, stay valid.

``fixtures/flat_layout`` has outputs with the ``dvc.lock`` of that layout, and ``runs.json`` the
names, parameters and tags that the commit gave their runs.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.artifacts.metrics import TrainMetrics
from mnist_batchnorm.core.files import fingerprint
from mnist_batchnorm.lineage.git import Provenance
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity, SeedsIdentity
from mnist_batchnorm.mlflow_sync.run_store import RunStore
from mnist_batchnorm.mlflow_sync.up_to_date import load_note
from tests.conftest import ROOT
from tests.support import store
from tests.support.store import curve

COMMITTED = Provenance("f" * 40, recorded=True)


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store.use_settings(monkeypatch)
    shutil.copytree(ROOT / "tests/fixtures/flat_layout", project, dirs_exist_ok=True)
    return project


@pytest.fixture
def identities(folder: Path) -> dict[str, RunIdentity]:
    assert folder
    seeds = SeedsIdentity.of_summary("cpu", 2)
    network = RunIdentity.of_files("bn", TrainMetrics(device="cpu", torch="2.15.0"))
    return {"network": network, "seeds": seeds, "seed": seeds.of_seed("plain", 1)}


@pytest.fixture
def recorded(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs.json").read_text())
    return content


@pytest.mark.parametrize("kind", ["network", "seeds", "seed"])
def test_runs_have_the_same_names_parameters_and_tags(
    kind: str, identities: dict[str, RunIdentity], recorded: dict[str, Any]
) -> None:
    identity = identities[kind]
    tags = identity.tags(COMMITTED)
    tags.pop("mlflow.user", None)
    assert recorded[kind] == {
        "name": identity.run_name(COMMITTED),
        "params": identity.logged_params(),
        "tags": tags,
    }


def test_finished_run_is_found_and_keeps_its_points(
    folder: Path, identities: dict[str, RunIdentity], recorded: dict[str, Any]
) -> None:
    (folder / "mlflow.db").write_bytes(store.empty_database())
    opened = RunStore.open("mnist-batchnorm", folder)
    old = recorded["network"]
    run = opened.client.create_run(opened.experiment_id, tags=old["tags"], run_name=old["name"])
    for name, value in old["params"].items():
        opened.client.log_param(run.info.run_id, name, value)
    for metric, step, value, time in curve(2):
        opened.client.log_metric(run.info.run_id, metric, value, time, step)
    opened.client.set_terminated(run.info.run_id)
    weights = old["tags"]["mnist_bn.weights_sha256"]
    assert opened.find_by_weights(weights) == run.info.run_id
    assert opened.record(identities["network"], curve(2), "FINISHED") == run.info.run_id
    (after,) = store.all_runs(folder)
    assert (after.info.status, after.data.params) == ("FINISHED", old["params"])
    assert len(store.history(folder, after, "curves/train_loss")) == 2


def test_note_of_a_sync_is_read(folder: Path) -> None:
    state = {
        "state": "0" * 64,
        "runs": ["1"],
        "seeds": ["2"],
        "models": ["m-3"],
        "aliases": {"mnist-bn": {"champion": "1"}},
        "folders": ["mlartifacts/1"],
        "lacking": [],
    }
    entry = fingerprint({"uri": f"sqlite:///{folder}/mlflow.db", "everything": False})
    (folder / "mlflow.db.synced").write_text(json.dumps({entry: state}))
    note = load_note(folder, everything=False)
    assert note is not None
    assert vars(note) == state
