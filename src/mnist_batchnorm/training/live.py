"""Live logging beside training: a child process talks to MLflow, training only feeds its pipe.

MLflow's import, a slow or dead server and all its errors stay in `mlflow_sync.live_child`. Training
starts that module by name and does not import it, so a change in how runs are logged does not make
DVC train again.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping

import click

from mnist_batchnorm.core.child import MessageWriter, start_child, stop_child
from mnist_batchnorm.core.paths import PARAMS_FILE

CHILD = "mnist_batchnorm.mlflow_sync.live_child"
DELIVERY_GRACE_S = 1.0  # to deliver the rest once training has ended


class LiveRuns:
    """Training's end of the pipe to the child: never blocks and never raises.

    Without a child nothing is logged; `mnist-bn sync` will do it from the files.
    """

    def __init__(self, child: "subprocess.Popen[bytes] | None") -> None:
        self._child = child
        self._pipe = MessageWriter(child.stdin.fileno()) if child and child.stdin else None
        self._running: list[str] = []
        self._params = _params_text()

    def begin(self, variant: str, device: str) -> None:
        """Log the start of a training."""
        self._running.append(variant)
        self._send({"variant": variant, "device": device, "params": self._params, "time": _now()})

    def log_epoch(self, variant: str, row: Mapping[str, float]) -> None:
        self._send({"variant": variant, **row, "time": _now()})

    def end(self, variant: str, status: str) -> None:
        """Log the end of a training with MLflow's status FINISHED, FAILED or KILLED."""
        if variant in self._running:
            self._running.remove(variant)
            self._send({"variant": variant, "status": status})

    def close(self, status: str, grace_s: float) -> bool:
        """End the trainings that still run with ``status``, and the child.

        Returns:
            Whether the child delivered everything within ``grace_s`` seconds.
        """
        if not (self._child and self._pipe):
            return True
        deadline = time.monotonic() + grace_s
        try:
            for variant in tuple(self._running):
                self.end(variant, status)
            while not self._pipe.flush() and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            exit_status = stop_child(self._child, max(0.0, deadline - time.monotonic()))
        return exit_status == 0

    def _send(self, message: Mapping[str, object]) -> None:
        if self._pipe:
            self._pipe.send(message)


def _params_text() -> str:
    """Read params.yaml now, because it may be edited before the child has imported MLflow."""
    try:
        return PARAMS_FILE.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # training itself reports it
        return ""


def _now() -> int:
    return time.time_ns() // 1_000_000  # milliseconds, as MLflow counts


def _start() -> LiveRuns:
    try:
        return LiveRuns(start_child(CHILD, stdin=subprocess.PIPE))
    except OSError as error:
        click.echo(f"warning: MLflow will not show this while it trains: {error}", err=True)
        return LiveRuns(None)


@contextlib.contextmanager
def live_runs() -> Iterator[LiveRuns]:
    """Show trainings in MLflow while they run.

    What has not ended when the block ends is FINISHED if it ends well, KILLED on Ctrl-C and FAILED
    on any other exception, which propagates. A tracker that is slow, down or broken costs the
    caller at most `DELIVERY_GRACE_S` and two lines on stderr.
    """
    runs = _start()
    status = "FAILED"
    try:
        yield runs
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not runs.close(status, DELIVERY_GRACE_S):
            click.echo(
                "MLflow does not have all of this yet; `mnist-bn sync` (the last stage of "
                "`dvc repro`) completes it from the files",
                err=True,
            )
