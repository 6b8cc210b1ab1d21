"""uvicorn with the limits that a server on a network needs, and an end that loses nothing."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from mnist_batchnorm.serve.app import WHOLE, App
from mnist_batchnorm.serve.listener import empty_backlog
from mnist_batchnorm.serve.log import Sparse, log
from mnist_batchnorm.serve.settings import Settings

TICKS = 5  # of uvicorn's, a tenth of a second each, between looks at all connections
ACCEPTS = 256  # connections that are accepted in a turn of the loop
QUIET = 1.0  # seconds; a client whose connection is not idle for so long may just be asking again
TOGETHER = 64  # answers that wait for each other: what 5 ms are enough to compute
LINGER = 2.0  # seconds for which the rest of a refused request is read
LINGERING = 128  # connections for which that is done at once
LAST_WORDS = 0.5  # seconds for the answers of requests that the end cuts off to go out
LOOK = 0.02  # seconds between looks at the connections that are left


class Refused(Exception):  # noqa: N818 - ends the parser's work, and is no error of ours
    """The head of a request is not taken."""


class _Dropped(list[tuple[bytes, bytes]]):
    """Where the fields behind a body go: nobody asks for them, and they have no end."""

    def append(self, _: object) -> None:
        pass


class Outbox:
    """Has the answers of one turn of the event loop written together, at its end.

    A client that sleeps is woken by a write, which takes the system as long as it takes us to
    answer: one by one every write does so, together only the first.
    """

    def __init__(self) -> None:
        self._waiting: list[Protocol] = []

    def put(self, connection: "Protocol") -> None:
        """Have a connection's answer written, soon."""
        if not self._waiting:
            connection.loop.call_soon(self._flush)
        self._waiting.append(connection)
        if len(self._waiting) >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.write_out()


class Protocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        settings: how to serve.
        app_of_server: the application.
        draining: whether each answer is its connection's last.
        lingering: connections whose request was refused unread.
        outbox: where answers wait for each other.
        on_connection: called when there is a new one.
        full: tells of connections that are too many.
    """

    settings: ClassVar[Settings]
    app_of_server: ClassVar[App]
    draining: ClassVar[bool] = False
    lingering: ClassVar[set["Protocol"]]
    outbox: ClassVar["Outbox"]
    on_connection: ClassVar[Callable[..., None]]
    full: ClassVar[Sparse] = Sparse("too many connections")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        self.on_connection()
        self._head_since: float | None = self.loop.time()
        self._body_since = 0.0
        self._size = 0  # bytes of the head under way, or since a body last grew
        self._under_way = False  # whether a message was, before what is being read
        self._unsent = (0, 0.0)
        self._declining = False  # whether the request asks for another protocol
        self._refused = False
        # an answer that waits for those to others
        self._unwritten: tuple[RequestResponseCycle, bytes] | None = None
        self._told_last: object = None  # the request whose answer says that it is the last
        self._refusal = (400, "the request is not HTTP/1.1", "http")
        if len(self.connections) > self.settings.max_connections:
            self._refusal = (503, "the server has too many connections, try again", "connections")
            self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._refused:  # the client may not have read yet that it is
            return
        self.write_out()
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
        self.write_out()
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

    @property
    def _asking(self) -> bool:
        """Whether the head of a request has begun and is not all here."""
        return self._head_since is not None and (self._size > 0 or self.cycle is not None)

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
        if not self.url.startswith(b"/"):
            self.url = with_path(self.url)
        self._unset_keepalive_if_required()
        self._body_since, self._head_since, self._size = self.loop.time(), None, 0
        before = self.cycle
        super().on_headers_complete()
        if not self.settings.origins:  # else the answer passes others that add to it
            self.scope[WHOLE] = partial(self.answer_whole, self.cycle)  # type: ignore[literal-required]
        self.headers = _Dropped()
        if self.draining:
            if before is self._told_last and before is not None and not before.response_started:
                before.keep_alive = True  # another was sent behind it
            self.make_last()

    def answer_whole(
        self,
        cycle: RequestResponseCycle,
        headers: Iterable[tuple[bytes, bytes]],
        content: bytes,
    ) -> bool:
        """Answer with status 200 in one piece, for which uvicorn makes two.

        Args:
            cycle: the request's.
            headers: of the answer, beside those of the server.
            content: all of it.

        Returns:
            Whether it is done; False: the connection takes no more now, so it must wait its turn.
        """
        if cycle.flow.write_paused or cycle.response_started:
            return False
        if cycle.disconnected:
            return True
        parts = [STATUS_LINE[200]]
        for name, value in (*cycle.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", content)
        cycle.response_started = cycle.response_complete = True
        self._unwritten = cycle, b"".join(parts)
        self.outbox.put(self)
        return True

    def write_out(self) -> None:
        """Write the answer that waits, if one does."""
        if self._unwritten is None:
            return
        (cycle, answer), self._unwritten = self._unwritten, None
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def make_last(self) -> None:
        """Let the answer to the newest request, if it is being answered, be the last."""
        cycle = self.cycle
        if cycle is not None and cycle.keep_alive and not cycle.response_started:
            cycle.keep_alive = False
            self._told_last = cycle

    def on_message_complete(self) -> None:
        """Tell the work that the body is whole."""
        if self._declining:
            return
        super().on_message_complete()
        if not self.cycle.response_complete:
            self.app_of_server.ready.add(self)

    def on_response_complete(self) -> None:
        """Go on to the next request, or to the end."""
        last = not self.pipeline
        if last:
            self.app_of_server.ready.discard(self)
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
        if reason == "connections":
            self.full.log(why=told, connections=len(self.connections))
        else:
            log("rejected", status=status, reason=reason, why=told)
        body = orjson.dumps({"error": told})
        head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head += retry + b"connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        self._linger()

    def _linger(self) -> None:
        """Hang up, but read on for a while: bytes that nobody reads would reset the connection.

        The client would then lose the answer (RFC 9112, section 9.6).
        """
        if len(self.lingering) >= LINGERING:
            self.transport.close()
            return
        self.lingering.add(self)
        self.connections.discard(self)
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self.lingering.discard(self)
        self.app_of_server.ready.discard(self)
        super().connection_lost(exc)

    def look(self, now: float) -> None:
        """Hang up on a client that sends or takes too slowly."""
        self.write_out()
        size, since = self._unsent
        left = self.transport.get_write_buffer_size()
        if left == 0 or left != size:
            self._unsent = (left, now)
        elif now - since > self.settings.write_timeout:
            self.app_of_server.metrics.rejected("stalled")
            reset(self.transport)
        if self._refused or self.transport.is_closing():
            return
        if self._head_since is not None:
            if now - self._head_since <= self.settings.head_timeout:
                return
            if not self._asking:
                close_unless_unread(self.transport)
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

    def timeout_keep_alive_handler(self) -> None:
        """Hang up on a client that has not asked anything for long."""
        close_unless_unread(self.transport)

    def hang_up_if_quiet(self, now: float, since: float) -> None:
        """Hang up where no request is being answered, being sent, or likely to be on its way.

        Args:
            now: the loop's time.
            since: when the server began to end.
        """
        self.write_out()
        answering = self.cycle is not None and not self.cycle.response_complete
        quiet = now - max(since, self._head_since or since) >= QUIET
        if quiet and not answering and not self._asking:
            close_unless_unread(self.transport)

    def cut(self) -> None:
        """Refuse a request that is not all here when time is up."""
        self.write_out()
        if self._asking and not self.transport.is_closing():
            self._refusal = (503, "the server stops", "stops")
            self.send_400_response("")


def with_path(target: bytes) -> bytes:
    """Return a request's target, with the path / where it is a URL without (RFC 9112, 3.2.2).

    Raises:
        HttpParserInvalidURLError: It is none.
    """
    url = httptools.parse_url(target)
    if url.path is not None or url.schema is None:
        return target
    return b"/" if url.query is None else b"/?" + url.query


def close_unless_unread(transport: asyncio.Transport) -> None:
    """Close a connection, unless something has arrived on it that is not read yet.

    A transport closes at the end of the loop's turn. The end of the stream is sent here and now, so
    that a request can cross it within microseconds only.
    """
    descriptor = transport.get_extra_info("socket").fileno()
    if transport.is_closing() or descriptor < 0:
        return
    with socket.socket(fileno=os.dup(descriptor)) as own:
        if unread(own):
            return
        if transport.get_write_buffer_size() == 0:
            with contextlib.suppress(OSError):  # the client was first
                own.shutdown(socket.SHUT_WR)
    transport.close()


def reset(transport: asyncio.Transport) -> None:
    """Close a connection and forget what was sent and not taken, in the system's memory too."""
    descriptor = transport.get_extra_info("socket").fileno()
    if descriptor >= 0:
        with socket.socket(fileno=os.dup(descriptor)) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def unread(connection: socket.socket) -> int:
    """Return how many bytes have arrived that nobody has read (``ioctl`` FIONREAD)."""
    (count,) = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))
    return int(count)


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
        requests = len(self.server_state.tasks) + self.app.calls
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
        tasks = list(self.server_state.tasks)
        log("cut", "warning", requests=len(tasks), connections=self._left())
        for task in tasks:
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
    )
