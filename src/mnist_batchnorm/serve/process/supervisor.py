"""Start worker processes that share a port, and replace those that die."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from mnist_batchnorm.core.exit import status_of
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.metrics import forget
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.core.shared_state import SharedState
from mnist_batchnorm.serve.http.backlog import HANDSHAKE_S

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHUTDOWN_GRACE_S = 3.0  # beyond the workers' own deadline; then they are killed
CRASH_LOOP_S = 5.0  # a worker that dies sooner after its start is restarted after a delay
RESTART_DELAY_S = 1.0
STARTUP_POLL_S = 0.02
POLL_S = 0.5


@dataclass
class WorkerSupervisor:
    """Starts workers, and restarts those that die.

    The others start once the first serves, so that a faulty model is reported once. This process
    imports little and has one thread: ONNX Runtime starts threads when it is imported, and a
    process with threads must not fork.

    Attributes:
        settings: number of workers and their time limits.
        listener: the shared port.
        state: shared state of the processes.
        work: run in each worker with a descriptor that is closed when this process ends; returns
            the worker's exit status.
        on_tick: called at least every `POLL_S` seconds.
    """

    settings: Settings
    listener: socket.socket
    state: SharedState
    work: Callable[[int], int]
    on_tick: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self._workers: dict[BaseProcess, float] = {}  # -> start time
        self._restarts: list[float] = []  # times at which to start more
        self._served = False  # whether any worker ever has
        self._deadline: float | None = None  # of the shutdown, once it has begun
        self._status = 0
        # the system closes the second end however this process ends
        self._parent_end, self._own_end = os.pipe()

    def run(self) -> int:
        """Run the workers until SIGTERM or SIGINT; a second signal kills them.

        Returns:
            The exit status: 0; a worker's, if none could start; 1 if one had to be killed; 128 +
            the second signal.
        """
        with signal_socket(SIGNALS) as signals:
            self._start_worker()
            while self._workers or self._deadline is None:
                wait([signals, *(worker.sentinel for worker in self._workers)], self._timeout())
                for number in read_signals(signals):
                    self._on_signal(number)
                self._check_workers()
                self._check_deadlines()
                self.on_tick()
        log("stopped", pid=os.getpid())
        return self._status

    def _timeout(self) -> float:
        if not self._served:
            return STARTUP_POLL_S
        now = time.monotonic()
        return max(0.0, min([POLL_S, *(restart - now for restart in self._restarts)]))

    def _start_worker(self) -> None:
        # a signal that comes between the fork and the worker's own handlers waits
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        worker = self._context.Process(target=self._run_worker)
        worker.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._workers[worker] = time.monotonic()

    def _run_worker(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(self._own_end)
        sys.exit(status_of(lambda: self.work(self._parent_end)))

    def _check_workers(self) -> None:
        now = time.monotonic()
        for worker, started in list(self._workers.items()):
            pid = worker.pid or 0
            if not self._served and self.state.serves(pid):
                self._served = True
                self._restarts = [now] * (self.settings.workers - 1)
            if worker.exitcode is None:
                continue
            del self._workers[worker]
            self.state.remove(pid)
            forget(pid)
            if self._deadline is not None:
                continue
            if not self._served and worker.exitcode > 0:  # it has reported why
                self._status = worker.exitcode
                self._deadline = now
                continue
            log("worker died", "error", pid=pid, status=worker.exitcode)
            self._restarts.append(now if now - started > CRASH_LOOP_S else now + RESTART_DELAY_S)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._deadline is None:
            due = [restart for restart in self._restarts if restart <= now]
            for restart in due:
                self._restarts.remove(restart)
                self._start_worker()
        elif now > self._deadline and self._workers:
            self._status = self._status or 1
            self._kill("it did not end in time")

    def _on_signal(self, number: int) -> None:
        if self._deadline is not None:
            self._status = 128 + number
            self._kill("a second signal")
            return
        limits = self.settings
        self._deadline = time.monotonic() + (
            limits.drain_delay + HANDSHAKE_S + limits.drain + SHUTDOWN_GRACE_S
        )
        self.listener.close()  # only the workers' own copies keep the port open now
        for worker in self._workers:
            if worker.exitcode is None and worker.pid:
                os.kill(worker.pid, number)

    def _kill(self, why: str) -> None:
        for worker in self._workers:
            if worker.exitcode is None:
                log("killed", "error", pid=worker.pid, why=why)
                worker.kill()


@contextmanager
def signal_socket(numbers: tuple[signal.Signals, ...]) -> Iterator[socket.socket]:
    """Yield a socket that receives the number of each signal as a byte."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in numbers:
            signal.signal(number, lambda *_: None)
        try:
            yield reader
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)  # it ends already
            signal.set_wakeup_fd(-1)


def read_signals(signals: socket.socket) -> bytes:
    with suppress(BlockingIOError):
        return signals.recv(64)
    return b""
