"""Training runs as MLflow shows them: a view of the files on disk, which can be rebuilt from them.

A run is keyed by what made it, as ``dvc.lock`` records it, so telling MLflow twice makes no second
run. ``python -m mnist_batchnorm.runs`` is the child process of `tracking.live_runs`.
"""

import contextlib
import gc
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
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mnist_batchnorm.dataset import SIDE
from mnist_batchnorm.errors import UserError
from mnist_batchnorm.files import digest, replacing
from mnist_batchnorm.layout import REPORTS, SEED_CURVES, SEEDS, SPLITS, repository
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

PARENT_TAG = "mlflow.parentRunId"  # the UI shows a run that has it below that one
BOTH = "both"  # in place of a variant

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
# seconds; held for less than one, or 3 to create the database, or 2 to record 32 seeds
LOCK_TIMEOUT = 30


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


class Inputs(NamedTuple):
    """What a stage that trains depends on.

    Attributes:
        deps: MD5 of each dependency of the stage by path, as ``dvc.lock`` shows them.
        prepare: how the data was split.
        train: how the networks were trained.
    """

    deps: Mapping[str, str]
    prepare: PrepareParams
    train: TrainParams

    @classmethod
    def of_workspace(cls, stage: str) -> "Inputs":
        """Take them as they are in the current folder.

        Raises:
            UserError: ``dvc.yaml``, ``params.yaml`` or a dependency is missing or unusable.
        """
        try:
            paths = YAML(typ="safe", pure=True).load(DVC_FILE)["stages"][stage]["deps"]
        except FileNotFoundError:
            raise UserError(f"no {DVC_FILE} in {Path.cwd()}") from None
        except (OSError, YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{DVC_FILE}: no deps of stage {stage} can be read: {error}") from None
        deps = {}
        for path in paths:
            try:
                deps[path] = digest(Path(path), "md5")
            except OSError as error:
                raise UserError(
                    f"{DVC_FILE}: stage {stage} depends on {path}, which cannot be read "
                    f"({error.strerror}); run `dvc repro {stage}`"
                ) from None
        params = load_params()
        return cls(deps, params.prepare, params.train)

    @classmethod
    def of_outs(cls, stage: str, outs: Sequence[Path]) -> "Inputs":
        """Find what the stage made its outputs on disk from.

        ``dvc.lock`` knows, even when code or params have been edited since. Where it is not about
        these very files, because the stage ran without DVC, they are taken from the workspace.

        Args:
            stage: as ``dvc.yaml`` calls it.
            outs: those that matter.

        Raises:
            UserError: What they would be taken from is missing or unusable.
        """
        try:
            stages = YAML(typ="safe", pure=True).load(LOCK_FILE)["stages"]
            made, prepare = stages[stage], stages["prepare"]
            md5 = {out["path"]: out["md5"] for out in made["outs"]}
            if all(md5[path.as_posix()] == digest(path, "md5") for path in outs):
                return cls(
                    {dep["path"]: dep["md5"] for dep in made["deps"]},
                    PrepareParams.model_validate(prepare["params"][str(PARAMS_FILE)]["prepare"]),
                    TrainParams.model_validate(made["params"][str(PARAMS_FILE)]["train"]),
                )
        except (FileNotFoundError, KeyError):  # DVC has not run these stages
            pass
        except (OSError, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{LOCK_FILE} cannot be used, run `dvc repro`: {error}") from None
        return cls.of_workspace(stage)


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
        return cls(variant, device.partition(":")[0], *Inputs.of_workspace("train"))

    @classmethod
    def of_curve(cls, variant: str, device: str) -> "Origin":
        """Find what made the learning curve on disk; see `Inputs.of_outs`.

        Args:
            variant: ``bn`` or ``plain``.
            device: as the stage's metrics name it, ``cpu`` or ``cuda``.

        Raises:
            UserError: What the origin would be taken from is missing or unusable.
        """
        return cls(variant, device, *Inputs.of_outs("train", [REPORTS / f"curves/{variant}.csv"]))

    @property
    def stage(self) -> str:
        """The stage's address in DVC."""
        return "train"

    @property
    def key(self) -> str:
        """SHA-256 over all that decides the result; equal keys mean the same training."""
        return fingerprint(self.content())

    def content(self) -> dict[str, object]:
        """Return what the key is over."""
        train = self.train.model_dump(mode="json")
        return {
            "stage": self.stage,
            "variant": self.variant,
            "deps": dict(self.deps),
            "params": train | {"device": self.device},  # not auto, which may mean the same
        }

    @property
    def label(self) -> str:
        """What to call it among the runs of one experiment."""
        return self.variant

    @property
    def name(self) -> str:
        """What the run is called in MLflow."""
        return f"{os.environ.get('DVC_EXP_NAME') or 'workspace'}/{self.label}"

    @property
    def source(self) -> str:
        """The command that ran it."""
        return f"mnist-bn train {self.variant}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows and compares: ``train.lr`` -> ``0.01``."""
        flat = {
            f"{section}.{name}": str(value)
            for section, params in {"prepare": self.prepare, "train": self.train}.items()
            for name, value in params.model_dump(mode="json").items()
        }
        return {"variant": self.variant, "batch_norm": str(self.variant == "bn").lower(), **flat}

    def own_tags(self) -> dict[str, str]:
        """Return the tags that tell it from other runs of its stage."""
        return {"mnist_bn.key": self.key, "mnist_bn.variant": self.variant}

    def tags(self) -> dict[str, str]:
        """Return what ties the run to its key, DVC, git, and the software that ran it."""
        tags = {
            **self.own_tags(),
            "mnist_bn.device": self.device,
            "mnist_bn.python": platform.python_version(),
            "mnist_bn.torch": version("torch"),
            "dvc.stage": self.stage,
            # as md5sum writes it
            "dvc.deps": "\n".join(f"{md5}  {path}" for path, md5 in sorted(self.deps.items())),
            "mlflow.source.name": self.source,
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
            if (path := SPLITS[split].as_posix()) in self.deps
        ]


@dataclass(frozen=True)
class SeedsOrigin(Origin):
    """What made the runs of stage seeds: all of them, or one.

    Attributes:
        outs: MD5 of what the stage wrote. Known when the runs are recorded, so in their keys:
            other numbers from the same inputs are other runs.
        count: how many seeds.
        seed: of one run; None for all.
    """

    outs: Mapping[str, str]
    count: int
    seed: int | None = None

    @classmethod
    def of_files(cls, device: str, count: int) -> "SeedsOrigin":
        """Find what made the files on disk; see `Inputs.of_outs`.

        Args:
            device: as the stage's metrics name it.
            count: how many seeds they are about.

        Raises:
            UserError: What the origin would be taken from is missing or unusable.
        """
        outs = [SEEDS, SEED_CURVES]
        return cls(BOTH, device, *Inputs.of_outs("seeds", outs), hashes(outs, "md5"), count)

    def one(self, variant: str, seed: int) -> "SeedsOrigin":
        """Return what made one of the runs."""
        train = self.train.model_copy(update={"seed": seed})
        return replace(self, variant=variant, seed=seed, train=train)

    @property
    def stage(self) -> str:
        """The stage's address in DVC."""
        return "seeds"

    def content(self) -> dict[str, object]:
        """Return what the key is over."""
        content = super().content() | {"outs": dict(self.outs)}
        if self.seed is None:
            content["params"] = self.train.model_dump(mode="json", exclude={"device", "seed"})
        return content

    @property
    def label(self) -> str:
        """What to call it among the runs of one experiment."""
        return "seeds" if self.seed is None else f"seeds/{self.variant}-{self.seed}"

    @property
    def source(self) -> str:
        """The command that ran it."""
        return f"mnist-bn train --seeds {self.count}"

    def logged_params(self) -> dict[str, str]:
        """Return the parameters that MLflow shows; those of all have no seed and no network."""
        params = super().logged_params()
        if self.seed is not None:
            return params
        shown = {name: params[name] for name in params if "." in name and name != "train.seed"}
        return {"seeds.count": str(self.count), **shown}

    def datasets(self) -> "list[DatasetInput]":
        """Return the splits, once for all runs."""
        return super().datasets() if self.seed is None else []


def hashes(paths: Sequence[Path], algorithm: str = "sha256") -> dict[str, str]:
    """Return the hash of each file by its path."""
    return {path.as_posix(): digest(path, algorithm) for path in paths}


def fingerprint(content: Mapping[str, object]) -> str:
    """Return one SHA-256 for what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
            self._complete(run, origin, curve, logged, status)
        return run_id

    def record_seeds(
        self,
        origin: SeedsOrigin,
        summary: Sequence[Point],
        runs: Mapping[tuple[str, int], Sequence[Point]],
    ) -> str:
        """Make MLflow hold a run over all seeds, and within it one of each network and seed.

        A run is finished once it holds everything, so a finished one is left alone, and what an
        interruption left is completed.

        Args:
            origin: what made them.
            summary: the figures over all seeds.
            runs: curve and figures of each network and seed.

        Returns:
            The id of the run over all.
        """
        with self.lock:
            found = self._search(f"tags.`mnist_bn.key` = '{origin.key}'")
            tags = origin.tags()
            parent = found[0] if found else self._create(origin, tags=tags)
            run_id: str = parent.info.run_id
            tags[PARENT_TAG] = run_id
            there = {
                run.data.tags["mnist_bn.key"]: run
                for run in self._search(f"tags.`{PARENT_TAG}` = '{run_id}'")
            }
            there[origin.key] = parent
            ones = [(origin.one(*of), points) for of, points in runs.items()]
            # the one over all last: it has ended when all have
            for one, points in [*ones, (origin, summary)]:
                run = there.get(one.key) or self._create(one, tags=tags | one.own_tags())
                if run.info.status != "FINISHED":
                    names = {point.metric for point in points}
                    self._complete(run, one, points, self._logged(run, names), "FINISHED")
        return run_id

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
        missing = [
            Metric(p.metric, p.value, p.time, p.step)
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

    def _search(self, query: str) -> "list[Run]":
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

    def _find(self, origin: Origin, curve: Sequence[Point]) -> "tuple[Run, Logged] | None":
        """Return the fullest run with the key whose points do not contradict the curve."""
        candidates = []
        for run in self._search(f"tags.`mnist_bn.key` = '{origin.key}'"):
            logged = self._logged(run, set(CURVE.values()))
            if all(p.value in logged.get((p.metric, p.step), {p.value}) for p in curve):
                candidates.append((run, logged))
        return max(candidates, key=lambda candidate: len(candidate[1]), default=None)

    def _logged(self, run: "Run", names: set[str]) -> "Logged":
        logged: dict[tuple[str, int], set[float]] = defaultdict(set)
        for name in run.data.metrics.keys() & names:
            for metric in self.client.get_metric_history(run.info.run_id, name):
                logged[name, metric.step].add(metric.value)
        return logged

    def _create(
        self, origin: Origin, start: int | None = None, tags: Mapping[str, str] | None = None
    ) -> "Run":
        return self.client.create_run(
            self.experiment_id,
            start_time=start,
            tags=dict(tags or origin.tags()),
            run_name=origin.name,
        )


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


@dataclass
class Following:
    """A training that `follow` records.

    Attributes:
        variant: ``bn`` or ``plain``.
        device: where it runs, as PyTorch writes it.
        start: when it began, as `now` counts.
        curve: the learning curve so far.
        status: RUNNING, or how it ended.
        news: whether MLflow lacks some of this.
        origin: what made it, as it was when it was first looked up.
    """

    variant: str
    device: str
    start: int
    curve: list[Point] = field(default_factory=list)
    status: str = "RUNNING"
    news: bool = True
    origin: Origin | None = None

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in a row of the learning curve or how training ended."""
        if "status" in message:
            self.status = message["status"]
        else:
            self.curve += curve_points(message)
        self.news = True

    def record(self, runs: Runs) -> None:
        """Bring MLflow up to date."""
        assert self.origin is not None
        runs.record(self.origin, self.curve, self.status, self.start)
        self.news = False


def follow(descriptor: int) -> bool:
    """Record runs while they train: the child's end of the pipe from `tracking.live_runs`.

    After a failure the next message tries again with all that is missing, so an outage that ends
    before training does leaves no trace but a warning.

    Args:
        descriptor: where messages arrive, each about a variant: that it has begun, a row of its
            learning curve, or its status at the end. Who has sent no status when the other end
            closes was killed.

    Returns:
        Whether MLflow holds the runs to their ends.
    """
    root = repository()
    runs: Runs | None = None
    followed: dict[str, Following] = {}
    warned = False
    for messages in itertools.chain(received(descriptor), [None]):
        for message in messages or ():
            variant = message["variant"]
            if "device" in message:
                followed[variant] = Following(variant, message["device"], message["time"])
            else:
                followed[variant].hear(message)
        if messages is None:
            for one in followed.values():
                if one.status == "RUNNING":
                    one.hear({"status": "KILLED"})
        try:
            for one in followed.values():
                one.origin = one.origin or Origin.of_workspace(one.variant, one.device)
            for one in followed.values():
                if one.news:
                    runs = runs or Runs.open(load_params().track.experiment, root)
                    one.record(runs)
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            if not warned:
                warn(error, root)
                warned = True
    return not any(one.news for one in followed.values())


if __name__ == "__main__":
    os.nice(10)  # training goes first where there is one core
    gc.disable()  # a fifth of the time that MLflow takes to import; see cli.py
    sys.exit(0 if follow(0) else 1)
