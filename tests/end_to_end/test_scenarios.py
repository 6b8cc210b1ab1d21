"""What people do with git, DVC and MLflow: afterwards a sync leaves one run for each result."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.mlflow_sync.points import CURVE
from mnist_batchnorm.mlflow_sync.run_identity import EXPERIMENT_TAG, WEIGHTS_TAG
from mnist_batchnorm.mlflow_sync.run_store import PARENT_TAG
from tests.support import commands, services, store
from tests.support.pipeline import PATIENCE, STORE, Project, make_project

if TYPE_CHECKING:
    from mlflow.entities import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # seconds, with the fixtures

SEEDS = [("bn", "0"), ("bn", "1"), ("plain", "0"), ("plain", "1")]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the store of a project, whatever this shell has set."""
    store.use_settings(monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds: the machine may be busy


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after one `dvc repro`, its results committed."""
    project = make_project(tmp_path_factory.mktemp("once") / "project", epochs=2, seeds=2)
    project.check("dvc", "repro")
    project.commit("results")
    return project


@pytest.fixture(scope="module")
def twice(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same with a second commit of other results."""
    twice = project.copy(tmp_path_factory.mktemp("twice") / "project")
    twice.set(lr="0.02")
    twice.check("dvc", "repro")
    twice.commit("faster")
    twice.check("mnist-bn", "sync", "--all")
    return twice


@pytest.fixture(scope="module")
def swept(twice: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same with queued experiments: of three values, and of one of these again."""
    swept = twice.copy(tmp_path_factory.mktemp("swept") / "project")
    swept.check("dvc", "exp", "run", "--queue", "-S", "train.lr=0.001,0.003,0.03")
    swept.check("dvc", "exp", "run", "--queue", "-n", "twin", "-S", "train.lr=0.003")
    start = ("dvc", "queue", "start", "-j", "2")
    with commands.running(swept.folder, *start, env=swept.environment) as queue:
        assert queue.wait() == 0, queue.err
        deadline = time.monotonic() + 2 * PATIENCE
        while queue.processes():  # the workers end when there is no more to do
            assert time.monotonic() < deadline, swept.check("dvc", "queue", "status")
            time.sleep(0.5)
    status = swept.check("dvc", "queue", "status")
    assert status.count("Success") == 4, status
    swept.check("mnist-bn", "sync", "--all")
    return swept


def trainings(folder: Path) -> "list[Run]":
    return [run for run in store.all_runs(folder) if store.stage_of(run) == "train"]


def assert_once(folder: Path, results: int) -> None:
    """The store holds this many results, each once and whole."""
    runs, trained = store.all_runs(folder), trainings(folder)
    assert {run.info.status for run in runs} == {"FINISHED"}
    found = Counter((r.data.params["variant"], r.data.tags[WEIGHTS_TAG]) for r in trained)
    assert set(found.values()) == {1}
    assert Counter(variant for variant, _ in found) == {"bn": results, "plain": results}
    for run in trained:
        epochs = list(range(1, int(run.data.params["train.epochs"]) + 1))
        for metric in CURVE.values():
            assert [step for step, _ in store.history(folder, run, metric)] == epochs
        assert len(store.history(folder, run, "test/accuracy")) == 1
    assert_seeds_once(runs, results)
    (experiment,) = {run.info.experiment_id for run in runs}
    models = store.client(folder).search_logged_models([experiment])
    assert {model.source_run_id for model in models} == {run.info.run_id for run in trained}
    assert_models_once(folder, results)


def assert_models_once(folder: Path, results: int) -> None:
    client = store.client(folder)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    models = client.search_logged_models(ids)
    assert {model.status for model in models} == {"READY"}
    assert Counter(model.name for model in models) == {Path(name).stem: results for name in GRAPHS}
    assert len({model.tags["sha256"] for model in models}) == len(GRAPHS) * results


def assert_seeds_once(runs: "list[Run]", results: int) -> None:
    of_seeds = [run for run in runs if store.stage_of(run) == "seeds"]
    parents = {run.info.run_id for run in of_seeds if PARENT_TAG not in run.data.tags}
    assert len(parents) == results
    for parent in parents:
        nested = [run for run in of_seeds if run.data.tags.get(PARENT_TAG) == parent]
        assert (
            sorted((run.data.params["variant"], run.data.params["train.seed"]) for run in nested)
            == SEEDS
        )
    assert len(of_seeds) == results * (1 + len(SEEDS))


def assert_registered(folder: Path, versions: list[int], candidate: int) -> None:
    """Both models have these versions, each once, and the aliases of a ledger with no champion."""
    client = store.client(folder)
    for name, aliases in store.aliases(folder).items():
        found = client.search_model_versions(f"name = '{name}'")
        assert sorted(int(version.version) for version in found) == versions
        assert aliases == {"candidate": candidate}
    assert store.aliases(folder).keys() == {"mnist-bn", "mnist-bn-folded"}


def present(project: Project) -> "Run":
    """The run of the batch-norm network in the workspace."""
    sha256 = digest(project.folder / "models/bn.safetensors")
    (run,) = [r for r in trainings(project.folder) if r.data.tags[WEIGHTS_TAG] == sha256]
    return run


def tags(run: "Run", *names: str) -> list[str | None]:
    return [run.data.tags.get(name) for name in names]


COMMIT, DIRTY = "mlflow.source.git.commit", "mlflow.source.git.dirty"


# --- repro --------------------------------------------------------------------------------------


def test_repro_twice_and_forced_is_one_run(tmp_path: Path, project: Project) -> None:
    copy = project.copy(tmp_path / "project")
    assert_once(copy.folder, 1)
    assert "Running stage" not in copy.check("dvc", "repro")
    assert_once(copy.folder, 1)
    copy.check("dvc", "repro", "--force")
    assert_once(copy.folder, 1)
    assert_registered(copy.folder, [1], candidate=1)
    commit = copy.check("git", "rev-parse", "HEAD").strip()
    assert tags(present(copy), COMMIT, DIRTY) == [commit, "false"]


def test_reverted_parameter_is_two_runs_and_the_candidate_follows(
    tmp_path: Path, twice: Project
) -> None:
    copy = twice.copy(tmp_path / "project")
    assert_once(copy.folder, 2)
    assert_registered(copy.folder, [1, 2], candidate=2)
    copy.set(lr="0.01")
    assert "Stage 'train' is cached - skipping run" in copy.check("dvc", "repro")
    assert_once(copy.folder, 2)
    assert_registered(copy.folder, [1, 2], candidate=1)
    first = copy.check("git", "rev-parse", "HEAD^").strip()
    assert tags(present(copy), COMMIT, DIRTY) == [first, "false"]
    copy.check("mnist-bn", "sync", "--all")
    assert_once(copy.folder, 2)
    assert_registered(copy.folder, [1, 2], candidate=1)


# --- experiments --------------------------------------------------------------------------------


def test_queued_experiments_are_one_run_a_result_with_their_names(swept: Project) -> None:
    assert_once(swept.folder, 5)
    names = set(swept.check("dvc", "exp", "list", "--name-only").split())
    assert len(names) == 4
    by_lr = {
        run.data.params["train.lr"]: run
        for run in trainings(swept.folder)
        if run.data.params["variant"] == "bn"
    }
    assert by_lr.keys() == {"0.01", "0.02", "0.001", "0.003", "0.03"}
    tagged = {lr: run.data.tags.get(EXPERIMENT_TAG) for lr, run in by_lr.items()}
    assert tagged["0.01"] is tagged["0.02"] is None
    assert len(str(tagged["0.003"]).split(", ")) == 2
    assert "twin" in str(tagged["0.003"])
    told = [name for tag in tagged.values() if tag for name in tag.split(", ")]
    assert sorted(told) == sorted(names)
    for lr, tag in tagged.items():
        if tag:
            assert by_lr[lr].info.run_name == f"{tag.split(', ')[0]}/bn"


def test_applied_experiment_becomes_the_commit_that_holds_it(
    tmp_path: Path, swept: Project
) -> None:
    copy = swept.copy(tmp_path / "project")
    copy.check("dvc", "exp", "apply", "twin")
    copy.check("mnist-bn", "sync")
    assert_once(copy.folder, 5)
    run = present(copy)
    names = run.data.tags[EXPERIMENT_TAG]
    assert run.data.params["train.lr"] == "0.003"
    assert "twin" in names.split(", ")
    commit = copy.commit("the twin")
    copy.check("mnist-bn", "sync")
    assert_once(copy.folder, 5)
    assert present(copy).info.run_id == run.info.run_id
    assert tags(present(copy), COMMIT, DIRTY, EXPERIMENT_TAG) == [commit, "false", names]
    listed = {one["run_id"]: one for one in json.loads(copy.check("mnist-bn", "runs", "--json"))}
    shown = listed[run.info.run_id]
    assert (shown["commit"], shown["experiments"]) == (commit, names.split(", "))
    (line,) = [
        line
        for line in copy.check("mnist-bn", "runs").splitlines()
        if line.startswith(run.info.run_id)
    ]
    assert f"  {commit[:7]}  {names}  " in line
    found = json.loads(copy.check("mnist-bn", "which", "models/bn-folded.onnx", "--json"))
    assert found["run_id"] == run.info.run_id
    assert found["source"]["commit"] == commit


# --- at once, killed, lost ----------------------------------------------------------------------


@pytest.mark.parametrize("start", range(3))
def test_two_syncs_at_once_on_an_empty_store(tmp_path: Path, project: Project, start: int) -> None:
    copy = project.copy(tmp_path / "project", *STORE)
    both_sync(copy, copy, apart=start / 2)
    assert_once(copy.folder, 1)
    assert_registered(copy.folder, [1], candidate=1)
    assert copy.check("mnist-bn", "sync") == "MLflow has all of it\n"


def both_sync(*projects: Project, apart: float) -> None:
    """Run `mnist-bn sync` in projects at once, begun so many seconds apart."""
    with ExitStack() as stack:
        started = []
        for one in projects:
            sync = commands.running(one.folder, "mnist-bn", "sync", env=one.environment)
            started.append(stack.enter_context(sync))
            time.sleep(apart)
        for command in started:
            assert command.wait() == 0, command.err
            assert "warning" not in command.err


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Server]:
    """An empty MLflow server, for this process too."""
    database, artefacts = f"sqlite:///{tmp_path}/server.db", str(tmp_path / "artefacts")
    with services.mlflow_server(database, artefacts, folder=tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server


@pytest.mark.parametrize("apart", [0, 0.3])
def test_two_machines_at_once_on_one_server(
    tmp_path: Path, project: Project, server: services.Server, apart: float
) -> None:
    where = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    both = [
        replace(project.copy(tmp_path / name / "project", *STORE), settings=where)
        for name in ("one", "other")
    ]
    both_sync(*both, apart=apart)
    assert_once(tmp_path, 1)
    assert_registered(tmp_path, [1], candidate=1)
    for one in both:
        one.check("mnist-bn", "sync")
        assert one.check("mnist-bn", "sync") == "MLflow has all of it\n"
    assert_once(tmp_path, 1)


def test_killed_sync_is_completed_by_the_next(tmp_path: Path, twice: Project) -> None:
    copy = twice.copy(tmp_path / "project", *STORE)
    choice = random.Random(0)  # which moment that is depends on the machine all the same
    started = time.monotonic()
    twice.copy(tmp_path / "timed/project", *STORE).check("mnist-bn", "sync", "--all")
    whole = time.monotonic() - started
    for _ in range(6):
        sync = ("mnist-bn", "sync", "--all")
        with commands.running(copy.folder, *sync, env=copy.environment):
            time.sleep(choice.uniform(0.2, 0.9) * whole)
    copy.check("mnist-bn", "sync", "--all")
    assert_once(copy.folder, 2)
    assert_registered(copy.folder, [1, 2], candidate=2)
    assert store.shown(copy.folder) == store.shown(tmp_path / "timed/project")


def test_lost_store_is_made_again(tmp_path: Path, swept: Project) -> None:
    before = store.shown(swept.folder)
    # elsewhere, because this process keeps the database open that it has used
    copy = swept.copy(tmp_path / "project", *STORE)
    copy.check("mnist-bn", "sync", "--all")
    assert_once(copy.folder, 5)
    assert store.shown(copy.folder) == before


# --- other machines -----------------------------------------------------------------------------


def test_pull_on_another_machine_shows_the_same(tmp_path: Path, swept: Project) -> None:
    first = swept.copy(tmp_path / "first/project")
    # --local: DVC reads the rest as each commit has it, and the old ones name no remote
    remote = ("dvc", "remote", "add", "--local", "-d", "shared", str(tmp_path / "remote"))
    first.check(*remote)
    first.check("git", "init", "-q", "--bare", "-b", "main", str(tmp_path / "origin"))
    first.check("git", "remote", "add", "origin", str(tmp_path / "origin"))
    first.check("git", "push", "-q", "origin", "main")
    first.check("dvc", "push", "--all-commits")
    first.check("dvc", "exp", "push", "--all-commits", "origin")
    first.check("mnist-bn", "sync", "--all")

    other = replace(first, folder=tmp_path / "other/project")
    first.check("git", "clone", "-q", str(tmp_path / "origin"), str(other.folder))
    other.check(*remote)
    other.check("dvc", "pull")
    other.check("mnist-bn", "sync", "--all")
    assert_once(other.folder, 1)
    other.check("dvc", "pull", "--all-commits")
    other.check("mnist-bn", "sync", "--all")
    assert_once(other.folder, 2)
    other.check("dvc", "exp", "pull", "origin", "--all-commits")
    other.check("mnist-bn", "sync", "--all")
    assert_once(other.folder, 5)
    assert by_ledger(store.shown(other.folder)) == by_ledger(store.shown(first.folder))


def by_ledger(shown: dict[str, Any]) -> dict[str, Any]:
    """The same by the ledger's version numbers: MLflow counts in the order that it is told."""
    number = {of: version[0]["mnist_bn.version"] for of, version in shown["versions"].items()}
    versions = {(name, number[name, n]): of for (name, n), of in shown["versions"].items()}
    aliases = {
        (name, alias): number[name, n]
        for name, of in shown["aliases"].items()
        for alias, n in of.items()
    }
    return shown | {"versions": versions, "aliases": aliases}


def test_clone_without_outputs_says_what_to_do(tmp_path: Path, project: Project) -> None:
    clone = project.clone(tmp_path / "clone")
    for command in (["mnist-bn", "sync"], ["mnist-bn", "sync", "--all"]):
        done = clone.run(*command)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line == (
            "error: no models/bn.safetensors; run `dvc repro train` first; or `dvc pull`, if a "
            "remote has the results"
        )
    assert not list(clone.folder.glob("mlflow.db"))


def test_commit_that_the_cache_lacks_is_left_out_until_it_is_there(
    tmp_path: Path, twice: Project
) -> None:
    copy = twice.copy(tmp_path / "project", *STORE)
    old = copy.check("git", "show", "HEAD^:dvc.lock")
    md5 = old.partition("- path: models/plain.safetensors\n")[2].split("md5: ")[1].split()[0]
    cached = copy.folder / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
    shutil.move(cached, tmp_path / "kept")
    said = copy.check("mnist-bn", "sync", "--all")
    commit = copy.check("git", "rev-parse", "--short", "HEAD^").strip()
    assert f"left out {commit} results: no models/plain.safetensors" in said
    assert "DVC's cache lacks models/plain.safetensors" in said
    there = Counter(run.data.params["variant"] for run in trainings(copy.folder))
    assert there == {"bn": 1, "plain": 1}
    assert_models_once(copy.folder, 2)  # the registry shows both, one without its run
    assert_registered(copy.folder, [1, 2], candidate=2)
    assert copy.check("mnist-bn", "sync", "--all") == "MLflow has all of it\n"
    shutil.move(tmp_path / "kept", cached)
    assert "left out" not in copy.check("mnist-bn", "sync", "--all")
    assert store.shown(copy.folder)["runs"] == store.shown(twice.folder)["runs"]
    assert_models_once(copy.folder, 2)
    assert_registered(copy.folder, [1, 2], candidate=2)


def test_project_in_a_folder_of_a_repository(tmp_path: Path, project: Project) -> None:
    top, folder = tmp_path / "repository", tmp_path / "repository/models of digits"
    inside = project.copy(folder, ".git", *STORE)
    whole = replace(inside, folder=top)
    whole.check("git", "init", "-q", "-b", "main")
    (top / "README").write_text("other things")
    first = whole.commit("with results")
    (folder / "note").write_text("one")
    whole.commit("later")
    inside.check("dvc", "repro")
    inside.check("mnist-bn", "sync", "--all")
    assert_once(folder, 1)
    assert tags(present(inside), COMMIT, DIRTY) == [first, "false"]
    found = json.loads(inside.check("mnist-bn", "which", "models/bn.onnx", "--json"))
    assert found["source"]["commit"] == first
    lost = inside.copy(tmp_path / "again/models of digits", *STORE)
    shutil.copytree(top / ".git", tmp_path / "again/.git")
    lost.check("mnist-bn", "sync", "--all")
    assert store.shown(lost.folder) == store.shown(folder)


def test_project_without_git(tmp_path: Path, project: Project) -> None:
    copy = project.copy(tmp_path / "project", ".git", *STORE)
    copy.check("dvc", "config", "core.no_scm", "true")
    copy.check("dvc", "repro")
    copy.check("mnist-bn", "sync", "--all")
    assert_once(copy.folder, 1)
    assert tags(present(copy), COMMIT, DIRTY) == [None, None]
    assert present(copy).info.run_name == "workspace/bn"
    found: Any = json.loads(copy.check("mnist-bn", "which", "models/bn.onnx", "--json"))
    assert found["run_id"] == present(copy).info.run_id
    assert found["source"]["commit"] is None


# --- nothing to do ------------------------------------------------------------------------------

MODULES = """\
import sys
from mnist_batchnorm.cli import main
try:
    main()
finally:
    print("mlflow" in sys.modules)
"""


@pytest.mark.parametrize("options", [[], ["--all"]])
def test_nothing_to_do_is_seen_without_mlflow(
    tmp_path: Path, project: Project, options: list[str]
) -> None:
    copy = project.copy(tmp_path / "project")
    copy.check("mnist-bn", "sync", *options)
    start = time.monotonic()
    assert copy.check("mnist-bn", "sync", *options) == "MLflow has all of it\n"
    print(f"sync {options} with nothing to do: {time.monotonic() - start:.2f} s")  # noqa: T201
    said = copy.check("python", "-c", MODULES, "sync", *options)
    assert said == "MLflow has all of it\nFalse\n"
