"""Several processes that share a port."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from mnist_batchnorm.core.exit import status_of
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.metrics import forget
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.process.listener import SETTLE
from mnist_batchnorm.serve.process.shared_state import Roll

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 3.0  # seconds beyond the workers' own deadline after which they are killed
YOUNG = 5.0  # seconds; for one that dies sooner after its start there is none at once
PAUSE = 1.0  # seconds until there is
TICK = 0.5  # seconds between looks at the time


class Workers:
    """Starts workers, and another for each that dies.

    The first must serve before there are more, so what is wrong with a model is said once. This
    process itself imports little and has one thread: ONNX Runtime has threads as soon as it is
    imported, and is not to be forked then.

    Args:
        settings: how many, and how long they have to end.
        listener: the port that they share.
        roll: of those that serve.
        work: what each does; gets a descriptor that ends when this process does, and returns an
            exit status.
        tend: what this process does now and then besides.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        roll: Roll,
        work: Callable[[int], int],
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.roll = roll
        self.work = work
        self.tend = tend
        self._context = multiprocessing.get_context("fork")
        self._workers: dict[BaseProcess, float] = {}  # -> when it was started
        self._due: list[float] = []  # when to start others
        self._served = False  # whether any worker ever has
        self._deadline: float | None = None  # of the end, once it has begun
        self._status = 0
        # the system closes the second end however this process ends
        self._life, self._own_life = os.pipe()

    def run(self) -> int:
        """Work until SIGTERM or SIGINT; a second one ends it at once.

        Returns:
            The exit status: 0; that of a worker, where none could start; 1 where one had to be
            killed; 128 and the signal where it was ended at once.
        """
        with hear(SIGNALS) as signals:
            self._start()
            while self._workers or self._deadline is None:
                wait([signals, *(worker.sentinel for worker in self._workers)], self._pause())
                for number in heard(signals):
                    self._end(number)
                self._look_at_workers()
                self._look_at_time()
                self.tend()
        log("stopped", pid=os.getpid())
        return self._status

    def _pause(self) -> float:
        if not self._served:
            return 0.02
        return max(0.0, min([TICK, *(due - time.monotonic() for due in self._due)]))

    def _start(self) -> None:
        # a signal that comes between the fork and the worker's own handlers waits
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        worker = self._context.Process(target=self._work)
        worker.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._workers[worker] = time.monotonic()

    def _work(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(self._own_life)
        sys.exit(status_of(lambda: self.work(self._life)))

    def _look_at_workers(self) -> None:
        """Start the others once the first serves; replace those that died."""
        now = time.monotonic()
        for worker, since in list(self._workers.items()):
            serves = self.roll.serves(worker.pid or 0)
            if serves and not self._served:
                self._served = True
                self._due = [now] * (self.settings.workers - 1)
            if worker.exitcode is None:
                continue
            del self._workers[worker]
            self.roll.strike(worker.pid or 0)
            forget(worker.pid or 0)
            if self._deadline is not None:
                continue
            if not self._served and worker.exitcode > 0:  # it has said why
                self._status = worker.exitcode
                self._deadline = now
                continue
            log("worker died", "error", pid=worker.pid, status=worker.exitcode)
            self._due.append(now if now - since > YOUNG else now + PAUSE)

    def _look_at_time(self) -> None:
        now = time.monotonic()
        if self._deadline is None:
            while self._due and min(self._due) <= now:
                self._due.remove(min(self._due))
                self._start()
        elif now > self._deadline and self._workers:
            self._status = self._status or 1
            self._kill("it did not end in time")

    def _end(self, number: int) -> None:
        if self._deadline is None:
            settings = self.settings
            patience = settings.drain_delay + SETTLE + settings.drain + GRACE
            self._deadline = time.monotonic() + patience
            self.listener.close()  # only the workers' own copies keep the port open now
            for worker in self._workers:
                if worker.exitcode is None and worker.pid:
                    os.kill(worker.pid, number)
        else:
            self._status = 128 + number
            self._kill("a second signal")

    def _kill(self, why: str) -> None:
        for worker in self._workers:
            if worker.exitcode is None:
                log("killed", "error", pid=worker.pid, why=why)
                worker.kill()


@contextmanager
def hear(numbers: tuple[signal.Signals, ...]) -> Iterator[socket.socket]:
    """Yield a socket in which the numbers of signals arrive, a byte each."""
    ear, mouth = socket.socketpair()
    for end in (ear, mouth):
        end.setblocking(False)
    signal.set_wakeup_fd(mouth.fileno())
    for number in numbers:
        signal.signal(number, lambda *_: None)
    try:
        yield ear
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # it ends already
        signal.set_wakeup_fd(-1)
        ear.close()
        mouth.close()


def heard(signals: socket.socket) -> bytes:
    """Return the numbers of the signals that came."""
    try:
        return signals.recv(64)
    except BlockingIOError:
        return b""
