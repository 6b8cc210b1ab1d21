"""The child process of `tracking.live_runs`: MLflow shows trainings while they run.

``python -m mnist_batchnorm.mlflow_sync.live_child`` reads what training tells from its standard input.
"""

import gc
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mnist_batchnorm.core.params import load_params, parse_params
from mnist_batchnorm.core.paths import repository
from mnist_batchnorm.mlflow_sync.run_identity import Origin
from mnist_batchnorm.mlflow_sync.run_store import Point, Runs, curve_points, warn

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


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
        params: the text of ``params.yaml`` then.
        curve: the learning curve so far.
        status: RUNNING, or how it ended.
        news: whether MLflow lacks some of this.
        origin: what made it, as it was when it was first looked up.
        monitor: measures the machine, if the user wants that.
    """

    variant: str
    device: str
    start: int
    params: str
    curve: list[Point] = field(default_factory=list)
    status: str = "RUNNING"
    news: bool = True
    origin: Origin | None = None
    monitor: "SystemMetricsMonitor | None" = None

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
        run_id = runs.record(self.origin, self.curve, self.status, self.start)
        self.news = False
        if self.status != "RUNNING":
            self.stop_monitor()
        elif self.monitor is None:
            self.monitor = system_monitor(runs, run_id)

    def find_origin(self) -> Origin:
        """Find what makes the run, with the parameters as they were when training began."""
        params = parse_params(self.params) if self.params else None
        return Origin.of_workspace(self.variant, self.device, params)

    def stop_monitor(self) -> None:
        """End the thread that measures the machine, if there is one."""
        if self.monitor:
            self.monitor.finish()
            self.monitor = None


def system_monitor(runs: Runs, run_id: str) -> "SystemMetricsMonitor | None":
    """Start to log the machine's load, if ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`` asks for it."""
    import mlflow
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    mlflow.set_tracking_uri(runs.uri)
    monitor = SystemMetricsMonitor(run_id)
    monitor.start()
    return monitor


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
        hear(followed, messages)
        try:
            for one in followed.values():
                one.origin = one.origin or one.find_origin()
            for one in followed.values():
                if one.news:
                    runs = runs or Runs.open(load_params().sync.experiment, root)
                    one.record(runs)
        except Exception as error:  # noqa: BLE001 - a plug-in's errors have no common base
            if not warned:
                warn(error, root)
                warned = True
    for one in followed.values():
        one.stop_monitor()
    return not any(one.news for one in followed.values())


def hear(followed: dict[str, Following], messages: Iterable[Mapping[str, Any]] | None) -> None:
    """Take in messages; None: the other end has closed, and what still runs was killed."""
    if messages is None:
        for one in followed.values():
            if one.status == "RUNNING":
                one.hear({"status": "KILLED"})
        return
    for message in messages:
        variant = message["variant"]
        if "device" in message:
            followed[variant] = Following(
                variant, message["device"], message["time"], message["params"]
            )
        else:
            followed[variant].hear(message)


if __name__ == "__main__":
    gc.disable()  # a fifth of the time that MLflow takes to import; see cli.py
    status = 0 if follow(0) else 1
    sys.stderr.flush()
    os._exit(status)  # training waits, and to take MLflow down in good order takes a while
