"""Live logging beside training: a child process talks to MLflow, training only feeds its pipe.

MLflow's import, a slow or dead server and every error of theirs stay in the child
(``python -m mnist_batchnorm.runs``). Training imports this file and no more, so a change in how
runs are logged does not make DVC train again.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mnist_batchnorm.train import Epoch

SERVER_GRACE = 3.0  # seconds to deliver the rest once training has ended: a server may hang
LOCAL_GRACE = 15.0  # seconds: nothing to hang, but MLflow's import and first database take 7


class LiveRun:
    """Training's end of the pipe to the child: writing never blocks and never raises."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        assert child.stdin is not None
        self._child = child
        self._pipe = child.stdin.fileno()
        self._unsent = b""
        os.set_blocking(self._pipe, False)

    def log_epoch(self, epoch: "Epoch") -> None:
        """Hand over one row of the learning curve."""
        self._send({**asdict(epoch), "time": time.time_ns() // 1_000_000})

    def end(self, status: str, grace: float) -> bool:
        """Hand over how training ended, and end the child.

        Args:
            status: MLflow's word for it: FINISHED, FAILED or KILLED.
            grace: seconds that the child has for what is not delivered yet.

        Returns:
            Whether all of it was delivered.
        """
        assert self._child.stdin is not None
        with self._child.stdin:
            try:
                self._send({"status": status})
                deadline = time.monotonic() + grace
                while self._child.poll() is None and time.monotonic() < deadline:
                    self._flush()
                    time.sleep(0.02)
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


class Untracked:
    """Stands in for a `LiveRun` whose child could not be started."""

    def log_epoch(self, epoch: "Epoch") -> None:
        """Do nothing: the learning curve's file will hold the row."""


def _start_child(variant: str, device: str) -> "subprocess.Popen[bytes] | None":
    # -P: import the installed package, whatever lies in the working directory.
    # A session of its own: Ctrl-C is for training, which tells the child how it ended.
    try:
        return subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-W", "ignore", "-m", "mnist_batchnorm.runs", variant, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        click.echo(f"warning: MLflow will not show {variant} while it trains: {error}", err=True)
        return None


def _grace() -> float:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return LOCAL_GRACE if not uri or uri.startswith("sqlite:") else SERVER_GRACE


@contextlib.contextmanager
def live_run(variant: str, device: str) -> Iterator[LiveRun | Untracked]:
    """Show a training run in MLflow while it runs.

    The run is FINISHED when the block ends well, KILLED on Ctrl-C and FAILED on any other
    exception, which goes on to the caller. A tracker that is slow, down or broken costs the
    caller at most the grace time at the end and two lines on stderr.

    Args:
        variant: ``bn`` or ``plain``.
        device: where training runs, as PyTorch writes it: ``cpu``, ``cuda:0``.
    """
    child = _start_child(variant, device)
    if child is None:
        yield Untracked()
        return
    run = LiveRun(child)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not run.end(status, _grace()):
            click.echo(
                f"MLflow does not have all of this run; `mnist-bn track` (the last stage of "
                f"`dvc repro`) completes {variant} from the files",
                err=True,
            )
