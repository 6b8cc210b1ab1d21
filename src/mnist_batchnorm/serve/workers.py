"""Several processes that share a port."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mnist_batchnorm.serve.log import log
from mnist_batchnorm.serve.metrics import forget
from mnist_batchnorm.serve.settings import Settings

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

PAUSE = 0.1  # seconds between looks at the workers
GRACE = 2.0  # seconds beyond the workers' own deadline after which they are killed
YOUNG = 5.0  # seconds; a worker that ends sooner after its start would so again


class Workers:
    """Starts workers, and another for each that dies.

    Args:
        settings: how many, and how long they have to end.
        listener: the port that they share.
        work: what each does; gets the port, and returns when told to end.
        tend: what this process does now and then besides.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        work: Callable[[], None],
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.listener = listener
        self.work = work
        self.tend = tend
        self._context = multiprocessing.get_context("fork")  # what is imported need not be again
        self._workers: dict[BaseProcess, float] = {}
        self._ended = threading.Event()

    def run(self) -> int:
        """Work until SIGTERM or SIGINT.

        Returns:
            The exit status: that of a worker which could not start, else 0.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        for _ in range(self.settings.workers):
            self._start()
        status = 0
        while not self._ended.wait(PAUSE):
            status = self._replace_dead()
            if status:
                self._end(signal.SIGTERM, None)
            self.tend()
        self._wait()
        log("stopped", pid=os.getpid())
        return status

    def _start(self) -> None:
        worker = self._context.Process(target=self._work)
        worker.start()
        self._workers[worker] = time.monotonic()

    def _work(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.work()

    def _replace_dead(self) -> int:
        """Replace workers that died; return the status of one that could not even start."""
        for worker, since in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[worker]
            log("worker died", "error", pid=worker.pid, status=worker.exitcode)
            forget(worker.pid or 0)
            if worker.exitcode > 0 and time.monotonic() - since < YOUNG:
                return worker.exitcode
            self._start()
        return 0

    def _end(self, number: int, _: object) -> None:
        self._ended.set()
        for worker in self._workers:
            if worker.exitcode is None and worker.pid:
                os.kill(worker.pid, number)

    def _wait(self) -> None:
        self.listener.close()  # only the workers' own copies keep the port open now
        deadline = time.monotonic() + self.settings.drain_delay + self.settings.drain + GRACE
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.exitcode is None:
                log("killed", "error", pid=worker.pid, why="it did not end in time")
                worker.kill()
                worker.join()
