"""Live logging beside training: a child process talks to MLflow, training only feeds its pipe.

MLflow's import, a slow or dead server and every error of theirs stay in the child
(``python -m mnist_batchnorm.mlflow_sync.live_child``). Training imports this file and no more, so a change in how
runs are logged does not make DVC train again.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

import click

from mnist_batchnorm.core.paths import PARAMS_FILE

GRACE = 1.0  # seconds to deliver the rest once training has ended


class LiveRuns:
    """Training's end of the pipe to the child: writing never blocks and never raises."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdin is not None
        self._child = child
        self._pipe = child.stdin.fileno()
        self._unsent = b""
        self._running: list[str] = []
        self._params = _params()
        os.set_blocking(self._pipe, False)

    def begin(self, variant: str, device: str) -> None:
        """Hand over that a training has begun.

        Args:
            variant: ``bn`` or ``plain``.
            device: where it runs, as PyTorch writes it: ``cpu``, ``cuda:0``.
        """
        self._running.append(variant)
        self._send({"variant": variant, "device": device, "params": self._params, "time": _now()})

    def log_epoch(self, variant: str, row: Mapping[str, float]) -> None:
        """Hand over one row of a learning curve."""
        self._send({"variant": variant, **row, "time": _now()})

    def end(self, variant: str, status: str) -> None:
        """Hand over how a training has ended, in MLflow's words: FINISHED, FAILED or KILLED."""
        if variant in self._running:
            self._running.remove(variant)
            self._send({"variant": variant, "status": status})

    def close(self, status: str, grace: float) -> bool:
        """End what still runs, and the child.

        Args:
            status: of the trainings that have not ended.
            grace: seconds that the child has for what is not delivered yet.

        Returns:
            Whether all of it was delivered.
        """
        assert self._child.stdin is not None
        deadline = time.monotonic() + grace
        try:
            for variant in tuple(self._running):
                self.end(variant, status)
            while self._unsent and self._child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
                self._flush()
            self._child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(max(0.0, deadline - time.monotonic()))
        finally:
            self._child.kill()  # of no effect when it has ended by itself
            self._child.wait()
        return self._child.returncode == 0

    def _send(self, message: Mapping[str, object]) -> None:
        self._unsent += json.dumps(message).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write what the pipe takes now and keep the rest for the next call."""
        try:
            written = os.write(self._pipe, self._unsent)
        except BlockingIOError:  # full: the child is busy
            written = 0
        except BrokenPipeError:  # the child is dead, which its exit status will say
            written = len(self._unsent)
        self._unsent = self._unsent[written:]


class Untracked(LiveRuns):
    """Stands in where the child could not be started: the files will hold it all."""

    def __init__(self) -> None:
        self._running = []
        self._params = ""

    def close(self, status: str, grace: float) -> bool:
        """Do nothing."""
        return True

    def _send(self, message: Mapping[str, object]) -> None:
        pass


def _params() -> str:
    """Return what params.yaml says now: it may be edited before the child has come to read it."""
    try:
        return PARAMS_FILE.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # which training itself will say
        return ""


def _now() -> int:
    return time.time_ns() // 1_000_000  # as MLflow counts


def _start_child() -> "subprocess.Popen[bytes] | None":
    # -P: import the installed package, whatever lies in the working directory.
    # A session of its own: Ctrl-C is for training, which tells the child how it ended.
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "mnist_batchnorm.mlflow_sync.live_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        click.echo(f"warning: MLflow will not show this while it trains: {error}", err=True)
        return None


@contextlib.contextmanager
def live_runs() -> Iterator[LiveRuns]:
    """Show trainings in MLflow while they run.

    What has not ended when the block ends is FINISHED if it ends well, KILLED on Ctrl-C and FAILED
    on any other exception, which goes on to the caller. A tracker that is slow, down or broken
    costs the caller at most the grace time at the end and two lines on stderr.
    """
    child = _start_child()
    runs = LiveRuns(child) if child else Untracked()
    status = "FAILED"
    try:
        yield runs
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not runs.close(status, GRACE):
            click.echo(
                "MLflow does not have all of this yet; `mnist-bn sync` (the last stage of "
                "`dvc repro`) completes it from the files",
                err=True,
            )
