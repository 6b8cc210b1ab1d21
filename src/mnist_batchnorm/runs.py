"""Training runs as MLflow shows them: a view of the files on disk, which can be rebuilt from them.

A run is keyed by what made it, as ``dvc.lock`` records it, so telling MLflow twice makes no second
run. ``python -m mnist_batchnorm.runs`` is the child process of `tracking.live_run`.
"""

import contextlib
import getpass
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_batchnorm.dataset import SIDE
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest, replacing
from mnist_batchnorm.layout import PREPARED, REPORTS
from mnist_batchnorm.params import PARAMS_FILE, PrepareParams, TrainParams, load_params
from mnist_batchnorm.results import CURVE_COLUMNS

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from mlflow.entities import DatasetInput, Run
    from mlflow.tracking import MlflowClient

    Logged = Mapping[tuple[str, int], set[float]]  # what a run holds: (metric, step) -> values

DVC_FILE = Path("dvc.yaml")
LOCK_FILE = Path("dvc.lock")
# Column of the learning curve -> metric. The UI draws a section of charts for each prefix, in
# alphabetical order.
CURVE = {name: f"curves/{name}" for name in CURVE_COLUMNS if name != "epoch"}

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
METRICS_PER_REQUEST = 1000  # MLflow's limit
LOCK_TIMEOUT = 30  # seconds; held for less than a second, or 3 to create the database


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


@dataclass(frozen=True)
class Origin:
    """What made a training run.

    Attributes:
        variant: ``bn`` or ``plain``.
        device: type of the device that it ran on, ``cpu`` or ``cuda``.
        deps: MD5 of each dependency of the stage by path, as ``dvc.lock`` shows them.
        prepare: how the data was split.
        train: how the network was trained.
    """

    variant: str
    device: str
    deps: Mapping[str, str]
    prepare: PrepareParams
    train: TrainParams

    @classmethod
    def of_workspace(cls, variant: str, device: str) -> "Origin":
        """Take the dependencies and params of stage train as they are in the current folder.

        Args:
            variant: ``bn`` or ``plain``.
            device: as PyTorch writes it; ``cuda:1`` counts as ``cuda``.

        Raises:
            UserError: ``dvc.yaml``, ``params.yaml`` or a dependency is missing or unusable.
        """
        try:
            paths = YAML(typ="safe", pure=True).load(DVC_FILE)["stages"]["train"]["deps"]
        except FileNotFoundError:
            raise UserError(f"no {DVC_FILE} in {Path.cwd()}") from None
        except (OSError, YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{DVC_FILE}: no deps of stage train can be read: {error}") from None
        deps = {}
        for path in paths:
            try:
                deps[path] = digest(Path(path), "md5")
            except OSError as error:
                raise UserError(
                    f"{DVC_FILE}: stage train depends on {path}, which cannot be read "
                    f"({error.strerror}); run `dvc repro train`"
                ) from None
        params = load_params()
        return cls(variant, device.partition(":")[0], deps, params.prepare, params.train)

    @classmethod
    def of_curve(cls, variant: str, device: str) -> "Origin":
        """Find what made the learning curve on disk.

        ``dvc.lock`` knows, even when code or params have been edited since. Where it is not about
        this very file, because the stage ran without DVC, the workspace is taken for the origin.

        Args:
            variant: ``bn`` or ``plain``.
            device: as the stage's metrics name it, ``cpu`` or ``cuda``.

        Raises:
            UserError: What the origin would be taken from is missing or unusable.
        """
        curve = REPORTS / f"curves/{variant}.csv"
        try:
            stages = YAML(typ="safe", pure=True).load(LOCK_FILE)["stages"]
            train, prepare = stages[f"train@{variant}"], stages["prepare"]
            md5 = {out["path"]: out["md5"] for out in train["outs"]}
            if md5[curve.as_posix()] == digest(curve, "md5"):
                return cls(
                    variant,
                    device,
                    {dep["path"]: dep["md5"] for dep in train["deps"]},
                    PrepareParams.model_validate(prepare["params"][str(PARAMS_FILE)]["prepare"]),
                    TrainParams.model_validate(train["params"][str(PARAMS_FILE)]["train"]),
                )
        except (FileNotFoundError, KeyError):  # DVC has not run these stages
            pass
        except (OSError, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{LOCK_FILE} cannot be used, run `dvc repro`: {error}") from None
        return cls.of_workspace(variant, device)

    @property
    def stage(self) -> str:
        """The stage's address in DVC."""
        return f"train@{self.variant}"

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the result; equal keys mean the same training."""
        train = self.train.model_dump(mode="json")
        content = {
            "stage": self.stage,
            "deps": dict(self.deps),
            "params": train | {"device": self.device},  # not auto, which may mean the same
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """What the run is called in MLflow."""
        return f"{os.environ.get('DVC_EXP_NAME') or 'workspace'}/{self.variant}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows and compares: ``train.lr`` -> ``0.01``."""
        flat = {
            f"{section}.{name}": str(value)
            for section, params in {"prepare": self.prepare, "train": self.train}.items()
            for name, value in params.model_dump(mode="json").items()
        }
        return {"variant": self.variant, "batch_norm": str(self.variant == "bn").lower(), **flat}

    def tags(self) -> dict[str, str]:
        """Return what ties the run to its key, DVC, git, and the software that ran it."""
        tags = {
            "mnist_bn.key": self.key,
            "mnist_bn.variant": self.variant,
            "mnist_bn.device": self.device,
            "mnist_bn.python": platform.python_version(),
            "mnist_bn.torch": version("torch"),
            "dvc.stage": self.stage,
            # as md5sum writes it
            "dvc.deps": "\n".join(f"{md5}  {path}" for path, md5 in sorted(self.deps.items())),
            "mlflow.source.name": f"mnist-bn train {self.variant}",
            "mlflow.source.type": "LOCAL",
            **git_tags([*self.deps, str(DVC_FILE), str(PARAMS_FILE)]),
        }
        if name := os.environ.get("DVC_EXP_NAME"):
            tags["dvc.exp_name"] = name
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        return tags

    def datasets(self) -> "list[DatasetInput]":
        """Return the two splits as MLflow's dataset inputs, their digests those of DVC."""
        import numpy as np
        from mlflow.data.schema import TensorDatasetSchema
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.types import Schema, TensorSpec

        uint8 = np.dtype(np.uint8)
        schema = TensorDatasetSchema(
            features=Schema([TensorSpec(uint8, (-1, SIDE, SIDE), "images")]),
            targets=Schema([TensorSpec(uint8, (-1,), "labels")]),
        )
        contexts = {"train": "training", "valid": "validation"}
        return [
            DatasetInput(
                Dataset(
                    name=split,
                    digest=self.deps[path],
                    source_type="local",
                    source=json.dumps({"uri": path}),
                    schema=json.dumps(schema.to_dict()),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for split, context in contexts.items()
            if (path := (PREPARED / f"{split}.safetensors").as_posix()) in self.deps
        ]


def git_tags(paths: Sequence[str]) -> dict[str, str]:
    """Return the commit that the run started from and whether ``paths`` differ from it.

    Empty where git, a commit, or this project's place in it is missing: a source archive that was
    unpacked inside another repository has no commit.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    try:
        commit = git("rev-parse", "HEAD", f"HEAD:./{DVC_FILE}").split()[0]
        dirty = git("status", "--porcelain", "--", *paths) != ""
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {
        "mlflow.source.git.commit": os.environ.get("DVC_EXP_BASELINE_REV") or commit,
        "mlflow.source.git.dirty": str(dirty).lower(),
    }


def store_root() -> Path:
    """Return the folder of the default store.

    DVC sets DVC_ROOT for its stages; for ``dvc exp run --temp`` and ``--queue`` it is the
    repository that the experiment was started from, not the temporary copy.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def tracking_uri(root: Path) -> str:
    """Return where MLflow stores: MLFLOW_TRACKING_URI, else ``mlflow.db`` in ``root``.

    A relative SQLite path is relative to ``root`` too: an experiment's temporary copy is deleted.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    return uri


class Runs:
    """The runs of one MLflow experiment.

    Attributes:
        uri: where MLflow stores.
        client: talks to it.
        experiment_id: the experiment.
        lock: held while runs are looked up and changed, so that processes on one machine that
            record the same result end up with one run.
    """

    def __init__(
        self, uri: str, client: "MlflowClient", experiment_id: str, lock: "BaseFileLock"
    ) -> None:
        self.uri = uri
        self.client = client
        self.experiment_id = experiment_id
        self.lock = lock

    @classmethod
    def open(cls, experiment: str, root: Path) -> "Runs":
        """Connect to the store, creating a SQLite database and the experiment where missing.

        Raises:
            Exception: whatever MLflow or a plug-in of its raises for a store that is not usable.
        """
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # the exception tells of its retries
        import mlflow.store.db.utils
        from filelock import FileLock
        from mlflow.tracking import MlflowClient

        mlflow.store.db.utils.MAX_RETRY_COUNT = 1  # else 100 s for a database that is not there
        uri = tracking_uri(root)
        artifacts = (root / "mlartifacts").as_uri()
        lock = FileLock(root / "mlflow.db.lock", timeout=LOCK_TIMEOUT)
        with lock:
            if uri.startswith("sqlite:///"):
                _create_database(Path(uri.removeprefix("sqlite:///")), artifacts)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
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

        A run with the same key is taken up if its points do not contradict the curve; a machine
        that computes other numbers from the same inputs gets a run of its own. What is there
        already is not logged again, and a finished run stays finished.

        Args:
            origin: what made the run.
            curve: the learning curve so far.
            status: RUNNING, FINISHED, FAILED or KILLED.
            start: when training started, as `now` counts; by default now.

        Returns:
            The run's id.
        """
        with self.lock:
            run, logged = self._find(origin, curve) or (self._create(origin, start), {})
            run_id: str = run.info.run_id
            self._describe(run, origin)
            missing = [point for point in curve if (point.metric, point.step) not in logged]
            self._log(run_id, missing)
            if run.info.status not in ("FINISHED", status):
                if status != "RUNNING":
                    self.client.set_terminated(run_id, status)
                elif missing:
                    self.client.update_run(run_id, status)
        return run_id

    def _find(self, origin: Origin, curve: Sequence[Point]) -> "tuple[Run, Logged] | None":
        """Return the fullest run with the key whose points do not contradict the curve."""
        candidates = []
        query = f"tags.`mnist_bn.key` = '{origin.key}'"
        for run in self.client.search_runs([self.experiment_id], query):
            logged = self._logged(run)
            if all(p.value in logged.get((p.metric, p.step), {p.value}) for p in curve):
                candidates.append((run, logged))
        return max(candidates, key=lambda candidate: len(candidate[1]), default=None)

    def _logged(self, run: "Run") -> "Logged":
        logged: dict[tuple[str, int], set[float]] = defaultdict(set)
        for name in run.data.metrics.keys() & CURVE.values():
            for metric in self.client.get_metric_history(run.info.run_id, name):
                logged[name, metric.step].add(metric.value)
        return logged

    def _create(self, origin: Origin, start: int | None) -> "Run":
        return self.client.create_run(
            self.experiment_id, start_time=start, tags=origin.tags(), run_name=origin.name
        )

    def _describe(self, run: "Run", origin: Origin) -> None:
        """Log the params and datasets that the run lacks: all, or the rest after an outage."""
        from mlflow.entities import Param

        params = [
            Param(name, value)
            for name, value in origin.logged_params().items()
            if name not in run.data.params
        ]
        if params:
            self.client.log_batch(run.info.run_id, params=params)
        if not run.inputs.dataset_inputs:
            self.client.log_inputs(run.info.run_id, origin.datasets())

    def _log(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.metric, p.value, p.time, p.step) for p in points]
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            self.client.log_batch(run_id, metrics[start : start + METRICS_PER_REQUEST])


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


def without_password(text: str) -> str:
    """Remove user and password from the addresses in a text."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def warn(error: Exception, root: Path) -> None:
    """Write the one line on stderr that a store which does not work is worth."""
    cause: BaseException = error
    while following := (cause.__cause__ or (not cause.__suppress_context__ and cause.__context__)):
        cause = following
    # of a network error only the innermost is short: "[Errno 111] Connection refused"
    reason = str(cause if isinstance(cause, OSError) else error) or type(error).__name__
    text = f"warning: MLflow at {tracking_uri(root)}: {reason.splitlines()[0]}"
    start = "\n" if sys.stderr.isatty() else ""  # below the progress bar
    click.echo(start + without_password(text), err=True)


def received(descriptor: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the JSON lines that have arrived, each time some have, until the other end closes."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield [json.loads(line) for line in lines]


def follow(variant: str, device: str, descriptor: int) -> bool:
    """Record a run while it trains: the child's end of the pipe from `tracking.live_run`.

    After a failure the next message tries again with all that is missing, so an outage that ends
    before training does leaves no trace but a warning.

    Args:
        variant: ``bn`` or ``plain``.
        device: as PyTorch writes it.
        descriptor: where rows of the learning curve and at last a status arrive.

    Returns:
        Whether MLflow holds the run to its end.
    """
    start = now()
    root = store_root()
    origin: Origin | None = None
    runs: Runs | None = None
    curve: list[Point] = []
    complete = warned = False
    died: list[list[dict[str, Any]]] = [[{"status": "KILLED"}]]  # closed without a status
    for messages in itertools.chain([[]], received(descriptor), died):
        status = "RUNNING"
        for message in messages:
            if "status" in message:
                status = message["status"]
            else:
                curve += curve_points(message)
        try:
            origin = origin or Origin.of_workspace(variant, device)
            runs = runs or Runs.open(load_params().track.experiment, root)
            runs.record(origin, curve, status, start)
            complete = True
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            complete = False
            if not warned:
                warn(error, root)
                warned = True
        if status != "RUNNING":
            break
    return complete


if __name__ == "__main__":
    os.nice(10)  # training goes first where there is one core
    sys.exit(0 if follow(sys.argv[1], sys.argv[2], 0) else 1)
