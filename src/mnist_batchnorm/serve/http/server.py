"""uvicorn's server with timeouts for connections, and a shutdown that loses no request."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.service import InferenceService
from mnist_batchnorm.serve.http.backlog import drain_backlog
from mnist_batchnorm.serve.http.connection import HttpConnection

CHECK_TICKS = 5  # of uvicorn, 0.1 s each, between checks of all connections
MAX_ACCEPTS = 256  # connections per turn of the event loop
LAST_ANSWERS_S = 0.5  # for sending the answers to requests that the deadline interrupts
POLL_INTERVAL_S = 0.02  # between checks of the remaining connections


class HttpServer(uvicorn.Server):
    """An HTTP server with a graceful shutdown.

    Attributes:
        draining: whether the server is shutting down.
        status: the exit status so far.
        on_start: called as soon as the server accepts connections.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: InferenceService,
        connection_class: type[HttpConnection],
        parent: int | None = None,
    ) -> None:
        super().__init__(config)
        self.service = service
        self.settings = service.settings
        self.connection_class = connection_class
        self.draining = False
        self.status = 0
        self.on_start: Callable[[], None] = lambda: None
        self._parent = parent  # a descriptor that is closed when a worker's parent ends
        self._listeners: list[socket.socket] = []
        self._accept_scheduled = False
        self._accepted: set[asyncio.Task[Any]] = set()  # connections without a protocol yet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listeners = list(sockets or [])
        self.connection_class.on_connection = self._schedule_accept
        self.on_start()

    def _schedule_accept(self) -> None:
        if not self._accept_scheduled:
            self._accept_scheduled = True
            asyncio.get_running_loop().call_soon(self._accept)

    def _accept(self) -> None:
        """Accept all waiting connections.

        libuv accepts one connection per turn of the loop. Under load, when turns are long, new
        clients would wait for seconds.
        """
        self._accept_scheduled = False
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for _ in range(MAX_ACCEPTS):
                try:
                    connection, _ = listener.accept()
                except OSError:  # none waits; or too many files are open, which uvloop reports
                    break
                connection.setblocking(False)
                task = loop.create_task(loop.connect_accepted_socket(self._connect, connection))
                self._accepted.add(task)
                task.add_done_callback(self._accepted.discard)

    def _connect(self) -> asyncio.Protocol:
        return self.connection_class(self.config, self.server_state, self.lifespan.state)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first signal; the second one ends the server at once, unless it is a worker.

        The system may signal all processes of a server, and then the parent its workers. A parent
        kills workers that must end at once.
        """
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._end, number)
        if self._parent is not None:
            loop.add_reader(self._parent, self._orphaned)
        try:
            yield
        finally:
            if self._parent is not None:
                loop.remove_reader(self._parent)
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # shutting down already

    def _orphaned(self) -> None:
        assert self._parent is not None
        asyncio.get_running_loop().remove_reader(self._parent)
        log("orphaned", "error", why="the process that started this worker has died")
        if not self.draining:
            self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self.draining:
            if self._parent is None:
                self.status = 128 + number
                self.should_exit = self.force_exit = True
            return
        self.draining = self.connection_class.draining = True
        requests = self._requests()
        log("draining", signal=signal.Signals(number).name, requests=requests)
        for connection in self._connections():
            connection.announce_close()
        delay = self.settings.drain_delay if number == signal.SIGTERM else 0.0
        asyncio.get_running_loop().call_later(delay, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self.should_exit = True

    def _connections(self) -> list[HttpConnection]:
        connections = self.server_state.connections
        return [open_ for open_ in connections if isinstance(open_, HttpConnection)]

    def _requests(self) -> int:
        return sum(open_.busy for open_ in self._connections()) + self.service.open_calls

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the last connections, answer their requests, and close."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for listener in sockets or []:
            if not self.force_exit:
                await drain_backlog(listener)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        deadline = loop.time() + self.settings.drain
        while (remaining := self._remaining()) and loop.time() < deadline and not self.force_exit:
            for connection in self._connections():
                connection.check_timeouts(loop.time())
                connection.close_if_idle(loop.time(), began)
            await asyncio.sleep(POLL_INTERVAL_S)
        if remaining:
            await self._reject_remaining()

    def _remaining(self) -> int:
        lingering = len(self.connection_class.lingering)
        return len(self.server_state.connections) + lingering + len(self._accepted)

    async def _reject_remaining(self) -> None:
        log("cut", "warning", requests=self._requests(), connections=self._remaining())
        for task in list(self.server_state.tasks):
            task.cancel()
        for connection in self._connections():
            connection.reject_incomplete()
        if not self.force_exit:
            deadline = asyncio.get_running_loop().time() + LAST_ANSWERS_S
            while self._remaining() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(POLL_INTERVAL_S)
        for connection in [*self._connections(), *self.connection_class.lingering]:
            connection.transport.abort()
        await asyncio.sleep(0)

    async def on_tick(self, counter: int) -> bool:
        if counter % CHECK_TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in self._connections():
                connection.check_timeouts(now)
            self.service.metrics.publish_last()
            self.service.metrics.queue.set(self._requests())
            self.service.metrics.connections.set(len(self.server_state.connections))
        return await super().on_tick(counter)


def configure(app: Any, connection_class: type[HttpConnection]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection_class,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        interface="asgi3",
    )
