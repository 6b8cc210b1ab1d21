"""A server as processes: started on one core, asked until it answers, measured, ended."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_wire import Dialect, Float32, RefusalError, check

START_LIMIT = 60.0  # seconds until a server counts as one that does not start
STOP_LIMIT = 15.0  # seconds that it has to end by itself
KILL_LIMIT = 10.0  # seconds that it then has until the system has ended it
POLL = 0.005  # seconds between two tries to reach it
QUIET = 0.1  # seconds without work that show that a server has no request left
SETTLE_LIMIT = 60.0
TICKS = os.sysconf("SC_CLK_TCK")  # of /proc, a second
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


class StartError(Exception):
    """A server that does not start, or dies; says what it wrote last."""


@dataclass(frozen=True)
class Launch:
    """How to start a server.

    Attributes:
        command: the program with its arguments.
        environment: of its own, beside what a clean shell has.
        folder: to start it in.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path


def core_time(core: int) -> float:
    """Return the seconds that a core has worked for programs, or for another virtual machine."""
    (line,) = (
        line
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith(f"cpu{core} ")
    )
    user, nice, system, _, _, _, _, steal = map(int, line.split()[1:9])
    return (user + nice + system + steal) / TICKS


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def stat_fields(process: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` after the name, from the state (field 3) on."""
    text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    return text.rpartition(")")[2].split()


class Server:
    """A server that runs, with all its processes: those of the session that it was started as."""

    def __init__(self, launch: Launch, port: int, core: int, log: Path) -> None:
        """Start it.

        Args:
            launch: how.
            port: that it was told to listen on.
            core: that it and its children may use.
            log: file for what it writes.
        """
        self.port = port
        self.log = log
        kept = {"HOME", "LANG", "LC_ALL", "PATH", "TMPDIR"}
        clean = {name: value for name, value in os.environ.items() if name in kept}
        self._started = time.perf_counter()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(  # noqa: S603
                ["taskset", "-c", str(core), *launch.command],  # noqa: S607
                cwd=launch.folder,
                env={**clean, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def wait(self, dialect: Dialect, images: Float32, logits: Float32) -> float:
        """Wait for its first answer, and return the seconds since its start.

        Raises:
            StartError: It ends, or gives no answer in time.
            AnswerError: Its answer is wrong.
        """
        last: Exception | None = None
        while (waited := time.perf_counter() - self._started) < START_LIMIT:
            if self._process.poll() is not None:
                raise StartError(f"it ended with status {self._process.returncode}\n{self.said()}")
            try:
                check(self.port, dialect, images, logits, dialect.forms[0])
            except (RefusalError, OSError, http.client.HTTPException) as error:
                last = error
                time.sleep(POLL)
            else:
                return time.perf_counter() - self._started
        raise StartError(f"no answer in {waited:.0f} s: {last}\n{self.said()}")

    def said(self) -> str:
        """Return the end of what it wrote."""
        return self.log.read_text(errors="replace")[-3000:]

    def processes(self) -> Iterator[tuple[int, list[str]]]:
        """Yield its living processes, with the fields of their `stat_fields`."""
        for path in Path("/proc").iterdir():
            if not path.name.isdecimal():
                continue
            try:
                fields = stat_fields(int(path.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended since
            if int(fields[3]) == self._process.pid and fields[0] != "Z":  # field 6: session
                yield int(path.name), fields

    def cpu(self) -> float:
        """Return the seconds on the core so far, user and system, of it and all its children."""
        # fields 14 to 17: its own two, and those of children that have ended
        return sum(sum(map(int, fields[11:15])) for _, fields in self.processes()) / TICKS

    def memory(self) -> int:
        """Return the bytes that are resident, of all its processes."""
        return sum(int(fields[21]) for _, fields in self.processes()) * PAGE  # field 24: rss

    def settle(self) -> None:
        """Wait until it works no more: it finishes what wrk has stopped waiting for.

        Raises:
            StartError: It goes on.
        """
        end = time.perf_counter() + SETTLE_LIMIT
        before = self.cpu()
        while time.perf_counter() < end:
            time.sleep(QUIET)
            after = self.cpu()
            if after - before <= 1.5 / TICKS:  # a tick may be a timer's
                return
            before = after
        raise StartError(f"it works {SETTLE_LIMIT:.0f} s after its last request")

    def stop(self) -> None:
        """End it, by force if need be."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._wait_for_end(STOP_LIMIT)
        for process, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._wait_for_end(KILL_LIMIT)

    def _wait_for_end(self, limit: float) -> None:
        """Wait until none of its processes lives, for so many seconds at most."""
        end = time.perf_counter() + limit
        while any(self.processes()) and time.perf_counter() < end:
            time.sleep(POLL)
