"""MLflow's store: runs are looked up by what made them, so telling it twice makes no second run."""

import contextlib
import logging
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import fingerprint, replacing
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.lineage.git import History, Made
from mnist_batchnorm.mlflow_sync.run_identity import (
    EXPERIMENT_TAG,
    KEY_TAG,
    USER_TAG,
    WEIGHTS_TAG,
    Origin,
    SeedsOrigin,
)
from mnist_batchnorm.mlflow_sync.uri import database, tracking_uri, without_password

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

    Logged = Mapping[tuple[str, int], set[float]]  # what a run holds: (metric, step) -> values

# Column of the learning curve -> metric. The UI draws a section of charts for each prefix, in
# alphabetical order.
CURVE = {name: f"curves/{name}" for name in CURVE_COLUMNS if name != "epoch"}

PARENT_TAG = "mlflow.parentRunId"  # the UI shows a run that has it below that one

# MLflow's own defaults wait for minutes before they call a server dead. Whatever the user has set
# goes first.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds
    # A request that timed out may have been done: `Runs` looks before it repeats one.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",  # no pages of warnings where there is no git
}
LOGGED_PER_REQUEST = 1000  # metrics and params; MLflow's limit
RUNS_PER_REQUEST = 1000
# seconds; held for less than one, or 3 to create the database, or 10 to log the models
LOCK_TIMEOUT = 120


class Point(NamedTuple):
    """One value of a metric.

    Attributes:
        metric: its name in MLflow.
        step: the epoch.
        value: what was measured.
        time: when, as `now` counts.
    """

    metric: str
    step: int
    value: float
    time: int


def curve_points(row: Mapping[str, float]) -> list[Point]:
    """Turn a row of the learning curve into points, of now unless the row has a ``time``."""
    when = int(row.get("time", now()))
    return [Point(CURVE[name], int(row["epoch"]), row[name], when) for name in CURVE]


def now() -> int:
    """Return the time as MLflow counts it: milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def import_mlflow() -> None:
    """Import MLflow so that it is quiet, and gives up soon on a store that is not there."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # the exception tells all that they would log
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    import mlflow.store.db.utils

    # the variable says it only to who imports MLflow first
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # else 100 s for a database that is not there


class Runs:
    """The runs of one MLflow experiment.

    Attributes:
        uri: where MLflow stores.
        client: talks to it.
        experiment_id: the experiment.
        lock: held while runs are looked up and changed, so that processes on one machine that
            record the same result end up with one run.
        place: stands for all who share that lock.
        history: where results are on record.
    """

    def __init__(
        self, uri: str, client: "MlflowClient", experiment_id: str, lock: "BaseFileLock"
    ) -> None:
        self.uri = uri
        self.client = client
        self.experiment_id = experiment_id
        self.lock = lock
        self.place = fingerprint({"machine": platform.node(), "lock": str(lock.lock_file)})
        self.history = History(repository())

    @classmethod
    def open(cls, experiment: str, root: Path, *, create: bool = True) -> "Runs":
        """Connect to the store, creating a SQLite database and the experiment where missing.

        An experiment that was deleted is restored: MLflow keeps its name from any other.

        Args:
            experiment: its name.
            root: the repository.
            create: whether to; otherwise it must be there.

        Raises:
            UserError: It is not there.
            Exception: whatever MLflow or a plug-in of its raises for a store that is not usable.
        """
        import_mlflow()
        from filelock import FileLock
        from mlflow.tracking import MlflowClient

        uri = tracking_uri(root)
        artifacts = (root / "mlartifacts").as_uri()
        local = database(root)
        # beside the database, for all who use it
        beside = local or root / "mlflow.db"
        lock = FileLock(beside.with_name(f"{beside.name}.lock"), timeout=LOCK_TIMEOUT)
        with lock:
            if local:
                _create_database(local, artifacts)
            # MLflow's default for the second is whatever this process used last
            client = MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
            found = client.get_experiment_by_name(experiment)
            if not (found or create):
                raise UserError(
                    f"no experiment {experiment!r} in MLflow at {without_password(uri)}: no run "
                    "has been tracked yet; run `dvc repro sync` first"
                )
            if found and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            experiment_id = (
                found.experiment_id
                if found
                else client.create_experiment(
                    experiment,
                    # a server knows better where its artefacts go
                    artifact_location=artifacts if _is_database(uri) else None,
                )
            )
        return cls(uri, client, experiment_id, lock)

    def record(
        self, origin: Origin, curve: Sequence[Point], status: str, start: int | None = None
    ) -> str:
        """Bring the run of ``origin`` to the state of its learning curve; twice is once.

        A run with the same key is taken up if its points and weights do not contradict these; a
        machine that computes other numbers from the same inputs gets a run of its own. What is
        there already is not logged again, and a finished run stays finished. Once the result is
        known, further runs that hold nothing else are deleted.

        Args:
            origin: what made the run.
            curve: the learning curve so far.
            status: RUNNING, FINISHED, FAILED or KILLED.
            start: when training started, as `now` counts; by default now.

        Returns:
            The run's id.
        """
        with self.lock:
            found = self._find(origin, curve)
            if not found:
                self._create(origin, origin.made(self.history), start)
                found = self._find(origin, curve)  # another machine's as well, made meanwhile
            (run, logged), *doubles = found
            if origin.result:
                made = origin.made(self.history)
                self._retag(run, origin.tags(made), origin.name(made))
                for double, _ in doubles:
                    self.delete(double)
            self._complete(run, origin, curve, logged, status)
            run_id: str = run.info.run_id
        return run_id

    def record_seeds(
        self,
        origin: SeedsOrigin,
        summary: Sequence[Point],
        runs: Mapping[tuple[str, int], Sequence[Point]],
    ) -> str:
        """Make MLflow hold a run over all seeds, and within it one of each network and seed.

        A run is finished once it holds everything, so a finished one is left alone but for its
        tags, and what an interruption left is completed.

        Args:
            origin: what made them.
            summary: the figures over all seeds.
            runs: curve and figures of each network and seed.

        Returns:
            The id of the run over all.
        """
        with self.lock:
            made = origin.made(self.history)
            same = f"tags.`{KEY_TAG}` = '{origin.key}'"
            found = self.search(same)
            if not found:
                self._create(origin, made)
                found = self.search(same)
            parent, *doubles = _oldest_first(found)
            for double in doubles:
                self.delete(double)
            run_id: str = parent.info.run_id
            tags = origin.tags(made)
            ones = [(origin.one(*of), points) for of, points in runs.items()]
            tags_of = {one.key: tags | one.own_tags() | {PARENT_TAG: run_id} for one, _ in ones}
            there = self._nested(run_id)
            if missing := [one for one, _ in ones if one.key not in there]:
                for one in missing:
                    self._create(one, made, tags=tags_of[one.key])
                there = self._nested(run_id)  # another machine's as well, made meanwhile
            # the one over all last: it has ended when all have
            for one, points in [*ones, (origin, summary)]:
                run = parent if one is origin else there[one.key]
                self._retag(run, tags_of.get(one.key, tags), one.name(made))
                if run.info.status != "FINISHED":
                    names = {point.metric for point in points}
                    self._complete(run, one, points, self._logged(run, names), "FINISHED")
        return run_id

    def _nested(self, run_id: str) -> "dict[str, Run]":
        """Return the runs within a run by key; of doubles the oldest, the others are deleted."""
        found: dict[str, Run] = {}
        for run in _oldest_first(self.search(f"tags.`{PARENT_TAG}` = '{run_id}'")):
            key = run.data.tags.get(KEY_TAG)  # none: somebody's own run, put there by hand
            if key and found.setdefault(key, run) is not run:
                self.delete(run)
        return found

    def delete(self, run: "Run") -> None:
        """Delete a run and the models that were logged from it, as MLflow deletes: not for good."""
        runs = [run, *self.search(f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")]
        for one in runs:
            for model in self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{one.info.run_id}'"
            ):
                self.client.delete_logged_model(model.model_id)
            self.client.delete_run(one.info.run_id)

    def _complete(
        self, run: "Run", origin: Origin, points: Sequence[Point], logged: "Logged", status: str
    ) -> None:
        """Log what the run lacks: all, or the rest after an outage."""
        from mlflow.entities import Metric, Param

        run_id = run.info.run_id
        params = [
            Param(name, value)
            for name, value in origin.logged_params().items()
            if name not in run.data.params
        ]
        # of a result the time is the run's: what two machines log at once MLflow then takes as one
        time_of_all = run.info.start_time if origin.result else None
        missing = [
            Metric(p.metric, p.value, time_of_all or p.time, p.step)
            for p in points
            if (p.metric, p.step) not in logged
        ]
        room = LOGGED_PER_REQUEST - len(params)
        if params or missing:
            self.client.log_batch(run_id, missing[:room], params)
        for start in range(room, len(missing), LOGGED_PER_REQUEST):
            self.client.log_batch(run_id, missing[start : start + LOGGED_PER_REQUEST])
        if not run.inputs.dataset_inputs and (datasets := origin.datasets()):
            self.client.log_inputs(run_id, datasets)
        if run.info.status not in ("FINISHED", status):
            if status != "RUNNING":
                self.client.set_terminated(run_id, status)
            elif missing:
                self.client.update_run(run_id, status)

    def _retag(self, run: "Run", tags: Mapping[str, str], name: str) -> None:
        """Bring tags and name up to date: a result may since have been committed.

        Another clone may know experiments that are not in this one, and who ran it stays said.
        """
        from mlflow.entities import RunTag

        run_id, there = run.info.run_id, run.data.tags
        wanted = dict(tags)
        if EXPERIMENT_TAG in there:
            known = {
                *there[EXPERIMENT_TAG].split(", "),
                *wanted.get(EXPERIMENT_TAG, "").split(", "),
            }
            wanted[EXPERIMENT_TAG] = ", ".join(sorted(known - {""}))
        if USER_TAG in there:
            wanted.pop(USER_TAG, None)
        stale = [tag for tag in wanted.items() if tag not in there.items()]
        if stale:
            self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in stale])
        if run.info.run_name != name and (EXPERIMENT_TAG in tags or EXPERIMENT_TAG not in there):
            self.client.update_run(run_id, name=name)

    def search(self, query: str) -> "list[Run]":
        """Return all runs that a query finds, the newest first."""
        found: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=RUNS_PER_REQUEST, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def of_weights(self, sha256: str) -> str | None:
        """Return the id of the run that made a checkpoint; None if there is none."""
        found = _oldest_first(self.search(f"tags.`{WEIGHTS_TAG}` = '{sha256}'"))
        return found[0].info.run_id if found else None

    def within(self, run_ids: Iterable[str]) -> list[str]:
        """Return the ids of the runs within runs."""
        queries = [f"tags.`{PARENT_TAG}` = '{run_id}'" for run_id in run_ids]
        return [run.info.run_id for query in queries for run in self.search(query)]

    def logged_models(self, run_ids: Iterable[str]) -> list[str]:
        """Return the ids of the models that were logged from runs."""
        wanted, token = set(run_ids), None
        found: list[str] = []
        while True:
            page = self.client.search_logged_models([self.experiment_id], page_token=token)
            found += [model.model_id for model in page if model.source_run_id in wanted]
            token = page.token
            if not token:
                return found

    def _find(self, origin: Origin, curve: Sequence[Point]) -> "list[tuple[Run, Logged]]":
        """Return the runs of this result: same key, and nothing that contradicts it.

        The one to keep is the first: one that is known to be of these weights, else the oldest.
        """
        weights = (origin.result.tags if origin.result else {}).get(WEIGHTS_TAG)
        found = []
        for run in _oldest_first(self.search(f"tags.`{KEY_TAG}` = '{origin.key}'")):
            if weights and run.data.tags.get(WEIGHTS_TAG, weights) != weights:
                continue
            logged = self._logged(run, set(CURVE.values()))
            if all(p.value in logged.get((p.metric, p.step), {p.value}) for p in curve):
                found.append((run, logged))
        return sorted(found, key=lambda one: WEIGHTS_TAG not in one[0].data.tags)

    def _logged(self, run: "Run", names: set[str]) -> "Logged":
        logged: dict[tuple[str, int], set[float]] = defaultdict(set)
        for name in run.data.metrics.keys() & names:
            for metric in self.client.get_metric_history(run.info.run_id, name):
                logged[name, metric.step].add(metric.value)
        return logged

    def _create(
        self,
        origin: Origin,
        made: Made,
        start: int | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> "Run":
        return self.client.create_run(
            self.experiment_id,
            start_time=start,
            tags=dict(tags or origin.tags(made)),
            run_name=origin.name(made),
        )


def _oldest_first(runs: "list[Run]") -> "list[Run]":
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


def _is_database(uri: str) -> bool:
    from mlflow.store.db.db_types import DATABASE_ENGINES

    return uri.startswith(tuple(DATABASE_ENGINES))


def _create_database(path: Path, artifacts: str) -> None:
    """Create MLflow's SQLite database, whole or not at all.

    MLflow migrates an empty database step by step, which takes seconds; a process killed on the
    way would leave one that no later run can open.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if not path.exists():
        with replacing(path) as temporary:
            SqlAlchemyStore(f"sqlite:///{temporary}", artifacts).engine.dispose()


@contextlib.contextmanager
def opened(experiment: str, root: Path) -> Iterator[Runs]:
    """Connect to a store to read from it.

    Raises:
        UserError: There is none yet, it cannot be reached, or it is not usable.
    """
    if (local := database(root)) and not local.exists():
        uri = tracking_uri(root)
        raise UserError(f"no run has been tracked yet: no {uri}; run `dvc repro sync` first")
    try:
        yield Runs.open(experiment, root, create=False)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        raise UserError(trouble(error, root)) from None


def trouble(error: Exception, root: Path) -> str:
    """Say in a line what is wrong with the store."""
    cause: BaseException = error
    while following := (cause.__cause__ or (not cause.__suppress_context__ and cause.__context__)):
        cause = following
    # of a network error only the innermost is short: "[Errno 111] Connection refused"
    reason = str(cause if isinstance(cause, OSError) else error) or type(error).__name__
    return without_password(f"MLflow at {tracking_uri(root)}: {reason.splitlines()[0]}")


def warn(error: Exception, root: Path) -> None:
    """Write the one line on stderr that a store which does not work is worth."""
    start = "\n" if sys.stderr.isatty() else ""  # below the progress bar
    click.echo(f"{start}warning: {trouble(error, root)}", err=True)
