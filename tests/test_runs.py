"""Which run a training is; telling MLflow of it twice, late or in parts is telling it once."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm import runs
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.layout import SEED_CURVES, SEEDS, VARIANTS, repository
from mnist_batchnorm.runs import Origin, Point, Runs, SeedsOrigin, curve_points
from tests import store

EXPERIMENT = "mnist-batchnorm"


def row(epoch: int, loss: float = 0.5) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train_loss": loss / epoch,
        "train_accuracy": 1 - loss / epoch,
        "valid_loss": 1.1 * loss / epoch,
        "valid_accuracy": 1 - 1.1 * loss / epoch,
    }


def curve(epochs: int, loss: float = 0.5) -> list[Point]:
    return [point for epoch in range(1, epochs + 1) for point in curve_points(row(epoch, loss))]


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, ready to be trained in, with an empty store."""
    store.use_settings(monkeypatch)
    store.make_trainable(project)
    (project / "mlflow.db").write_bytes(store.empty_database())
    return project


@pytest.fixture
def opened(folder: Path) -> Runs:
    return Runs.open(EXPERIMENT, folder)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- the key ------------------------------------------------------------------------------------


def test_key_is_the_same_for_the_same_training(folder: Path) -> None:
    key = Origin.of_workspace("bn", "cpu").key
    edit(folder / "params.yaml", "device: auto", "device: cpu")
    edit(folder / "params.yaml", "opset: 20", "opset: 19")
    edit(folder / "params.yaml", "lr: 0.01", "lr: 1.0e-2")
    assert Origin.of_workspace("bn", "cpu").key == key
    assert Origin.of_workspace("bn", "cuda:1").key == Origin.of_workspace("bn", "cuda").key


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params.yaml", "lr: 0.01", "lr: 0.003"),
        ("params.yaml", "batch_size: 32", "batch_size: 64"),
        ("train.py", "train", "train harder"),
        ("data/prepared/valid.safetensors", "valid", "other images"),
    ],
)
def test_key_changes_with_all_that_decides_the_result(
    folder: Path, file: str, old: str, new: str
) -> None:
    key = Origin.of_workspace("bn", "cpu").key
    edit(folder / file, old, new)
    assert Origin.of_workspace("bn", "cpu").key != key


def test_variant_and_kind_of_device_have_keys_of_their_own(folder: Path) -> None:
    origins = [("bn", "cpu"), ("plain", "cpu"), ("bn", "cuda")]
    assert len({Origin.of_workspace(*origin).key for origin in origins}) == 3


@pytest.fixture
def repro(folder: Path) -> Callable[[], None]:
    """Run a real `dvc repro` of a stage train that only writes its curves."""
    curves = [f"reports/curves/{variant}.csv" for variant in VARIANTS]
    edit(folder / "dvc.yaml", "mnist-bn train", f"tee {' '.join(curves)} < train.py")
    prepare = "stages:\n  prepare:\n    cmd: 'true'\n    params: [prepare]\n"
    edit(folder / "dvc.yaml", "stages:\n", prepare)
    over_seeds = [SEEDS.as_posix(), SEED_CURVES.as_posix()]
    made = "".join(f"      - {out}:\n          cache: false\n" for out in over_seeds)
    tee = f"tee {' '.join(over_seeds)} < train.py\n    outs:\n{made}"
    edit(folder / "dvc.yaml", "mnist-bn seeds\n", tee)
    with (folder / "dvc.yaml").open("a") as stream:
        outs = (f"      - {curve}:\n          cache: false\n" for curve in curves)
        stream.write("".join(["    outs:\n", *outs]))
    for name in ("curves", "metrics"):
        (folder / f"reports/{name}").mkdir(parents=True)
    env = os.environ | {"DVC_SITE_CACHE_DIR": str(folder.parent), "DVC_NO_ANALYTICS": "1"}

    def dvc(*arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments, "-q"]
        subprocess.run(command, cwd=folder, env=env, check=True)

    dvc("init", "--no-scm")
    return lambda: dvc("repro")


def test_key_from_dvc_lock_is_that_of_the_workspace_at_the_time(
    folder: Path, repro: Callable[[], None]
) -> None:
    at_the_time = Origin.of_workspace("bn", "cpu")
    plain = Origin.of_workspace("plain", "cpu")
    repro()
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    edit(folder / "train.py", "train", "train harder")
    assert Origin.of_curve("bn", "cpu") == at_the_time
    assert Origin.of_curve("plain", "cpu") == plain
    assert Origin.of_workspace("bn", "cpu").key != at_the_time.key
    # trained by hand since, so dvc.lock is about another curve
    (folder / "reports/curves/bn.csv").write_text("another curve")
    assert Origin.of_curve("bn", "cpu") == Origin.of_workspace("bn", "cpu")
    assert Origin.of_curve("plain", "cpu") == plain


def test_key_over_seeds_from_dvc_lock_is_that_of_the_workspace_at_the_time(
    folder: Path, repro: Callable[[], None]
) -> None:
    repro()
    at_the_time = SeedsOrigin.of_files("cpu", 5)
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    assert SeedsOrigin.of_files("cpu", 5) == at_the_time
    for path in (SEEDS, SEED_CURVES):  # other numbers, made without DVC
        usual = path.read_bytes()
        path.write_text("other seeds")
        other = SeedsOrigin.of_files("cpu", 5)
        assert (other.train.lr, at_the_time.train.lr) == (0.003, 0.01)
        assert other.key != at_the_time.key
        path.write_bytes(usual)


def test_without_dvc_lock_the_workspace_is_the_origin(folder: Path) -> None:
    assert Origin.of_curve("plain", "cpu") == Origin.of_workspace("plain", "cpu")


def test_dvc_lock_with_conflict_markers_is_an_error(folder: Path) -> None:
    (folder / "dvc.lock").write_text("<<<<<<< HEAD\nstages:\n=======\n")
    with pytest.raises(UserError, match=r"dvc\.lock cannot be used, run `dvc repro`"):
        Origin.of_curve("bn", "cpu")


def test_missing_dependency_is_named(folder: Path) -> None:
    (folder / "data/prepared/valid.safetensors").unlink()
    with pytest.raises(UserError, match=r"data/prepared/valid\.safetensors.*run `dvc repro train`"):
        Origin.of_workspace("bn", "cpu")


@pytest.mark.parametrize("text", ["stages: {}", "stages: [", "just text"])
def test_unusable_dvc_yaml_is_an_error(folder: Path, text: str) -> None:
    (folder / "dvc.yaml").write_text(text)
    with pytest.raises(UserError, match=r"dvc\.yaml: no deps of stage train can be read"):
        Origin.of_workspace("bn", "cpu")


def test_folder_without_dvc_yaml_is_an_error(folder: Path) -> None:
    (folder / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"no dvc\.yaml in"):
        Origin.of_workspace("bn", "cpu")


# --- git ----------------------------------------------------------------------------------------


@pytest.fixture
def git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@localhost")

    def run(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    return run


def test_run_without_git_has_no_commit(folder: Path, git: Callable[..., str]) -> None:
    assert "mlflow.source.git.commit" not in Origin.of_workspace("bn", "cpu").tags()
    git("init", "-q")  # a repository without a commit
    assert "mlflow.source.git.commit" not in Origin.of_workspace("bn", "cpu").tags()


def test_run_is_tied_to_its_commit_and_dirty_when_what_made_it_differs(
    folder: Path, git: Callable[..., str]
) -> None:
    git("init", "-q")
    git("add", "dvc.yaml", "params.yaml", "train.py")
    git("commit", "-qm", "start")
    (folder / "reports").mkdir()
    (folder / "reports/index.html").write_text("outputs do not make a run dirty")
    (folder / ".gitignore").write_text("data/\n")
    tags = Origin.of_workspace("bn", "cpu").tags()
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert tags["mlflow.source.git.dirty"] == "false"
    edit(folder / "train.py", "train", "train harder")
    assert Origin.of_workspace("bn", "cpu").tags()["mlflow.source.git.dirty"] == "true"


def test_archive_unpacked_in_another_repository_has_no_commit(
    folder: Path, git: Callable[..., str]
) -> None:
    (folder / "other.txt").write_text("something else")
    git("init", "-q")
    git("add", "other.txt")
    git("commit", "-qm", "another project")
    assert "mlflow.source.git.commit" not in Origin.of_workspace("bn", "cpu").tags()


def test_experiment_names_its_run_and_the_commit_it_started_from(
    folder: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    git("init", "-q")
    git("add", "dvc.yaml")
    git("commit", "-qm", "start")
    monkeypatch.setenv("DVC_EXP_NAME", "slower")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "f" * 40)
    origin = Origin.of_workspace("bn", "cpu")
    assert origin.name == "slower/bn"
    assert origin.tags()["dvc.exp_name"] == "slower"
    assert origin.tags()["mlflow.source.git.commit"] == "f" * 40


# --- the store ----------------------------------------------------------------------------------


def test_default_store_is_in_dvc_root(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.tracking_uri(repository()) == f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # an experiment in a temporary copy
    assert runs.tracking_uri(repository()) == f"sqlite:///{tmp_path}/mlflow.db"


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
    assert runs.tracking_uri(Path("/root")) == used


def test_artefacts_are_beside_the_database_wherever_the_process_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "with space and ü"
    root.mkdir()
    shutil.copy(folder / "mlflow.db", root)
    monkeypatch.chdir(tmp_path)
    opened = Runs.open(EXPERIMENT, root)
    run = opened.client.create_run(opened.experiment_id)
    opened.client.log_text(run.info.run_id, "text", "note.txt")
    assert [path.read_text() for path in root.glob("mlartifacts/**/note.txt")] == ["text"]


def test_database_whose_creation_fails_is_not_left_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mlflow.db").unlink()

    def killed(uri: str, _artifacts: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise KeyboardInterrupt

    from mlflow.store.tracking import sqlalchemy_store

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", killed)
    with pytest.raises(KeyboardInterrupt):
        Runs.open(EXPERIMENT, folder)
    assert {path.name for path in folder.glob("*mlflow*")} <= {"mlflow.db.lock"}


@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_server_is_noticed_in_seconds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[], AbstractContextManager[str]]
) -> None:
    start = time.monotonic()
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(Exception, match=r"127\.0\.0\.1"):
            Runs.open(EXPERIMENT, folder)
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
        runs.warn(error, tmp_path)
        error.__cause__ = None
        error.__context__ = None
        runs.warn(error, tmp_path)
    start = "warning: MLflow at http://server:5000: "
    assert capsys.readouterr().err.splitlines() == [
        f"{start}[Errno 111] Connection refused",
        f"{start}http://server:5000/api: long",
    ]


# --- recording ----------------------------------------------------------------------------------


def test_run_holds_what_made_it(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cuda:0")
    opened.record(origin, curve(1), "RUNNING")
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
            "mnist_bn.key": origin.key,
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
        context: (split, origin.deps[path], f'{{"uri": "{path}"}}')
        for context, split in (("training", "train"), ("validation", "valid"))
        for path in [f"data/prepared/{split}.safetensors"]
    }


def test_epochs_arrive_with_their_steps(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("plain", "cpu")
    run_id = opened.record(origin, [], "RUNNING")
    for epochs in (1, 2, 3):
        assert opened.record(origin, curve(epochs), "RUNNING") == run_id
    opened.record(origin, curve(3), "FINISHED")
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    for name, metric in runs.CURVE.items():
        assert store.history(folder, run, metric) == [(e, row(e)[name]) for e in (1, 2, 3)]


def test_training_the_same_again_changes_nothing(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    opened.record(origin, curve(2), "FINISHED")
    (before,) = store.all_runs(folder)
    for epochs, status in ((0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING"), (2, "FINISHED")):
        opened.record(origin, curve(epochs), status)
        (after,) = store.all_runs(folder)
        assert after.to_dictionary() == before.to_dictionary()
    assert len(store.history(folder, before, "curves/train_loss")) == 2


def test_failure_of_a_repetition_does_not_unfinish_a_run(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    opened.record(origin, curve(2), "FINISHED")
    opened.record(origin, curve(1), "FAILED")
    assert [run.info.status for run in store.all_runs(folder)] == ["FINISHED"]


def test_interrupted_run_is_taken_up_again(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    opened.record(origin, curve(1), "KILLED")
    assert [run.info.status for run in store.all_runs(folder)] == ["KILLED"]
    opened.record(origin, curve(2), "RUNNING")
    assert [run.info.status for run in store.all_runs(folder)] == ["RUNNING"]
    opened.record(origin, curve(3), "FINISHED")
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(folder, run, "curves/valid_loss")] == [1, 2, 3]


def test_params_and_datasets_that_an_outage_cut_off_are_completed(
    folder: Path, opened: Runs
) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    run = opened.client.create_run(opened.experiment_id, tags=origin.tags())
    opened.client.log_param(run.info.run_id, "variant", "bn")
    assert opened.record(origin, curve(1), "RUNNING") == run.info.run_id
    (run,) = store.all_runs(folder)
    assert run.data.params == origin.logged_params()
    assert len(run.inputs.dataset_inputs) == 2


def test_other_numbers_from_the_same_inputs_are_another_run(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    first = opened.record(origin, curve(2), "FINISHED")
    other_machine = [opened.record(origin, curve(e, loss=0.6), "RUNNING") for e in (1, 2)]
    assert len({first, *other_machine}) == 2
    assert opened.record(origin, curve(2, loss=0.6), "FINISHED") == other_machine[0]
    assert opened.record(origin, curve(2), "FINISHED") == first
    lengths = [len(store.history(folder, r, "curves/train_loss")) for r in store.all_runs(folder)]
    assert lengths == [2, 2]


def test_deleted_run_is_recorded_anew(folder: Path, opened: Runs) -> None:
    origin = Origin.of_workspace("bn", "cpu")
    opened.client.delete_run(opened.record(origin, curve(1), "FINISHED"))
    opened.record(origin, curve(1), "FINISHED")
    assert len(store.all_runs(folder)) == 1


def test_curve_longer_than_a_request_takes(folder: Path, opened: Runs) -> None:
    opened.record(Origin.of_workspace("bn", "cpu"), curve(300), "FINISHED")
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
def over_seeds(folder: Path) -> SeedsOrigin:
    for path in (SEEDS, SEED_CURVES):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("figures")
    return SeedsOrigin.of_files("cpu", 2)


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
    folder: Path, opened: Runs, over_seeds: SeedsOrigin
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
    folder: Path, opened: Runs, over_seeds: SeedsOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "client", first := Counting(opened.client))
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    assert first.calls.total() == 18  # three for each run, and three
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
    opened: Runs,
    over_seeds: SeedsOrigin,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    good: int,
) -> None:
    monkeypatch.setattr(runs, "RUNS_PER_REQUEST", 2)
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
        assert run.data.params == over_seeds.one(variant, seed).logged_params()
        assert len(store.history(folder, run, "seed_curves/valid_accuracy")) == 2


def test_other_figures_over_seeds_are_other_runs(
    folder: Path, opened: Runs, over_seeds: SeedsOrigin
) -> None:
    first = opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    SEEDS.write_text("figures of another machine")
    other = SeedsOrigin.of_files("cpu", 2)
    assert opened.record_seeds(other, SUMMARY, RUNS_OF_SEEDS) != first
    assert opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS) == first
    assert len(store.all_runs(folder)) == 10


def test_deleted_run_of_a_seed_is_recorded_anew(
    folder: Path, opened: Runs, over_seeds: SeedsOrigin
) -> None:
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    gone = next(r for r in store.all_runs(folder) if r.info.run_name == "workspace/seeds/bn-1")
    opened.client.delete_run(gone.info.run_id)
    opened.record_seeds(over_seeds, SUMMARY, RUNS_OF_SEEDS)
    assert len(store.all_runs(folder)) == 5


def test_keys_of_seeds_are_their_own(folder: Path, over_seeds: SeedsOrigin) -> None:
    keys = {over_seeds.key, *(over_seeds.one(*pair).key for pair in PAIRS)}
    assert len(keys) == 5
    edit(folder / "params.yaml", "seed: 2 ", "seed: 3 ")  # of the run that ships
    assert SeedsOrigin.of_files("cpu", 2).key == over_seeds.key
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    assert SeedsOrigin.of_files("cpu", 2).key != over_seeds.key


# --- following ----------------------------------------------------------------------------------


@pytest.fixture
def sent() -> Callable[[bytes], int]:
    """The reading end of a pipe whose writer has said this and gone."""

    def write(content: bytes) -> int:
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        return reader

    return write


START = 1700000000000  # as `now` counts


def begun(variant: str = "bn") -> bytes:
    return message({"variant": variant, "device": "cpu", "time": START})


def ended(variant: str = "bn", status: str = "FINISHED") -> bytes:
    return message({"variant": variant, "status": status})


def epoch(number: int, variant: str = "bn", loss: float = 0.5, late: int = 0) -> bytes:
    time = START + 1000 * number + late
    return message({"variant": variant, **row(number, loss), "time": time})


def message(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


MESSAGES = begun() + epoch(1)


def test_following_records_when_an_epoch_ended(folder: Path, sent: Callable[[bytes], int]) -> None:
    assert runs.follow(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    (point,) = store.client(folder).get_metric_history(run.info.run_id, "curves/train_loss")
    assert (point.step, point.value, point.timestamp) == (1, 0.5, START + 1000)


def test_run_starts_with_training_and_not_with_mlflow(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    assert runs.follow(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.info.start_time == START


@pytest.mark.parametrize("content", [begun(), MESSAGES, MESSAGES + epoch(2)[:20]])
def test_training_that_was_killed_leaves_a_killed_run(
    folder: Path, sent: Callable[[bytes], int], content: bytes
) -> None:
    runs.follow(sent(content))
    (run,) = store.all_runs(folder)
    assert run.info.status == "KILLED"
    epochs = len(store.history(folder, run, "curves/train_loss"))
    assert epochs == (1 if MESSAGES in content else 0)


def test_nothing_to_follow_makes_no_store(
    folder: Path, sent: Callable[[bytes], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mlflow.db").unlink()
    assert runs.follow(sent(b""))
    assert not list(folder.glob("*mlflow*"))
    assert capsys.readouterr().err == ""


def test_two_trainings_are_two_runs_that_end_each_in_its_way(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    content = [
        begun("plain"),
        begun("bn"),
        epoch(1, "bn", loss=0.5),
        epoch(1, "plain", loss=0.6),
        ended("plain", "FAILED"),
        epoch(2, "bn", loss=0.5),
        ended("bn"),
    ]
    assert runs.follow(sent(b"".join(content)))
    found = {run.data.params["variant"]: run for run in store.all_runs(folder)}
    assert {variant: run.info.status for variant, run in found.items()} == {
        "bn": "FINISHED",
        "plain": "FAILED",
    }
    assert store.history(folder, found["bn"], "curves/train_loss") == [(1, 0.5), (2, 0.25)]
    assert store.history(folder, found["plain"], "curves/train_loss") == [(1, 0.6)]


def test_training_that_was_killed_beside_one_that_ended_is_killed(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    runs.follow(sent(begun("bn") + begun("plain") + ended("bn") + epoch(1, "plain")))
    statuses = {run.data.params["variant"]: run.info.status for run in store.all_runs(folder)}
    assert statuses == {"bn": "FINISHED", "plain": "KILLED"}


def test_rows_that_a_resumed_training_tells_again_make_no_doubles(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    runs.follow(sent(begun() + epoch(1) + epoch(2)))
    again = begun() + epoch(1, late=60_000) + epoch(2, late=60_000) + epoch(3, late=60_000)
    assert runs.follow(sent(again + ended()))
    (run,) = store.all_runs(folder)
    assert (run.info.status, run.info.start_time) == ("FINISHED", START)
    for metric in runs.CURVE.values():
        points = store.client(folder).get_metric_history(run.info.run_id, metric)
        assert sorted((p.step, p.timestamp - START) for p in points) == [
            (1, 1000),
            (2, 2000),
            (3, 63_000),
        ]


def test_outage_that_ends_leaves_only_a_warning(
    folder: Path,
    sent: Callable[[bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = Runs.record
    outcomes = iter([ConnectionResetError("server restarts"), None])

    def restarting(*arguments: Any) -> str:
        if error := next(outcomes):
            raise error
        return record(*arguments)

    monkeypatch.setattr(Runs, "record", restarting)
    assert runs.follow(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert (run.info.status, run.data.metrics["curves/valid_loss"]) == ("FINISHED", 0.55)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: MLflow at sqlite:///{folder}/mlflow.db: server restarts"


def test_outage_to_the_end_is_reported_with_one_warning(
    folder: Path,
    sent: Callable[[bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with store.refusing() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert not runs.follow(sent(MESSAGES + ended()))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: MLflow at {uri}: [Errno 111] Connection refused"


def test_what_is_wrong_with_the_folder_is_said(
    folder: Path, sent: Callable[[bytes], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.py").unlink()
    assert not runs.follow(sent(begun() + ended()))
    assert "stage train depends on train.py" in capsys.readouterr().err


def test_origin_is_that_of_the_start(
    folder: Path, sent: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Origin.of_workspace("bn", "cpu").key
    opening = Runs.open

    def edited_meanwhile(experiment: str, root: Path) -> Runs:
        edit(folder / "train.py", "train", "train harder")
        return opening(experiment, root)

    monkeypatch.setattr(Runs, "open", edited_meanwhile)
    assert runs.follow(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.data.tags["mnist_bn.key"] == key
