"""TODO."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import (
    LOCK_FILE,
    MODELS,
    REGISTRY,
    SEEDS,
    TEST_SPLIT,
    VARIANTS,
    repository,
)
from mnist_batchnorm.mlflow_sync.up_to_date import Held, remember
from mnist_batchnorm.mlflow_sync.uri import without_password

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from mnist_batchnorm.mlflow_sync.desired import Outcome, SeedsOutcome
    from mnist_batchnorm.mlflow_sync.run_store import Runs

FETCH = "`dvc fetch --all-commits` gets what a remote has"

EXAMPLES = 3  # test images in the models' input example


def in_repository(root: Path) -> bool:
    """Tell whether this is the workspace, not DVC's copy of it for an experiment."""
    return Path.cwd().resolve() == root


def _bring(root: Path, everything: bool, state: str) -> list[str]:
    """Return what there is to say about it; nothing where the store failed."""
    from mnist_batchnorm.mlflow_sync.run_store import warn

    try:
        held, lines = _complete(root, everything, state)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        warn(error, root)
        click.echo("MLflow does not have all of it; `mnist-bn sync` goes on from here", err=True)
        return []
    if in_repository(root):  # what a copy holds says nothing about the workspace
        remember(root, everything, held)
    return lines


def _complete(root: Path, everything: bool, state: str) -> tuple[Held, list[str]]:
    from tenacity import retry, stop_after_attempt, wait_fixed

    from mnist_batchnorm.core.params import load_params
    from mnist_batchnorm.mlflow_sync.run_store import Runs

    experiment = load_params().sync.experiment
    outcomes, seeds, lack = read_workspace()
    if lack:
        click.echo(f"the trainings alone: {lack}", err=True)

    # what is done is not done again, so once more is all that a server's hiccup needs
    @retry(stop=stop_after_attempt(2), wait=wait_fixed(0.5), reraise=True)
    def attempt() -> tuple["Runs", list[str], dict[str, str], dict[str, dict[str, str]]]:
        runs = Runs.open(experiment, root)
        older = sync_history(runs) if everything else []
        ids = sync_runs(runs, outcomes, seeds)
        # an experiment in a folder of its own is a proposal until it is applied
        aliases = sync_registry(runs) if in_repository(root) else {}
        return runs, older, ids, aliases

    runs, older, ids, aliases = attempt()
    lines = [f"{name}: MLflow run {run_id}" for name, run_id in ids.items()]
    for name, of in aliases.items():
        says = ", ".join(f"{alias} is version {version}" for alias, version in of.items())
        lines.append(f"{name}, as MLflow counts: {says}" if says else f"{name}: nothing registered")
    lines.append(f"compare them: {charts(runs)}")
    told = [*dict.fromkeys([*ids.values(), *older])]
    models = runs.logged_models(told)
    folders = [root / "mlartifacts" / name for name in (*told, *(f"models/{m}" for m in models))]
    held = Held(
        state,
        told,
        runs.within(told),
        models,
        aliases,
        [str(folder) for folder in folders if folder.is_dir()],
        sorted(map(str, runs.history.lacking)),
    )
    return held, lines


def show_registry() -> None:
    """Make MLflow show the champion now; a store that does not work is worth a warning."""
    from mnist_batchnorm.core.params import load_params
    from mnist_batchnorm.mlflow_sync.run_store import Runs, warn

    root = repository()
    try:
        sync_registry(Runs.open(load_params().sync.experiment, root), by_hand=True)
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        warn(error, root)
        click.echo("MLflow does not show this yet; `mnist-bn sync` does it later", err=True)


def read_workspace() -> "tuple[Sequence[Outcome], SeedsOutcome | None, UserError | None]":
    """Read the results in the current folder as `read_results` does, as those of a working copy.

    Raises:
        UserError: There are no trainings.
    """
    try:
        return read_results()
    except UserError as error:
        pull = "; or `dvc pull`, if a remote has the results" if LOCK_FILE.is_file() else ""
        raise UserError(f"{error}{pull}") from None


def read_results() -> "tuple[Sequence[Outcome], SeedsOutcome | None, UserError | None]":
    """Read the results in the current folder; where a later stage has not run, the trainings alone.

    Returns:
        The networks, the runs over seeds, and why it is the trainings alone.

    Raises:
        UserError: There are no trainings.
    """
    from mnist_batchnorm.mlflow_sync.desired import read_outcomes, read_trainings

    try:
        return *read_outcomes(), None
    except UserError as lack:
        return read_trainings(), None, lack


def sync_history(runs: "Runs") -> list[str]:
    """Bring the runs of every commit and experiment to MLflow whose files can be had.

    Returns:
        The ids of the runs.
    """
    outs = [*(MODELS / f"{variant}.safetensors" for variant in VARIANTS), SEEDS]
    found: list[str] = []
    for commits in runs.history.results(outs):
        for commit in commits:
            if ids := sync_commit(runs, commit, partly=False):
                break
        else:
            ids = sync_commit(runs, commits[0])
        found += ids
    return found


def sync_commit(runs: "Runs", commit: str, *, partly: bool = True) -> list[str]:
    """Bring the runs of a commit's results to MLflow.

    Args:
        runs: where.
        commit: whose.
        partly: whether the trainings alone will do, where the rest cannot be had; if nothing can,
            that is said.

    Returns:
        The ids of the runs.
    """
    what = runs.history.describe(commit)
    missing: list[str] = []
    try:
        with (
            runs.history.checked_out(commit) as (folder, missing),
            contextlib.chdir(folder),
            outside_experiments(),
        ):
            outcomes, seeds, lack = read_results()
            if lack and not partly:
                return []
            ids = sync_runs(runs, outcomes, seeds)
    except UserError as error:
        if not partly:
            return []
        click.echo(f"left out {what}: {error}{where(missing)}", err=True)
        return []
    if lack:
        click.echo(f"the trainings alone of {what}: {lack}{where(missing)}", err=True)
    click.echo(f"{what}: {', '.join(ids.values())}", err=True)
    return list(ids.values())


def where(missing: "Sequence[str]") -> str:
    """Say where the files may be had that DVC's cache lacks."""
    return f"; DVC's cache lacks {', '.join(missing)}: {FETCH}" if missing else ""


@contextlib.contextmanager
def outside_experiments() -> "Iterator[None]":
    """Forget that a DVC experiment runs: what a commit holds did not come of it."""
    names = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def sync_runs(
    runs: "Runs", outcomes: "Sequence[Outcome]", seeds: "SeedsOutcome | None"
) -> dict[str, str]:
    """Bring the runs of one set of results to the state of its files."""
    ids = {outcome.origin.variant: sync_run(runs, outcome) for outcome in outcomes}
    if seeds:
        ids["seeds"] = sync_seeds(runs, seeds)
    return ids


def sync_run(runs: "Runs", outcome: "Outcome") -> str:
    """Bring one training run to the state of the files; twice is once.

    Returns:
        The run's id.
    """
    from mlflow.entities import Metric, RunTag

    from mnist_batchnorm.mlflow_sync.artifacts import REPORTS_TAG, log_onnx, log_reports
    from mnist_batchnorm.mlflow_sync.run_store import now

    with runs.lock:
        run_id = runs.record(outcome.origin, outcome.curve, "FINISHED")
        run = runs.client.get_run(run_id)
        data, start = run.data, run.info.start_time
        metrics = [
            # the first at a time that two machines at once agree on; a new value has to be later
            Metric(name, value, now() if name in data.metrics else start, step=0)
            for name, value in outcome.metrics.items()
            if data.metrics.get(name) != value
        ]
        tags = [RunTag(*tag) for tag in outcome.tags.items() - data.tags.items()]
        if metrics or tags:
            runs.client.log_batch(run_id, metrics, tags=tags)
        if outcome.reports:
            log_reports(runs, run_id, outcome.reports, data.tags.get(REPORTS_TAG))
        for path in outcome.models:
            log_onnx(runs, path, path.stem, input_example, run_id)
    return run_id


def sync_seeds(runs: "Runs", outcome: "SeedsOutcome") -> str:
    """Bring the runs of stage seeds to the state of the files; twice is once.

    Returns:
        The id of the run over all.
    """
    from mnist_batchnorm.mlflow_sync.artifacts import REPORTS_TAG, log_reports

    with runs.lock:
        run_id = runs.record_seeds(outcome.origin, outcome.summary, outcome.runs)
        logged = runs.client.get_run(run_id).data.tags.get(REPORTS_TAG)
        log_reports(runs, run_id, outcome.reports, logged)
    return run_id


def sync_registry(runs: "Runs", *, by_hand: bool = False) -> dict[str, dict[str, str]]:
    """Make MLflow's model registry show what ``models/registry.json`` says.

    Args:
        runs: where.
        by_hand: whether a person moves the champion now, so that this ledger counts.

    Returns:
        The version of each alias of each model.
    """
    from mnist_batchnorm.artifacts.registry_file import Ledger
    from mnist_batchnorm.mlflow_sync.registry_mirror import complete_registry, find_file

    ledger = Ledger.load(REGISTRY)
    for version in ledger.versions:
        lost = [name for name in version.files if not find_file(runs, name, version)]
        if lost:
            click.echo(
                f"version {version.version} of {', '.join(lost)} is not shown: its file is neither "
                f"in models/ nor in DVC's cache; {FETCH}",
                err=True,
            )
        elif not runs.of_weights(version.weights_sha256):
            file = next(iter(version.files.values()))
            if commit := runs.history.first_commit(file.md5):
                sync_commit(runs, commit)
    with runs.lock:
        # as it is now: somebody may have rolled back meanwhile
        return complete_registry(runs, Ledger.load(REGISTRY), input_example, by_hand=by_hand)


def input_example() -> "npt.NDArray[np.float32]":
    """Return the first test images as the models take them, float32 ``[3, 784]``."""
    from mnist_batchnorm.artifacts.splits import load_split, network_input

    return network_input(load_split(TEST_SPLIT).images[:EXAMPLES])


def charts(runs: "Runs") -> str:
    """Say where the UI shows the learning curves of all training runs in one chart each."""
    # MLflow's front page is about language models
    page = f"#/experiments/{runs.experiment_id}/runs?workflowType=machine_learning"
    trainings = quote("tags.dvc.stage = 'train'")  # else the newest runs only: those of stage seeds
    server = runs.uri.startswith(("http:", "https:"))
    local = "make ui (port 5000 unless PORT= says otherwise), http://127.0.0.1:5000"
    start = without_password(runs.uri.rstrip("/")) if server else local
    return f"{start}/{page}&compareRunsMode=CHART&searchFilter={trainings}"
