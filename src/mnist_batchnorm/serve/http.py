"""uvicorn with the limits that a server on a network needs, and an end that loses nothing."""

import asyncio
import contextlib
import fcntl
import signal
import struct
import termios
from collections.abc import Iterator
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mnist_batchnorm.serve.app import App
from mnist_batchnorm.serve.log import log
from mnist_batchnorm.serve.settings import Settings

TICKS = 5  # of uvicorn's, a tenth of a second each, between looks at all connections


class Refused(Exception):  # noqa: N818 - ends the parser's work, and is no error of ours
    """The head of a request is not taken."""


class Protocol(HttpToolsProtocol):
    """One connection."""

    settings: Settings
    app_of_server: App

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        self._head_since: float | None = self.loop.time()
        self._head_size = 0
        self._unsent = (0, 0.0)
        self._refusal = (400, "the request is not HTTP/1.1", "http")
        if len(self.connections) > self.settings.max_connections:
            self._refusal = (503, "the server has too many connections, try again", "connections")
            self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        self._head_size += len(data)
        super().data_received(data)
        if (
            self._head_since is not None
            and self._head_size > self.settings.max_head
            and not self.transport.is_closing()
        ):
            self._refuse_head()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        super().on_message_begin()
        self._head_since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Stop the clock, and start the work."""
        self._head_since = None
        if self._head_size > self.settings.max_head:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self.settings.max_head:
                self._refuse_head()
                raise Refused
        self._head_size = 0
        super().on_headers_complete()

    def _refuse_head(self) -> None:
        told = f"the head of the request: expected at most {self.settings.max_head} bytes"
        self._refusal = (431, told, "size")

    def send_400_response(self, msg: str) -> None:
        """Refuse what never came to the application, and hang up."""
        status, told, reason = self._refusal
        self.app_of_server.metrics.rejected(reason)
        log("rejected", status=status, reason=reason, why=told)
        body = orjson.dumps({"error": told})
        head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head += retry + b"connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def look(self, now: float) -> None:
        """Hang up on a client that sends or takes too slowly."""
        if self.transport.is_closing():
            return
        if self._head_since is not None and now - self._head_since > self.settings.head_timeout:
            if self._head_size:
                seconds = f"{self.settings.head_timeout:g} s"
                told = f"the head of the request: not all here after {seconds}"
                self._refusal = (408, told, "slow")
                self.send_400_response("")
            else:
                self.transport.close()
        size, since = self._unsent
        left = self.transport.get_write_buffer_size()
        if left == 0 or left != size:
            self._unsent = (left, now)
        elif now - since > self.settings.write_timeout:
            self.app_of_server.metrics.rejected("stalled")
            self.transport.abort()

    def shutdown(self) -> None:
        """Hang up as soon as nothing is being answered, nor waits in the socket to be read."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif not self.transport.is_closing() and unread(self.transport):
            self.loop.call_later(0.01, self.shutdown)
        else:
            self.transport.close()


def unread(transport: asyncio.Transport) -> int:
    """Return how many bytes have arrived that nobody has read (``ioctl`` FIONREAD)."""
    descriptor = transport.get_extra_info("socket").fileno()
    if descriptor < 0:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return int(count)


class Server(uvicorn.Server):
    """A server that ends in good order.

    Args:
        config: uvicorn's.
        app: the application.
        settings: how to serve.
    """

    def __init__(self, config: uvicorn.Config, app: App, settings: Settings) -> None:
        super().__init__(config)
        self.app = app
        self.settings = settings
        self.draining = False
        app.tasks = self.server_state.tasks

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain when told to end; a second signal ends it at once."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        if self.draining:
            self.should_exit = self.force_exit = True
            return
        self.draining = True
        requests = len(self.server_state.tasks)
        log("draining", signal=signal.Signals(number).name, requests=requests)
        # every answer from now on says that it is the connection's last
        self.config.encoded_headers.append((b"connection", b"close"))
        self.server_state.default_headers.append((b"connection", b"close"))
        delay = self.settings.drain_delay if number == signal.SIGTERM else 0.0
        asyncio.get_running_loop().call_later(delay, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look at the connections now and then."""
        if counter % TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.look(now)
            self.app.metrics.queue.set(len(self.server_state.tasks))
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
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.drain,  # type: ignore[arg-type]
    )
