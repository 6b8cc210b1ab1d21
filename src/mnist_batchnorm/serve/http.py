"""uvicorn with the limits that a server on a network needs, and an end that loses nothing."""

import asyncio
import contextlib
import fcntl
import signal
import struct
import termios
from collections.abc import Iterator
from typing import Any

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mnist_batchnorm.serve.app import App
from mnist_batchnorm.serve.log import log
from mnist_batchnorm.serve.settings import Settings

TICKS = 5  # of uvicorn's, a tenth of a second each, between looks at all connections
LINGER = 2.0  # seconds for which a client that was refused may go on sending


class Refused(Exception):  # noqa: N818 - ends the parser's work, and is no error of ours
    """The head of a request is not taken."""


class _Dropped(list[tuple[bytes, bytes]]):
    """Where the fields behind a body go: nobody asks for them, and they have no end."""

    def append(self, _: object) -> None:
        pass


class Protocol(HttpToolsProtocol):
    """One connection."""

    settings: Settings
    app_of_server: App

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        self._head_since: float | None = self.loop.time()
        self._body_since = 0.0
        self._size = 0  # bytes of the head under way, or since a body last grew
        self._under_way = False  # whether a message was, before what is being read
        self._unsent = (0, 0.0)
        self._declining = False  # whether the request asks for another protocol
        self._refused = False
        self._refusal = (400, "the request is not HTTP/1.1", "http")
        if len(self.connections) > self.settings.max_connections:
            self._refusal = (503, "the server has too many connections, try again", "connections")
            self.send_400_response("")
            self.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._refused:  # the client may not have read yet that it is
            return
        cycle, held = self.cycle, -1
        if self._head_since is None:
            self._under_way = cycle.more_body
            if cycle.more_body and not cycle.response_complete:
                held = len(cycle.body)
            else:
                self._size = 0
        self._size += len(data)
        self._feed(data)
        if 0 <= held < len(cycle.body):
            self._size = 0
        if self._size > self.settings.max_head and not self.transport.is_closing():
            if self._head_since is not None:
                self._refuse_head("the head of the request")
                self.send_400_response("")
            elif held >= 0 and cycle is self.cycle and cycle.more_body:
                self._refuse_head("what is in the body besides its content")
                self.send_400_response("")

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that is done sending until all is answered."""
        cycle = self.cycle
        if self._refused or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.keep_alive = False
        return True

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._decline_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("")
                return
            else:
                return

    def _decline_upgrade(self, rest: bytes) -> bytes:
        """Return a request for another protocol as one for this (RFC 9110, section 7.8).

        The parser takes what follows such a head for the other protocol and never for a body, but
        Java's HTTP client asks so for HTTP/2 with any first request.

        Args:
            rest: what follows the head.
        """
        if not self._declining:
            return b""
        self._declining = False
        line = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        return b"".join((b"%b %b HTTP/%b\r\n" % line, *fields, b"\r\n", rest))

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._head_since = self.loop.time()
        if self._under_way:
            self._size = 0
        self._under_way = True

    def on_headers_complete(self) -> None:
        """Stop the clock, and start the work."""
        if self._size > self.settings.max_head:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self.settings.max_head:
                self._refuse_head("the head of the request")
                raise Refused
        if self.parser.should_upgrade():
            if self.parser.get_method() != b"CONNECT":
                self._declining = True
                return
            self._refusal = (405, "CONNECT: this server is no proxy", "path")
            raise Refused
        self._unset_keepalive_if_required()
        self._body_since, self._head_since, self._size = self.loop.time(), None, 0
        super().on_headers_complete()
        self.headers = _Dropped()

    def on_message_complete(self) -> None:
        """Tell the work that the body is whole."""
        if not self._declining:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the next request, or to the end."""
        last = not self.pipeline
        super().on_response_complete()
        if self._head_since is not None:  # the next head is under way, and has its own clock
            self._unset_keepalive_if_required()
        if self._refused and last:
            self._hang_up()

    def _refuse_head(self, what: str) -> None:
        told = f"{what}: expected at most {self.settings.max_head} bytes"
        self._refusal = (431, told, "size")

    def send_400_response(self, msg: str) -> None:
        """Refuse what never came to the application, and hang up: after the answers before it."""
        if self._refused:
            return
        self._refused = True
        cycle = self.cycle
        waiting = cycle is not None and not cycle.response_complete
        if waiting and cycle.more_body:  # it is this one's body that is refused
            waiting = bool(self.pipeline)
            if waiting:
                self.pipeline.popleft()
            started = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
            if started:
                self.transport.close()
                return
        if not waiting:
            self._hang_up()

    def _hang_up(self) -> None:
        """Answer, and close once the client has had the time to read it.

        A connection that is closed while bytes wait unread is reset, and the answer with it (RFC
        9112, section 9.6).
        """
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        status, told, reason = self._refusal
        self.app_of_server.metrics.rejected(reason)
        log("rejected", status=status, reason=reason, why=told)
        body = orjson.dumps({"error": told})
        head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head += retry + b"connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def look(self, now: float) -> None:
        """Hang up on a client that sends or takes too slowly."""
        size, since = self._unsent
        left = self.transport.get_write_buffer_size()
        if left == 0 or left != size:
            self._unsent = (left, now)
        elif now - since > self.settings.write_timeout:
            self.app_of_server.metrics.rejected("stalled")
            self.transport.abort()
        if self._refused or self.transport.is_closing():
            return
        if self._head_since is not None:
            if now - self._head_since <= self.settings.head_timeout:
                return
            if self.cycle is None and not self._size:
                self.transport.close()
            else:
                self._refuse_slow("the head of the request", self.settings.head_timeout)
        elif (
            self.cycle.more_body
            and not self.cycle.response_started
            and now - self._body_since > self.settings.body_timeout
        ):
            self._refuse_slow("the body", self.settings.body_timeout)

    def _refuse_slow(self, what: str, seconds: float) -> None:
        self._refusal = (408, f"{what}: not all here after {seconds:g} s", "slow")
        self.send_400_response("")

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
        requests = len(self.server_state.tasks) + self.app.calls
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
            self.app.metrics.queue.set(len(self.server_state.tasks) + self.app.calls)
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
