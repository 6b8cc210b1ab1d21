"""uvicorn with the limits that a server on a network needs, and an end that loses nothing."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import App
from mnist_batchnorm.serve.http.connection import Protocol
from mnist_batchnorm.serve.process.listener import empty_backlog

TICKS = 5  # of uvicorn's, a tenth of a second each, between looks at all connections
ACCEPTS = 256  # connections that are accepted in a turn of the loop
LAST_WORDS = 0.5  # seconds for the answers of requests that the end cuts off to go out
LOOK = 0.02  # seconds between looks at the connections that are left


class Server(uvicorn.Server):
    """A server that ends in good order.

    Args:
        config: uvicorn's.
        app: the application.
        settings: how to serve.
        protocol: the class of its connections.
        parent: a descriptor that ends when the process does that started this worker; None: it is
            no worker.

    Attributes:
        draining: whether it is about to end.
        status: the exit status so far.
        on_start: called as soon as it serves.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: App,
        settings: Settings,
        protocol: type[Protocol],
        parent: int | None = None,
    ) -> None:
        super().__init__(config)
        self.app = app
        self.settings = settings
        self.protocol = protocol
        self.draining = False
        self.status = 0
        self.on_start: Callable[[], None] = lambda: None
        self._parent = parent
        self._listeners: list[socket.socket] = []
        self._looking = False  # whether it is about to look who else waits to be accepted
        self._accepted: set[asyncio.Task[Any]] = set()  # connections on their way to a protocol

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections from now on."""
        await super().startup(sockets)
        self._listeners = list(sockets or [])
        self.protocol.on_connection = self._look_for_others
        self.on_start()

    def _look_for_others(self) -> None:
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._accept)

    def _accept(self) -> None:
        """Accept what else waits.

        libuv accepts one connection in a turn of the loop. Under load, when turns are long, new
        clients would wait for seconds.
        """
        self._looking = False
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for _ in range(ACCEPTS):
                try:
                    connection, _ = listener.accept()
                except OSError:  # there is no other; or too many files are open, which uvloop tells
                    break
                connection.setblocking(False)
                task = loop.create_task(loop.connect_accepted_socket(self._connect, connection))
                self._accepted.add(task)
                task.add_done_callback(self._accepted.discard)

    def _connect(self) -> asyncio.Protocol:
        return self.protocol(self.config, self.server_state, self.lifespan.state)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain when told to end; a second signal ends it at once.

        Not so a worker: the system may send a signal to all processes of a server, and its parent
        another. Parents kill workers that are to end at once.
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
                signal.signal(number, signal.SIG_IGN)  # it ends already

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
        self.draining = self.protocol.draining = True
        requests = self._requests()
        log("draining", signal=signal.Signals(number).name, requests=requests)
        for connection in self._connections():
            connection.make_last()
        delay = self.settings.drain_delay if number == signal.SIGTERM else 0.0
        asyncio.get_running_loop().call_later(delay, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self.should_exit = True

    def _connections(self) -> list[Protocol]:
        """Return those that are open and in use."""
        return [one for one in self.server_state.connections if isinstance(one, Protocol)]

    def _requests(self) -> int:
        """Return how many requests are being read, waiting or answered."""
        return sum(one.busy for one in self._connections()) + self.app.calls

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the last connections, answer what was asked, and hang up."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        for listener in sockets or []:
            if not self.force_exit:
                await empty_backlog(listener)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        deadline = loop.time() + self.settings.drain
        while (left := self._left()) and loop.time() < deadline and not self.force_exit:
            for connection in self._connections():
                connection.look(loop.time())
                connection.hang_up_if_quiet(loop.time(), began)
            await asyncio.sleep(LOOK)
        if left:
            await self._cut()

    def _left(self) -> int:
        refused = len(self.protocol.lingering)
        return len(self.server_state.connections) + refused + len(self._accepted)

    async def _cut(self) -> None:
        """Refuse what is not answered yet."""
        log("cut", "warning", requests=self._requests(), connections=self._left())
        for task in list(self.server_state.tasks):
            task.cancel()
        for connection in self._connections():
            connection.cut()
        if not self.force_exit:
            deadline = asyncio.get_running_loop().time() + LAST_WORDS
            while self._left() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(LOOK)
        for connection in [*self._connections(), *self.protocol.lingering]:
            connection.transport.abort()
        await asyncio.sleep(0)

    async def on_tick(self, counter: int) -> bool:
        """Look at the connections now and then."""
        if counter % TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in self._connections():
                connection.look(now)
            self.app.metrics.note()
            self.app.metrics.queue.set(self._requests())
            self.app.metrics.connections.set(len(self.server_state.connections))
        return await super().on_tick(counter)


def configure(app: Any, settings: Settings, protocol: type[Protocol]) -> uvicorn.Config:
    """Return uvicorn's configuration."""
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        interface="asgi3",
    )
