"""The server's end of the child process that fetches models from MLflow's registry."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.registry.source import RegisteredSource

FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds before a child that died is started again
GRACE = 2.0  # seconds that it has to end
SECRETS = ("MNIST_BN_TOKEN",)  # variables that are not its business


class Fetcher:
    """Keeps one child process running for all sources; without sources, none.

    Args:
        sources: what it fetches.
        period: seconds between its looks at the registry; 0: only before the server starts.
    """

    def __init__(self, sources: Sequence[RegisteredSource], period: float) -> None:
        self.sources = sources
        # what a number means does not change
        self.period = period if any(source.address.alias for source in sources) else 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._since = 0.0  # when it was started
        self._delay = FIRST_DELAY
        self._again: float | None = None  # when to start it again

    def start(self) -> None:
        """Start it, and wait until it has fetched every source.

        Raises:
            UserError: A source cannot be fetched.
        """
        if not self.sources:
            return
        child = self._start(starting=True)
        assert child.stdout
        with child.stdout:
            answer = child.stdout.readline()
        if not answer:
            raise UserError(
                f"the process that talks to MLflow ended with status {child.wait()} "
                "before it had fetched anything"
            )
        if problem := json.loads(answer):
            raise UserError(problem)
        if not self.period:
            self.stop()

    def _start(self, *, starting: bool) -> "subprocess.Popen[bytes]":
        for source in self.sources:
            source.folder.mkdir(parents=True, exist_ok=True)
        order = {
            "sources": [(one.name, str(one.address), str(one.folder)) for one in self.sources],
            "allow_unverified": any(one.allow_unverified for one in self.sources),
            "period": self.period,
            "starting": starting,
        }
        # -P: import the installed package, whatever lies in the working directory.
        # A session of its own: Ctrl-C is for the server, whose end is its end.
        child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "mnist_batchnorm.serve.registry.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if starting else subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in SECRETS},
            bufsize=0,
            start_new_session=True,
        )
        self._child, self._since = child, time.monotonic()
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit status will say
            child.stdin.write(json.dumps(order).encode() + b"\n")
        return child

    def tend(self) -> None:
        """Start the child again if it died; to be called now and then, returns at once."""
        if not self._child:
            return
        now = time.monotonic()
        if self._again is None:
            status = self._child.poll()
            if status is None:
                return
            if now - self._since > LAST_DELAY:
                self._delay = FIRST_DELAY
            log("fetcher died", "error", pid=self._child.pid, status=status, again_in=self._delay)
            self._again = now + self._delay
            self._delay = min(2 * self._delay, LAST_DELAY)
        elif now >= self._again:
            self.let_go()
            try:
                self._start(starting=False)
                self._again = None
            except OSError as error:
                log("failed", "error", doing="start the fetcher", why=str(error))
                self._again = now + LAST_DELAY

    def let_go(self) -> None:
        """Close this process's end of the pipe; a worker must, for its copy outlives the server."""
        if self._child and self._child.stdin:
            self._child.stdin.close()

    def stop(self) -> None:
        """End the child."""
        if not self._child:
            return
        self.let_go()
        try:
            self._child.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None


@contextlib.contextmanager
def fetching(sources: Sequence[RegisteredSource], period: float) -> Iterator[Fetcher]:
    """Fetch sources from MLflow's registry, and follow it while the block runs.

    Raises:
        UserError: One cannot be fetched.
    """
    fetcher = Fetcher(sources, period)
    try:
        fetcher.start()
        yield fetcher
    finally:
        fetcher.stop()
