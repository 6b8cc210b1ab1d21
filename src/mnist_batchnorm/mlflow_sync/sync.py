"""Update MLflow to match the files: runs, models and model registry; idempotent.

The stage imports this module only if there is something to do, because it imports much.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from tenacity import retry, stop_after_attempt, wait_fixed

from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.params import load_params
from mnist_batchnorm.core.paths import (
    CHECKPOINTS,
    LOCK_FILE,
    REGISTRY,
    SEEDS,
    in_workspace,
    repository,
)
from mnist_batchnorm.mlflow_sync.artifacts import log_onnx, log_reports
from mnist_batchnorm.mlflow_sync.connection import warn
from mnist_batchnorm.mlflow_sync.desired import DesiredRun, DesiredSeeds, read_all, read_trainings
from mnist_batchnorm.mlflow_sync.points import now
from mnist_batchnorm.mlflow_sync.registry_mirror import find_file, update_registry
from mnist_batchnorm.mlflow_sync.run_store import RunStore
from mnist_batchnorm.mlflow_sync.up_to_date import SyncedState, save_note
from mnist_batchnorm.mlflow_sync.uri import charts_page, is_server, without_password

FETCH_HINT = "`dvc fetch --all-commits` gets what a remote has"

Aliases = Mapping[str, Mapping[str, str]]


def update_mlflow(root: Path, everything: bool, state: str) -> list[str]:
    """Update MLflow; a store that does not work is worth a warning."""
    try:
        networks, seeds, missing = read_results()
    except UserError as error:
        pull = "; or `dvc pull`, if a remote has the results" if LOCK_FILE.is_file() else ""
        raise UserError(f"{error}{pull}") from None
    if missing:
        click.echo(f"the trainings alone: {missing}", err=True)
    experiment = load_params().sync.experiment

    # updates are idempotent, so one more attempt is all that a server's hiccup needs
    @retry(stop=stop_after_attempt(2), wait=wait_fixed(0.5), reraise=True)
    def update() -> tuple[SyncedState, list[str]]:
        store = RunStore.open(experiment, root)
        older = update_history(store) if everything else []
        ids = update_runs(store, networks, seeds)
        # an experiment in a folder of its own is a proposal until it is applied
        aliases = update_registry_from_ledger(store) if in_workspace() else {}
        run_ids = list(dict.fromkeys([*ids.values(), *older]))
        lines = [*summary(ids, aliases), f"compare them: {charts_url(store)}"]
        return synced_state(store, root, state, run_ids, aliases), lines

    try:
        synced, lines = update()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        warn(error, root)
        click.echo("MLflow does not have all of it; `mnist-bn sync` goes on from here", err=True)
        return []
    if in_workspace():  # the files of a copy differ from the workspace's
        save_note(root, everything, synced)
    return lines


def synced_state(
    store: RunStore, root: Path, state: str, run_ids: Sequence[str], aliases: Aliases
) -> SyncedState:
    models, artifacts = store.model_ids(run_ids), root / "mlartifacts"
    folders = [artifacts / name for name in (*run_ids, *(f"models/{model}" for model in models))]
    local = [str(folder) for folder in folders if folder.is_dir()]
    lacking = sorted(map(str, store.history.missing_from_cache))
    return SyncedState(state, run_ids, store.nested_ids(run_ids), models, aliases, local, lacking)


def summary(ids: Mapping[str, str], aliases: Aliases) -> list[str]:
    lines = [f"{name}: MLflow run {run_id}" for name, run_id in ids.items()]
    for name, versions in aliases.items():
        text = ", ".join(f"{alias} is version {version}" for alias, version in versions.items())
        lines.append(f"{name}, as MLflow counts: {text}" if text else f"{name}: nothing registered")
    return lines


def charts_url(store: RunStore) -> str:
    page = charts_page(store.experiment_id)
    if is_server(store.uri):
        return f"{without_password(store.uri.rstrip('/'))}/{page}"
    return f"make ui (port 5000 unless PORT= says otherwise), http://127.0.0.1:5000/{page}"


def update_registry_from_ledger(store: RunStore, *, by_hand: bool = False) -> Aliases:
    """Make MLflow's model registry match ``models/registry.json``; see `update_registry`."""
    ledger = Ledger.load(REGISTRY)
    for version in ledger.versions:
        lost = [name for name in version.files if not find_file(store, name, version)]
        if lost:
            click.echo(
                f"version {version.version} of {', '.join(lost)} is not shown: its file is neither "
                f"in models/ nor in DVC's cache; {FETCH_HINT}",
                err=True,
            )
        elif not store.find_by_weights(version.weights_sha256):
            file = next(iter(version.files.values()))
            if commit := store.history.first_commit(file.md5):
                update_commit(store, commit)
    with store.lock:
        # read again: somebody may have rolled back meanwhile
        return update_registry(store, Ledger.load(REGISTRY), by_hand=by_hand)


def show_registry() -> None:
    """Show a promotion or rollback in MLflow; a store that does not work is worth a warning."""
    root = repository()
    try:
        store = RunStore.open(load_params().sync.experiment, root)
        update_registry_from_ledger(store, by_hand=True)
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        warn(error, root)
        click.echo("MLflow does not show this yet; `mnist-bn sync` does it later", err=True)


def read_results() -> tuple[Sequence[DesiredRun], DesiredSeeds | None, UserError | None]:
    """Read the results in the current folder."""
    try:
        return *read_all(), None
    except UserError as missing:
        return read_trainings(), None, missing


def update_runs(
    store: RunStore, networks: Sequence[DesiredRun], seeds: DesiredSeeds | None
) -> dict[str, str]:
    """Create or update all runs of the results; return the ids by variant and ``seeds``."""
    ids = {desired.identity.variant: _update_run(store, desired) for desired in networks}
    if seeds:
        ids["seeds"] = _update_seeds(store, seeds)
    return ids


def _update_run(store: RunStore, desired: DesiredRun) -> str:
    from mlflow.entities import Metric, RunTag

    with store.lock:
        run_id = store.record(desired.identity, desired.curve, "FINISHED")
        run = store.client.get_run(run_id)
        data, start = run.data, run.info.start_time
        metrics = [
            # two machines agree on the time of a first value; a new value has to be later
            Metric(name, value, now() if name in data.metrics else start, step=0)
            for name, value in desired.metrics.items()
            if data.metrics.get(name) != value
        ]
        tags = [RunTag(*tag) for tag in desired.tags.items() - data.tags.items()]
        if metrics or tags:
            store.client.log_batch(run_id, metrics, tags=tags)
        if desired.reports:
            log_reports(store, run, desired.reports)
        for path in desired.models:
            log_onnx(store, path, path.stem, run_id)
    return run_id


def _update_seeds(store: RunStore, desired: DesiredSeeds) -> str:
    with store.lock:
        run_id = store.record_seeds(desired.identity, desired.summary, desired.runs)
        log_reports(store, store.client.get_run(run_id), desired.reports)
    return run_id


def update_history(store: RunStore) -> list[str]:
    """Create or update the runs of all commits and experiments whose files are available.

    Of commits with the same results the newest with all files counts; if none has all, the
    trainings alone of the newest.
    """
    found: list[str] = []
    for commits in store.history.commits_by_result([*CHECKPOINTS.values(), SEEDS]):
        attempts = (update_commit(store, commit, partial=False) for commit in commits)
        found += next(filter(None, attempts), []) or update_commit(store, commits[0])
    return found


def update_commit(store: RunStore, commit: str, *, partial: bool = True) -> list[str]:
    """Create or update the runs of a commit's results; return their ids."""
    title = store.history.describe(commit)
    uncached: list[str] = []
    try:
        with (
            store.history.checkout(commit) as (folder, uncached),
            contextlib.chdir(folder),
            without_experiment(),
        ):
            networks, seeds, missing = read_results()
            if missing and not partial:
                return []
            ids = update_runs(store, networks, seeds)
    except UserError as error:
        if partial:
            click.echo(f"left out {title}: {error}{_fetch_hint(uncached)}", err=True)
        return []
    if missing:
        click.echo(f"the trainings alone of {title}: {missing}{_fetch_hint(uncached)}", err=True)
    click.echo(f"{title}: {', '.join(ids.values())}", err=True)
    return list(ids.values())


def _fetch_hint(uncached: list[str]) -> str:
    return f"; DVC's cache lacks {', '.join(uncached)}: {FETCH_HINT}" if uncached else ""


@contextlib.contextmanager
def without_experiment() -> Iterator[None]:
    """Hide the DVC experiment that runs: the results of a commit are not its own."""
    names = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
