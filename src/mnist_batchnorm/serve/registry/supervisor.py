"""The server's end of the process that fetches models from MLflow's registry."""

import contextlib
import subprocess
import time
from collections.abc import Sequence

from mnist_batchnorm.core.child import (
    MessageReader,
    describe_exit,
    encode_message,
    start_child,
    stop_child,
)
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.registry.source import RegisteredSource

CHILD = "mnist_batchnorm.serve.registry.child"
FIRST_DELAY_S, LAST_DELAY_S = 1.0, 60.0  # before a child that died is started again
SHUTDOWN_GRACE_S = 2.0


class RegistryWatcher:
    """Keeps one child process running for all sources; without sources, none.

    Args:
        sources: what it fetches.
        period: seconds between its polls of the registry; 0: it fetches once, at the start.
    """

    def __init__(self, sources: Sequence[RegisteredSource], period: float) -> None:
        self.sources = sources
        # a version number always means the same version
        self.period = period if any(source.address.alias for source in sources) else 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._delay = FIRST_DELAY_S
        self._restart_at: float | None = None

    def start(self) -> None:
        """Start the child, wait until it has fetched every source; UserError: it cannot."""
        if not self.sources:
            return
        child = self._start(first=True)
        assert child.stdout
        with child.stdout:
            answer = next(iter(MessageReader(child.stdout.fileno())), None)
        if not answer:
            raise UserError(
                f"the process that talks to MLflow {describe_exit(child.wait())} "
                "before it had fetched anything"
            )
        (problem,) = answer
        if problem:
            raise UserError(problem)
        if not self.period:
            self.stop()

    def _start(self, *, first: bool) -> "subprocess.Popen[bytes]":
        for source in self.sources:
            source.folder.mkdir(parents=True, exist_ok=True)
        request = {
            "sources": [
                (source.name, str(source.address), str(source.folder), source.allow_unverified)
                for source in self.sources
            ],
            "period": self.period,
            "starting": first,
        }
        stdout = subprocess.PIPE if first else subprocess.DEVNULL
        child = start_child(CHILD, stdin=subprocess.PIPE, stdout=stdout)
        self._child, self._started = child, time.monotonic()
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit status will show it
            child.stdin.write(encode_message(request))
        return child

    def restart_if_dead(self) -> None:
        """Start the child again if it died; to be called regularly, returns at once."""
        if not self._child:
            return
        now = time.monotonic()
        if self._restart_at is None:
            status = self._child.poll()
            if status is None:
                return
            if now - self._started > LAST_DELAY_S:
                self._delay = FIRST_DELAY_S
            log("fetcher died", "error", pid=self._child.pid, status=status, again_in=self._delay)
            self._restart_at = now + self._delay
            self._delay = min(2 * self._delay, LAST_DELAY_S)
        elif now >= self._restart_at:
            self.close_pipe()
            try:
                self._start(first=False)
                self._restart_at = None
            except OSError as error:
                log("failed", "error", doing="start the fetcher", why=str(error))
                self._restart_at = now + LAST_DELAY_S

    def close_pipe(self) -> None:
        """Close this process's end of the pipe; a worker must, as its copy outlives the server."""
        if self._child and self._child.stdin:
            self._child.stdin.close()

    def stop(self) -> None:
        if self._child:
            stop_child(self._child, SHUTDOWN_GRACE_S)
            self._child = None
