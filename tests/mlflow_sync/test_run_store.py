"""MLflow's store: telling it of a run twice, late or in parts is telling it once."""

import logging
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS, VARIANTS, repository
from mnist_batchnorm.mlflow_sync import run_store as stores
from mnist_batchnorm.mlflow_sync.connection import warn
from mnist_batchnorm.mlflow_sync.points import CURVE, Point
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity, SeedsIdentity
from mnist_batchnorm.mlflow_sync.run_store import RunStore
from mnist_batchnorm.mlflow_sync.uri import tracking_uri
from tests.support import store
from tests.support.store import curve, row

EXPERIMENT = "mnist-batchnorm"


@pytest.fixture
def local(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, ready to be trained in, with an empty database."""
    store.use_settings(monkeypatch)
    store.make_trainable(project)
    (project / "mlflow.db").write_bytes(store.empty_database())
    return project


@pytest.fixture
def folder(local: Path, backend: str) -> Path:
    """The same with a store of either kind."""
    assert backend
    return local


@pytest.fixture
def opened(folder: Path) -> RunStore:
    return RunStore.open(EXPERIMENT, folder)


# --- the store ----------------------------------------------------------------------------------


def test_default_store_is_in_dvc_root(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(repository()) == f"sqlite:///{local}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # an experiment in a temporary copy
    assert tracking_uri(repository()) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://server:5000", "http://server:5000"),
        ("sqlite:////srv/runs.db", "sqlite:////srv/runs.db"),
        ("sqlite:///runs.db", "sqlite:////root/runs.db"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_tracking_uri_of_the_user_goes_first(
    monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(Path("/root")) == used


def test_mlflow_keeps_quiet_whoever_imported_it_first(local: Path) -> None:
    logging.getLogger("mlflow").setLevel(logging.INFO)
    RunStore.open(EXPERIMENT, local)
    assert logging.getLogger("mlflow").level == logging.WARNING


def test_artefacts_are_beside_the_database_wherever_the_process_runs(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "with space and ü"
    root.mkdir()
    shutil.copy(local / "mlflow.db", root)
    monkeypatch.chdir(tmp_path)
    opened = RunStore.open(EXPERIMENT, root)
    run = opened.client.create_run(opened.experiment_id)
    opened.client.log_text(run.info.run_id, "text", "note.txt")
    assert [path.read_text() for path in root.glob("mlartifacts/**/note.txt")] == ["text"]


def test_database_whose_creation_fails_is_not_left_behind(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local / "mlflow.db").unlink()

    def killed(uri: str, _artifacts: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise KeyboardInterrupt

    from mlflow.store.tracking import sqlalchemy_store

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", killed)
    with pytest.raises(KeyboardInterrupt):
        RunStore.open(EXPERIMENT, local)
    assert {path.name for path in local.glob("*mlflow*")} <= {"mlflow.db.lock"}


@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_server_is_noticed_in_seconds(
    local: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[], AbstractContextManager[str]]
) -> None:
    start = time.monotonic()
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(Exception, match=r"127\.0\.0\.1"):
            RunStore.open(EXPERIMENT, local)
    assert time.monotonic() - start < 4  # the hanging one: the timeout of 1 s


def test_warning_is_one_line_without_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@server:5000")
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as refused:
            raise RuntimeError("http://user:secret@server:5000/api: long\nstory") from refused
    except RuntimeError as error:
        warn(error, tmp_path)
        error.__cause__ = None
        error.__context__ = None
        warn(error, tmp_path)
    start = "warning: MLflow at http://server:5000: "
    assert capsys.readouterr().err.splitlines() == [
        f"{start}[Errno 111] Connection refused",
        f"{start}http://server:5000/api: long",
    ]


# --- recording ----------------------------------------------------------------------------------


def test_run_holds_what_made_it(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cuda:0")
    opened.record(identity, curve(1), "RUNNING")
    (run,) = store.all_runs(folder)
    assert run.info.run_name == "workspace/bn"
    assert run.info.status == "RUNNING"
    assert (
        run.data.params.items()
        >= {
            "variant": "bn",
            "batch_norm": "true",
            "prepare.valid_size": "5000",
            "train.lr": "0.01",
            "train.hidden": "[32, 32]",
            "train.device": "auto",
        }.items()
    )
    assert (
        run.data.tags.items()
        >= {
            "mnist_bn.key": identity.key,
            "mnist_bn.variant": "bn",
            "mnist_bn.device": "cuda",
            "dvc.stage": "train",
        }.items()
    )
    checked = subprocess.run(
        ["md5sum", "-c", "--strict"], input=run.data.tags["dvc.deps"] + "\n", text=True, check=False
    )
    assert checked.returncode == 0
    inputs = {
        tag.value: (given.dataset.name, given.dataset.digest, given.dataset.source)
        for given in run.inputs.dataset_inputs
        for tag in given.tags
    }
    assert inputs == {
        context: (split, identity.deps[path], f'{{"uri": "{path}"}}')
        for context, split in (("training", "train"), ("validation", "valid"))
        for path in [f"data/prepared/{split}.safetensors"]
    }


def test_epochs_arrive_with_their_steps(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("plain", "cpu")
    run_id = opened.record(identity, [], "RUNNING")
    for epochs in (1, 2, 3):
        assert opened.record(identity, curve(epochs), "RUNNING") == run_id
    opened.record(identity, curve(3), "FINISHED")
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    for name, metric in CURVE.items():
        assert store.history(folder, run, metric) == [(e, row(e)[name]) for e in (1, 2, 3)]


def test_training_the_same_again_changes_nothing(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    opened.record(identity, curve(2), "FINISHED")
    (before,) = store.all_runs(folder)
    for epochs, status in ((0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING"), (2, "FINISHED")):
        opened.record(identity, curve(epochs), status)
        (after,) = store.all_runs(folder)
        assert after.to_dictionary() == before.to_dictionary()
    assert len(store.history(folder, before, "curves/train_loss")) == 2


def test_failure_of_a_repetition_does_not_unfinish_a_run(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    opened.record(identity, curve(2), "FINISHED")
    opened.record(identity, curve(1), "FAILED")
    assert [run.info.status for run in store.all_runs(folder)] == ["FINISHED"]


def test_interrupted_run_is_taken_up_again(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    opened.record(identity, curve(1), "KILLED")
    assert [run.info.status for run in store.all_runs(folder)] == ["KILLED"]
    opened.record(identity, curve(2), "RUNNING")
    assert [run.info.status for run in store.all_runs(folder)] == ["RUNNING"]
    opened.record(identity, curve(3), "FINISHED")
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(folder, run, "curves/valid_loss")] == [1, 2, 3]


def test_params_and_datasets_that_an_outage_cut_off_are_completed(
    folder: Path, opened: RunStore
) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    tags = identity.tags(identity.provenance(opened.history))
    run = opened.client.create_run(opened.experiment_id, tags=tags)
    opened.client.log_param(run.info.run_id, "variant", "bn")
    assert opened.record(identity, curve(1), "RUNNING") == run.info.run_id
    (run,) = store.all_runs(folder)
    assert run.data.params == identity.logged_params()
    assert len(run.inputs.dataset_inputs) == 2


def test_other_numbers_from_the_same_inputs_are_another_run(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    first = opened.record(identity, curve(2), "FINISHED")
    other_machine = [opened.record(identity, curve(e, loss=0.6), "RUNNING") for e in (1, 2)]
    assert len({first, *other_machine}) == 2
    assert opened.record(identity, curve(2, loss=0.6), "FINISHED") == other_machine[0]
    assert opened.record(identity, curve(2), "FINISHED") == first
    lengths = [len(store.history(folder, r, "curves/train_loss")) for r in store.all_runs(folder)]
    assert lengths == [2, 2]


def test_deleted_run_is_recorded_anew(folder: Path, opened: RunStore) -> None:
    identity = RunIdentity.of_workspace("bn", "cpu")
    opened.client.delete_run(opened.record(identity, curve(1), "FINISHED"))
    opened.record(identity, curve(1), "FINISHED")
    assert len(store.all_runs(folder)) == 1


def test_curve_longer_than_a_request_takes(folder: Path, opened: RunStore) -> None:
    opened.record(RunIdentity.of_workspace("bn", "cpu"), curve(300), "FINISHED")
    (run,) = store.all_runs(folder)
    assert len(store.history(folder, run, "curves/train_loss")) == 300


# --- seeds ---------------------------------------------------------------------------------------

PAIRS = [(variant, seed) for variant in VARIANTS for seed in (0, 1)]
SUMMARY = [Point("seeds/bn_test_accuracy_mean", 0, 0.97, 1700000000000)]


def seed_curve(variant: str, seed: int) -> list[Point]:
    value = 0.9 + 0.01 * seed + (0.02 if variant == "bn" else 0)
    return [
        *(Point("seed_curves/valid_accuracy", e, value + 0.001 * e, 1) for e in (1, 2)),
        Point("seed_test/accuracy", 0, value, 1),
    ]


RUNS_OF_SEEDS = {pair: seed_curve(*pair) for pair in PAIRS}


@pytest.fixture
def over_seeds(folder: Path) -> SeedsIdentity:
    for path in (SEEDS, SEED_CURVES):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("figures")
    return SeedsIdentity.of_summary("cpu", 2)


class Counting:
    """MLflow's client, with a count of the calls of each method, and trouble at one of them."""

    def __init__(self, client: Any, method: str = "", good: int = 0) -> None:
        self.client, self.method, self.good = client, method, good
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        if name == self.method and self.calls[name] > self.good:
            raise ConnectionResetError("server restarts")
        return getattr(self.client, name)


def test_runs_of_seeds_are_nested_in_one_over_all(
    folder: Path, opened: RunStore, over_seeds: SeedsIdentity
) -> None:
    run_id = opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    found = {run.info.run_name: run for run in store.all_runs(folder)}
    parent = found.pop("workspace/seeds")
    assert parent.info.run_id == run_id
    assert parent.data.metrics == {"seeds/bn_test_accuracy_mean": 0.97}
    params = parent.data.params
    assert (params["seeds.count"], params["train.lr"]) == ("2", "0.01")
    assert not {"variant", "batch_norm", "train.seed"} & params.keys()
    assert len(parent.inputs.dataset_inputs) == 2
    assert found.keys() == {f"workspace/seeds/{variant}-{seed}" for variant, seed in PAIRS}
    for variant, seed in PAIRS:
        run = found[f"workspace/seeds/{variant}-{seed}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == run_id
        assert run.data.tags["mnist_bn.variant"] == run.data.params["variant"] == variant
        assert run.data.tags["dvc.stage"] == "seeds"
        assert run.data.tags["mlflow.source.name"] == "mnist-bn train --seeds 2"
        assert run.data.params["train.seed"] == str(seed)
        *points, (_, _, last, _) = seed_curve(variant, seed)
        curve = [(step, value) for _, step, value, _ in points]
        assert store.history(folder, run, "seed_curves/valid_accuracy") == curve
        assert run.data.metrics["seed_test/accuracy"] == last


def test_runs_of_seeds_take_few_requests_and_none_that_write_when_they_are_there(
    folder: Path, opened: RunStore, over_seeds: SeedsIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "client", first := Counting(opened.client))
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    assert first.calls.total() == 20  # three for each run, and five
    before = [run.to_dictionary() for run in store.all_runs(folder)]
    monkeypatch.setattr(opened, "client", second := Counting(first.client))
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    assert second.calls == {"search_runs": 2}
    assert [run.to_dictionary() for run in store.all_runs(folder)] == before


@pytest.mark.parametrize(
    ("method", "good"),
    [
        ("create_run", 1),
        ("create_run", 3),
        ("log_batch", 0),
        ("log_batch", 4),
        ("set_terminated", 0),
        ("set_terminated", 4),
        ("log_inputs", 0),
    ],
)
def test_runs_of_seeds_that_an_outage_cut_off_are_completed(
    folder: Path,
    opened: RunStore,
    over_seeds: SeedsIdentity,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    good: int,
) -> None:
    monkeypatch.setattr(stores, "RUNS_PER_REQUEST", 2)
    client = opened.client
    monkeypatch.setattr(opened, "client", Counting(client, method, good))
    with pytest.raises(ConnectionResetError):
        opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    monkeypatch.setattr(opened, "client", client)
    statuses = [run.info.status for run in store.all_runs(folder)]
    assert "RUNNING" in statuses
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    found = store.all_runs(folder)
    assert [run.info.status for run in found] == ["FINISHED"] * 5
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name["workspace/seeds"].inputs.dataset_inputs) == 2
    for variant, seed in PAIRS:
        run = by_name[f"workspace/seeds/{variant}-{seed}"]
        assert run.data.params == over_seeds.of_seed(variant, seed).logged_params()
        assert len(store.history(folder, run, "seed_curves/valid_accuracy")) == 2


class Twice:
    """MLflow's client, and another machine that creates the same runs at the same time."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def create_run(self, *arguments: Any, **keywords: Any) -> Any:
        self.client.create_run(*arguments, **keywords)
        return self.client.create_run(*arguments, **keywords)


def test_runs_of_seeds_that_another_machine_makes_meanwhile_are_kept_once(
    folder: Path, opened: RunStore, over_seeds: SeedsIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "client", Twice(opened.client))
    run_id = opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    found = {run.info.run_name: run for run in store.all_runs(folder)}
    assert len(found) == len(store.all_runs(folder)) == 5
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert sorted(opened.nested_ids([run_id])) == sorted(
        run.info.run_id for name, run in found.items() if name != "workspace/seeds"
    )


def test_other_figures_over_seeds_are_other_runs(
    folder: Path, opened: RunStore, over_seeds: SeedsIdentity
) -> None:
    first = opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    SEEDS.write_text("figures of another machine")
    other = SeedsIdentity.of_summary("cpu", 2)
    assert opened.record_seeds(other, SUMMARY, RUNS_OF_SEEDS) != first
    assert opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS) == first
    assert len(store.all_runs(folder)) == 10


def test_deleted_run_of_a_seed_is_recorded_anew(
    folder: Path, opened: RunStore, over_seeds: SeedsIdentity
) -> None:
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    gone = next(r for r in store.all_runs(folder) if r.info.run_name == "workspace/seeds/bn-1")
    opened.client.delete_run(gone.info.run_id)
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    assert len(store.all_runs(folder)) == 5
