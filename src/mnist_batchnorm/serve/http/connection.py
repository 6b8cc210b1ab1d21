"""One connection: uvicorn's, with the limits that a server on a network needs."""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from typing import ClassVar

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from mnist_batchnorm.serve.core.log import Sparse, log
from mnist_batchnorm.serve.core.protocol import busy
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import Answer, App
from mnist_batchnorm.serve.http.body import pick
from mnist_batchnorm.serve.http.direct import Direct, Turn

QUIET = 1.0  # seconds; a client whose connection is not idle for so long may just be asking again
LINGER = 2.0  # seconds for which the rest of a refused request is read
LINGERING = 128  # connections for which that is done at once


class Refused(Exception):  # noqa: N818 - ends the parser's work, and is no error of ours
    """The head of a request is not taken."""


class _Dropped(list[tuple[bytes, bytes]]):
    """Where the fields behind a body go: nobody asks for them, and they have no end."""

    def append(self, _: object) -> None:
        pass


class Protocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        settings: how to serve.
        app_of_server: the application.
        draining: whether each answer is its connection's last.
        lingering: connections whose request was refused unread.
        turn: where requests without a task wait for each other.
        on_connection: called when there is a new one.
        full: tells of connections that are too many.
    """

    settings: ClassVar[Settings]
    app_of_server: ClassVar[App]
    draining: ClassVar[bool] = False
    lingering: ClassVar[set["Protocol"]]
    turn: ClassVar[Turn]
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
        self._idle_since = 0.0
        self._told_last: object = None  # the request whose answer says that it is the last
        self._refusal = (400, "the request is not HTTP/1.1", "http")
        if len(self.connections) > self.settings.max_connections:
            self._refusal = (503, "the server has too many connections, try again", "connections")
            self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._refused:  # the client may not have read yet that it is
            return
        cycle, held = self.cycle, -1
        if self._head_since is None:
            self._under_way = cycle.more_body
            if cycle.more_body and not cycle.response_complete:
                held = _body_size(cycle)
            else:
                self._size = 0
        self._size += len(data)
        self._feed(data)
        if 0 <= held < _body_size(cycle):
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

    @property
    def _asking(self) -> bool:
        """Whether the head of a request has begun and is not all here."""
        return self._head_since is not None and (self._size > 0 or self.cycle is not None)

    def on_message_begin(self) -> None:
        """Start the clock of a request's head."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
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
        self._body_since, self._head_since, self._size = self.loop.time(), None, 0
        before = self.cycle
        direct = self._direct()
        if direct is None:
            self._start_task()
        else:
            self.cycle = direct
        self.headers = _Dropped()
        if self.draining:
            if before is self._told_last and before is not None and not before.response_started:
                before.keep_alive = True  # another was sent behind it
            self.make_last()

    def _direct(self) -> Direct | None:
        """Return the request if it can be answered without a task: else, None."""
        served = self.app_of_server.by_target.get(self.url)
        if served is None or self.parser.get_method() != b"POST":
            return None
        if self.busy or self.flow.write_paused or self.expect_100_continue:
            return None  # another answer comes before its own
        head = pick(self.headers)
        if self.settings.origins and b"origin" in head:
            return None  # an application around ours adds to the answer
        version = self.parser.get_http_version()
        if not self.app_of_server.takes(head, version):
            return None
        alive = version != "1.0" and self.parser.should_keep_alive()
        return Direct(served, self.headers, head, alive)

    def _start_task(self) -> None:
        if not self.url.startswith(b"/"):
            self.url = with_path(self.url)
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def answer(self, request: Direct, answer: Answer) -> None:
        """Answer a request, if its client is still there."""
        self._forget(request)
        if request.disconnected or self.transport.is_closing():
            return
        status, headers, content = answer
        parts = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if request.keep_alive else b"connection: close\r\n\r\n", content)
        self.transport.write(b"".join(parts))
        request.response_started = request.response_complete = True
        if not request.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def give_up(self, request: Direct) -> None:
        """Hang up on a request that cannot even be refused."""
        self._forget(request)
        self.transport.abort()

    def _forget(self, request: Direct) -> None:
        self.app_of_server.room.give_back(request.size)
        request.size = 0
        request.parts.clear()

    def make_last(self) -> None:
        """Let the answer to the newest request, if it is being answered, be the last."""
        cycle = self.cycle
        if cycle is not None and cycle.keep_alive and not cycle.response_started:
            cycle.keep_alive = False
            self._told_last = cycle

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        cycle = self.cycle
        if not isinstance(cycle, Direct):
            super().on_body(body)
            return
        cycle.parts.append(body)
        cycle.size += len(body)
        if not self.app_of_server.room.take(len(body)):
            self._hand_over(cycle)

    def _hand_over(self, request: Direct) -> None:
        """Have a task refuse a request for whose body there is no room: it reads on for a while."""
        self.app_of_server.room.give_back(request.size)
        self.cycle, self.headers = None, request.headers  # type: ignore[assignment]
        self._start_task()
        self.cycle.keep_alive = request.keep_alive  # it may have become the last
        self.headers = _Dropped()
        super().on_body(request.pop_body())

    def on_message_complete(self) -> None:
        """Tell the work that the body is whole."""
        if self._declining:
            return
        cycle = self.cycle
        if isinstance(cycle, Direct):
            cycle.more_body = False
            self.turn.put(self, cycle)
            return
        super().on_message_complete()
        if not cycle.response_complete:
            self.app_of_server.ready.add(self)

    def on_response_complete(self) -> None:
        """Go on to the next request, or to the end."""
        last = not self.pipeline
        self.app_of_server.ready.discard(self)
        self._idle_since = self.loop.time()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if not last:
                cycle, app = self.pipeline.pop()
                self._start_asgi_task(cycle, app)
                if not cycle.more_body:
                    self.app_of_server.ready.add(self)
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
            self._drop_body()
            started = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
            if started:
                self.transport.close()
                return
        if not waiting:
            self._hang_up()

    def _drop_body(self) -> None:
        """Forget what is here of a request whose body will never be."""
        cycle = self.cycle
        if not isinstance(cycle, Direct) or not cycle.more_body:
            return
        if not cycle.disconnected and not cycle.response_complete:
            self._forget(cycle)
            self.app_of_server.gone(cycle)

    def _hang_up(self) -> None:
        """Answer, and close once the client has had the time to read it.

        A connection that is closed while bytes wait unread is reset, and the answer with it (RFC
        9112, section 9.6).
        """
        if self.transport.is_closing():
            return
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
        self._drop_body()
        super().connection_lost(exc)

    def look(self, now: float) -> None:
        """Hang up on a client that sends or takes too slowly."""
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
        elif self.cycle.response_complete:
            if now - self._idle_since > self.settings.keep_alive:
                close_unless_unread(self.transport)
        elif (
            self.cycle.more_body
            and not self.cycle.response_started
            and now - self._body_since > self.settings.body_timeout
        ):
            self._refuse_slow("the body", self.settings.body_timeout)

    def _refuse_slow(self, what: str, seconds: float) -> None:
        self._refusal = (408, f"{what}: not all here after {seconds:g} s", "slow")
        self.send_400_response("")

    @property
    def busy(self) -> bool:
        """Whether a request is being read, waiting or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def hang_up_if_quiet(self, now: float, since: float) -> None:
        """Hang up where no request is being answered, being sent, or likely to be on its way.

        Args:
            now: the loop's time.
            since: when the server began to end.
        """
        quiet = now - max(since, self._head_since or since) >= QUIET
        if quiet and not self.busy and not self._asking:
            close_unless_unread(self.transport)

    def cut(self) -> None:
        """Refuse a request that is not all here when time is up."""
        cycle = self.cycle
        if isinstance(cycle, Direct) and cycle.more_body and not self._refused:
            cycle.keep_alive = False
            self.answer(cycle, self.app_of_server.turn_away(cycle, busy("the server stops")))
        elif self._asking and not self.transport.is_closing():
            self._refusal = (503, "the server stops", "stops")
            self.send_400_response("")


def _body_size(request: RequestResponseCycle) -> int:
    """Return how many bytes of a request's body are here."""
    return request.size if isinstance(request, Direct) else len(request.body)


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
