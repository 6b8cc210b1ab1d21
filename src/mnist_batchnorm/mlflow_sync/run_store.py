"""The runs of an MLflow experiment, found by identity: creating and updating them is idempotent."""

import contextlib
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import fingerprint
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.lineage.git import GitHistory, Provenance
from mnist_batchnorm.mlflow_sync.connection import (
    create_database,
    describe_error,
    import_mlflow,
    is_database,
)
from mnist_batchnorm.mlflow_sync.points import CURVE, Point
from mnist_batchnorm.mlflow_sync.run_identity import (
    EXPERIMENT_TAG,
    KEY_TAG,
    USER_TAG,
    WEIGHTS_TAG,
    RunIdentity,
    SeedsIdentity,
)
from mnist_batchnorm.mlflow_sync.uri import database_path, tracking_uri, without_password

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow.entities import LoggedModel, Run
    from mlflow.store.entities import PagedList
    from mlflow.tracking import MlflowClient

    Logged = Mapping[tuple[str, int], set[float]]  # a run's points: (metric, step) -> values

T = TypeVar("T")

PARENT_TAG = "mlflow.parentRunId"  # the UI nests a run with this tag
RUNS_PER_REQUEST = 1000
# held for less than 1 s, or 3 s to create the database, or 10 s to log the models
LOCK_TIMEOUT_S = 120


@dataclass
class RunStore:
    """The runs of one MLflow experiment.

    Attributes:
        uri: MLflow's tracking URI.
        client: client of that store.
        experiment_id: MLflow's id of the experiment.
        lock: held while runs are searched and changed, so that processes on one machine that
            record the same result make one run.
        lock_id: the same for all processes that share the lock.
        history: where results are recorded in git.
    """

    uri: str
    client: "MlflowClient"
    experiment_id: str
    lock: "BaseFileLock"
    history: GitHistory = field(default_factory=lambda: GitHistory(repository()))

    @property
    def lock_id(self) -> str:
        return fingerprint({"machine": platform.node(), "lock": str(self.lock.lock_file)})

    @classmethod
    def open(cls, experiment: str, root: Path, *, create: bool = True) -> "RunStore":
        """Connect to the store, creating a SQLite database and the experiment if missing.

        A deleted experiment is restored, because MLflow reserves its name.

        Raises:
            UserError: The experiment is missing and not to be created.
            Exception: Whatever MLflow or a plug-in raises for a store that is not usable.
        """
        import_mlflow()
        from filelock import FileLock
        from mlflow.tracking import MlflowClient

        uri = tracking_uri(root)
        artifacts = (root / "mlartifacts").as_uri()
        database = database_path(root)
        # beside the database, for all who use it
        beside = database or root / "mlflow.db"
        lock = FileLock(beside.with_name(f"{beside.name}.lock"), timeout=LOCK_TIMEOUT_S)
        with lock:
            if database:
                create_database(database, artifacts)
            # MLflow's default registry is the one that this process used last
            client = MlflowClient(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri)
            found = client.get_experiment_by_name(experiment)
            if not (found or create):
                raise UserError(
                    f"no experiment {experiment!r} in MLflow at {without_password(uri)}: no run "
                    "has been tracked yet; run `dvc repro sync` first"
                )
            if not found:
                # a server decides itself where artifacts go
                location = artifacts if is_database(uri) else None
                return cls(uri, client, client.create_experiment(experiment, location), lock)
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
        return cls(uri, client, found.experiment_id, lock)

    def record(
        self,
        identity: RunIdentity,
        curve: Sequence[Point],
        status: str,
        start: int | None = None,
    ) -> str:
        """Create or update the run of a training; idempotent.

        A run with the same key is updated if its points and weights do not contradict these; a
        machine that computes other numbers from the same inputs gets a run of its own. Points that
        are there are not logged again, and a finished run stays finished. Once the result is
        known, duplicates are deleted.
        """
        with self.lock:
            run, logged = self._find_or_create(
                identity, identity.provenance(self.history), curve, start
            )
            self._complete(run, identity, curve, logged, status)
        return str(run.info.run_id)

    def _find_or_create(
        self,
        identity: RunIdentity,
        provenance: Provenance,
        curve: Sequence[Point] = (),
        start: int | None = None,
    ) -> "tuple[Run, Logged]":
        found = self._matching(identity, curve)
        if not found:
            self._create(identity.run_name(provenance), identity.tags(provenance), start)
            # includes a run that another machine has created meanwhile
            found = self._matching(identity, curve)
        (run, logged), *duplicates = found
        if identity.result:
            self._update_tags(run, identity.tags(provenance), identity.run_name(provenance))
            for duplicate, _ in duplicates:
                self.delete(duplicate)
        return run, logged

    def record_seeds(
        self,
        identity: SeedsIdentity,
        summary: Sequence[Point],
        runs: Mapping[tuple[str, int], Sequence[Point]],
    ) -> str:
        """Create or update the parent run of stage seeds and a nested run per network and seed.

        A run is finished once it is complete, so of a finished one only the tags are updated.
        """
        with self.lock:
            provenance = identity.provenance(self.history)
            parent, _ = self._find_or_create(identity, provenance)
            run_id: str = parent.info.run_id
            tags = identity.tags(provenance) | {PARENT_TAG: run_id}
            children = [(identity.of_seed(*pair), points) for pair, points in runs.items()]
            nested = self._nested_by_key(run_id)
            if missing := [child for child, _ in children if child.key not in nested]:
                for child in missing:
                    self._create(child.run_name(provenance), tags | child.identifying_tags())
                nested = self._nested_by_key(run_id)  # another machine may have created some
            for child, points in children:
                run = nested[child.key]
                self._update_tags(run, tags | child.identifying_tags(), child.run_name(provenance))
                self._finish(run, child, points)
            self._finish(parent, identity, summary)  # last: it ends when all have
        return run_id

    def _finish(self, run: "Run", identity: SeedsIdentity, points: Sequence[Point]) -> None:
        if run.info.status != "FINISHED":
            logged = self._logged(run, {point.metric for point in points})
            self._complete(run, identity, points, logged, "FINISHED")

    def _nested_by_key(self, run_id: str) -> "dict[str, Run]":
        """Return a run's nested runs; the oldest of duplicates, the others are deleted."""
        found: dict[str, Run] = {}
        for run in _oldest_first(self._nested(run_id)):
            key = run.data.tags.get(KEY_TAG)  # a run that a user nested by hand has no key
            if key and found.setdefault(key, run) is not run:
                self.delete(run)
        return found

    def _nested(self, run_id: str) -> "list[Run]":
        return self.search(f"tags.`{PARENT_TAG}` = '{run_id}'")

    def delete(self, run: "Run") -> None:
        """Mark a run, its nested runs and the models logged from them as deleted."""
        for one in [run, *self._nested(run.info.run_id)]:
            for model in self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{one.info.run_id}'"
            ):
                self.client.delete_logged_model(model.model_id)
            self.client.delete_run(one.info.run_id)

    def _complete(
        self,
        run: "Run",
        identity: RunIdentity,
        points: Sequence[Point],
        logged: "Logged",
        status: str,
    ) -> None:
        from mlflow.entities import Metric, Param

        run_id = run.info.run_id
        params = [
            Param(name, value)
            for name, value in identity.logged_params().items()
            if name not in run.data.params
        ]
        # one time for all points of a result: MLflow merges equal points of two machines
        time = run.info.start_time if identity.result else None
        missing = [
            Metric(point.metric, point.value, time or point.time, point.step)
            for point in points
            if (point.metric, point.step) not in logged
        ]
        if params or missing:
            self.client.log_batch(run_id, missing, params)
        if not run.inputs.dataset_inputs and (datasets := identity.datasets()):
            self.client.log_inputs(run_id, datasets)
        if run.info.status not in ("FINISHED", status):
            if status != "RUNNING":
                self.client.set_terminated(run_id, status)
            elif missing:
                self.client.update_run(run_id, status)

    def _update_tags(self, run: "Run", tags: Mapping[str, str], name: str) -> None:
        """Update tags and name: a result may have been committed since.

        Experiments that another clone knows and the user who ran the training are kept.
        """
        from mlflow.entities import RunTag

        run_id, existing = run.info.run_id, run.data.tags
        wanted = dict(tags)
        if EXPERIMENT_TAG in existing:
            names = f"{existing[EXPERIMENT_TAG]}, {wanted.get(EXPERIMENT_TAG, '')}".split(", ")
            wanted[EXPERIMENT_TAG] = ", ".join(sorted({*names} - {""}))
        if USER_TAG in existing:
            wanted.pop(USER_TAG, None)
        stale = [tag for tag in wanted.items() if tag not in existing.items()]
        if stale:
            self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in stale])
        if run.info.run_name != name and (EXPERIMENT_TAG in tags or EXPERIMENT_TAG not in existing):
            self.client.update_run(run_id, name=name)

    def search(self, query: str) -> "list[Run]":
        return _all_pages(
            lambda token: self.client.search_runs(
                [self.experiment_id], query, max_results=RUNS_PER_REQUEST, page_token=token
            )
        )

    def find_by_weights(self, sha256: str) -> str | None:
        """Return the id of the run that made a checkpoint; None if there is none."""
        found = _oldest_first(self.search(f"tags.`{WEIGHTS_TAG}` = '{sha256}'"))
        return found[0].info.run_id if found else None

    def nested_ids(self, run_ids: Iterable[str]) -> list[str]:
        return [run.info.run_id for run_id in run_ids for run in self._nested(run_id)]

    def model_ids(self, run_ids: Iterable[str]) -> list[str]:
        sources = set(run_ids)
        models: list[LoggedModel] = _all_pages(
            lambda token: self.client.search_logged_models([self.experiment_id], page_token=token)
        )
        return [model.model_id for model in models if model.source_run_id in sources]

    def _matching(
        self, identity: RunIdentity, curve: Sequence[Point]
    ) -> "list[tuple[Run, Logged]]":
        """Return the runs with this key that do not contradict the result.

        The first is the one to keep: with the tag of these weights, else the oldest.
        """
        weights = (identity.result.tags if identity.result else {}).get(WEIGHTS_TAG)
        found = []
        for run in _oldest_first(self.search(f"tags.`{KEY_TAG}` = '{identity.key}'")):
            if weights and run.data.tags.get(WEIGHTS_TAG, weights) != weights:
                continue
            logged = self._logged(run, set(CURVE.values()))
            if all(p.value in logged.get((p.metric, p.step), {p.value}) for p in curve):
                found.append((run, logged))
        return sorted(found, key=lambda match: WEIGHTS_TAG not in match[0].data.tags)

    def _logged(self, run: "Run", names: set[str]) -> "Logged":
        logged: dict[tuple[str, int], set[float]] = defaultdict(set)
        for name in run.data.metrics.keys() & names:
            for metric in self.client.get_metric_history(run.info.run_id, name):
                logged[name, metric.step].add(metric.value)
        return logged

    def _create(self, name: str, tags: Mapping[str, str], start: int | None = None) -> None:
        self.client.create_run(self.experiment_id, start, dict(tags), name)


def _all_pages(request: "Callable[[str | None], PagedList[T]]") -> list[T]:
    page = request(None)
    found = list(page)
    while page.token:
        page = request(page.token)
        found += page
    return found


def _oldest_first(runs: "list[Run]") -> "list[Run]":
    return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))


@contextlib.contextmanager
def reading(experiment: str, root: Path) -> Iterator[RunStore]:
    """Connect to an existing store; errors are raised as `UserError`, also those of the block."""
    if (database := database_path(root)) and not database.exists():
        uri = tracking_uri(root)
        raise UserError(f"no run has been tracked yet: no {uri}; run `dvc repro sync` first")
    try:
        yield RunStore.open(experiment, root, create=False)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
        raise UserError(describe_error(error, root)) from None
