"""The child process of `training.live`: shows trainings in MLflow while they run.

``python -m mnist_batchnorm.mlflow_sync.live_child`` reads training's messages from standard input.
"""

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mnist_batchnorm.core.child import MessageReader
from mnist_batchnorm.core.params import load_params, parse_params
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.connection import warn
from mnist_batchnorm.mlflow_sync.points import Point, curve_points
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity
from mnist_batchnorm.mlflow_sync.run_store import RunStore

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


@dataclass
class LiveRun:
    """A training to record."""

    variant: str
    device: str
    start: int  # milliseconds since 1970
    params: str  # the text of params.yaml at the start
    curve: list[Point] = field(default_factory=list)
    status: str = "RUNNING"
    pending: bool = True  # MLflow lacks some of this
    identity: RunIdentity | None = None
    monitor: "SystemMetricsMonitor | None" = None

    def receive(self, message: Mapping[str, Any]) -> None:
        if "status" in message:
            self.status = message["status"]
        else:
            self.curve += curve_points(message)
        self.pending = True

    def identify(self) -> None:
        """Find the identity once, with the parameters from when training began."""
        if not self.identity:
            params = parse_params(self.params) if self.params else None
            self.identity = RunIdentity.of_workspace(self.variant, self.device, params)

    def record(self, store: RunStore) -> None:
        assert self.identity
        run_id = store.record(self.identity, self.curve, self.status, self.start)
        self.pending = False
        if self.status != "RUNNING":
            self.stop_monitor()
        elif self.monitor is None:
            self.monitor = system_monitor(store, run_id)

    def stop_monitor(self) -> None:
        if self.monitor:
            self.monitor.finish()
            self.monitor = None


def system_monitor(store: RunStore, run_id: str) -> "SystemMetricsMonitor | None":
    """Start to log the machine's load if ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`` is set."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    mlflow.set_tracking_uri(store.uri)
    monitor = SystemMetricsMonitor(run_id)
    monitor.start()
    return monitor


def record_live(descriptor: int) -> bool:
    """Record trainings while they run; return whether MLflow has the runs to their ends.

    After a failure the next message retries with everything that is missing, so an outage that
    ends before training does costs no more than a warning.
    """
    root = repository()
    store: RunStore | None = None
    runs: dict[str, LiveRun] = {}
    warned = False
    for messages in read_messages(descriptor, runs):
        for message in messages:
            receive(runs, message)
        try:
            for run in runs.values():
                run.identify()
            for run in runs.values():
                if run.pending:
                    store = store or RunStore.open(load_params().sync.experiment, root)
                    run.record(store)
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            if not warned:
                warn(error, root)
                warned = True
    for run in runs.values():
        run.stop_monitor()
    return not any(run.pending for run in runs.values())


def read_messages(descriptor: int, runs: Mapping[str, LiveRun]) -> Iterator[list[dict[str, Any]]]:
    """Yield messages as they arrive; when the pipe closes, trainings that run were killed."""
    yield from MessageReader(descriptor)
    killed = [run.variant for run in runs.values() if run.status == "RUNNING"]
    yield [{"variant": variant, "status": "KILLED"} for variant in killed]


def receive(runs: dict[str, LiveRun], message: Mapping[str, Any]) -> None:
    variant = message["variant"]
    if "device" in message:
        runs[variant] = LiveRun(variant, message["device"], message["time"], message["params"])
    else:
        runs[variant].receive(message)


if __name__ == "__main__":
    gc.disable()  # a fifth of the time that MLflow takes to import; see cli.py
    status = 0 if record_live(0) else 1
    sys.stderr.flush()
    os._exit(status)  # training waits, and MLflow takes a while to shut down
