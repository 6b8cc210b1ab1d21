"""One HTTP connection: uvicorn's, with limits on size and time, and without tasks for inference."""

import asyncio
from collections.abc import Callable
from typing import ClassVar

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from mnist_batchnorm.serve.core.log import RateLimitedLog, log
from mnist_batchnorm.serve.core.protocol import unavailable
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import App
from mnist_batchnorm.serve.http.body import select_headers
from mnist_batchnorm.serve.http.fast_request import FastRequest, Response
from mnist_batchnorm.serve.http.response_batch import ResponseBatch
from mnist_batchnorm.serve.http.sockets import close_unless_unread, reset

IDLE_BEFORE_CLOSE_S = 1.0  # a client whose connection is idle for less may be about to send
LINGER_S = 2.0  # for which the rest of a rejected request is read
MAX_LINGERING = 128  # connections at once


class HeadRejected(Exception):  # noqa: N818 - stops the parser
    """The head of a request is not accepted."""


class _DiscardedFields(list[tuple[bytes, bytes]]):
    """The trailer fields after a body, which are not used and may be endless."""

    def append(self, _: object) -> None:
        pass


class HttpConnection(HttpToolsProtocol):
    """One connection.

    Attributes:
        draining: whether each answer is its connection's last.
        lingering: connections whose request was rejected unread.
        on_connection: called when there is a new one.
    """

    settings: ClassVar[Settings]
    http_app: ClassVar[App]
    draining: ClassVar[bool] = False
    lingering: ClassVar[set["HttpConnection"]]
    batch: ClassVar[ResponseBatch]
    on_connection: ClassVar[Callable[..., None]]
    connection_limit_log: ClassVar[RateLimitedLog] = RateLimitedLog("too many connections")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.on_connection()
        self._head_since: float | None = self.loop.time()
        self._body_since = 0.0
        self._size = 0  # bytes of the current head, or since a body last grew
        self._message_begun = False  # before the bytes being parsed
        self._unsent = (0, 0.0)
        self._declining_upgrade = False
        self._rejected = False
        self._idle_since = 0.0
        self._announced_last: object = None  # the request whose answer has `connection: close`
        self._rejection = (400, "the request is not HTTP/1.1", "http")
        if len(self.connections) > self.settings.max_connections:
            self._reject(503, "the server has too many connections, try again", "connections")

    def data_received(self, data: bytes) -> None:
        if self._rejected:  # the client may not have read the answer yet
            return
        cycle, size_before = self.cycle, -1
        if self._head_since is None:
            self._message_begun = cycle.more_body
            if cycle.more_body and not cycle.response_complete:
                size_before = _body_size(cycle)
            else:
                self._size = 0
        self._size += len(data)
        self._feed(data)
        if 0 <= size_before < _body_size(cycle):
            self._size = 0
        if self._size > self.settings.max_head and not self.transport.is_closing():
            if self._head_since is not None:
                self._reject_head("the head of the request")
            elif size_before >= 0 and cycle is self.cycle and cycle.more_body:
                self._reject_head("what is in the body besides its content")

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that closed its sending side until all is answered."""
        cycle = self.cycle
        if self._rejected or cycle is None or cycle.response_complete or cycle.more_body:
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
        """Ignore the Upgrade header: return the request as plain HTTP/1.1 (RFC 9110, section 7.8).

        The parser takes the bytes after such a head for the other protocol, never for a body, but
        Java's HTTP client offers HTTP/2 in this way with its first request. `rest` are the bytes
        after the head.
        """
        if not self._declining_upgrade:
            return b""
        self._declining_upgrade = False
        line = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        return b"".join((b"%b %b HTTP/%b\r\n" % line, *fields, b"\r\n", rest))

    @property
    def _head_incomplete(self) -> bool:
        return self._head_since is not None and (self._size > 0 or self.cycle is not None)

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._head_since = self.loop.time()
        if self._message_begun:
            self._size = 0
        self._message_begun = True

    def on_headers_complete(self) -> None:
        if self._size > self.settings.max_head:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > self.settings.max_head:
                self._reject_head("the head of the request")
                raise HeadRejected
        if self.parser.should_upgrade():
            if self.parser.get_method() != b"CONNECT":
                self._declining_upgrade = True
                return
            self._reject(405, "CONNECT: this server is no proxy", "path")
            raise HeadRejected
        self._body_since, self._head_since, self._size = self.loop.time(), None, 0
        previous = self.cycle
        fast_request = self._fast_request()
        if fast_request is None:
            self._start_task()
        else:
            self.cycle = fast_request
        self.headers = _DiscardedFields()
        if self.draining:
            if previous and previous is self._announced_last and not previous.response_started:
                previous.keep_alive = True  # this request was sent after it
            self.announce_close()

    def _fast_request(self) -> FastRequest | None:
        """Return the request if it can be answered without a task."""
        served = self.http_app.targets.get(self.url)
        if served is None or self.parser.get_method() != b"POST":
            return None
        if self.busy or self.flow.write_paused or self.expect_100_continue:
            return None  # another answer must be sent first
        headers = select_headers(self.headers)
        if self.settings.origins and b"origin" in headers:
            return None  # the CORS middleware adds headers to the answer
        version = self.parser.get_http_version()
        if not self.http_app.accepts(headers, version):
            return None
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        return FastRequest(served, self.headers, headers, keep_alive)

    def _start_task(self) -> None:
        if not self.url.startswith(b"/"):
            self.url = with_path(self.url)
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers
        super().on_headers_complete()

    def send_response(self, request: FastRequest, response: Response) -> None:
        """Send a response, if the client is still connected."""
        self._release_body(request)
        if request.disconnected or self.transport.is_closing():
            return
        status, headers, content = response
        parts = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
        parts += (b"\r\n" if request.keep_alive else b"connection: close\r\n\r\n", content)
        self.transport.write(b"".join(parts))
        request.response_started = request.response_complete = True
        if not request.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def abort(self, request: FastRequest) -> None:
        """Close the connection of a request that cannot be answered because of a bug."""
        self._release_body(request)
        self.transport.abort()

    def _release_body(self, request: FastRequest) -> None:
        self.http_app.body_budget.release(request.size)
        request.size = 0
        request.parts.clear()

    def announce_close(self) -> None:
        """Make the answer to the newest request in progress the connection's last."""
        cycle = self.cycle
        if cycle is not None and cycle.keep_alive and not cycle.response_started:
            cycle.keep_alive = False
            self._announced_last = cycle

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if not isinstance(cycle, FastRequest):
            super().on_body(body)
            return
        cycle.parts.append(body)
        cycle.size += len(body)
        if not self.http_app.body_budget.acquire(len(body)):
            self._hand_over(cycle)

    def _hand_over(self, request: FastRequest) -> None:
        """Have a task reject a request that exceeds the budget: it reads the body for a while."""
        self.http_app.body_budget.release(request.size)
        self.cycle, self.headers = None, request.all_headers  # type: ignore[assignment]
        self._start_task()
        self.cycle.keep_alive = request.keep_alive  # may have changed since its head
        self.headers = _DiscardedFields()
        super().on_body(request.pop_body())

    def on_message_complete(self) -> None:
        if self._declining_upgrade:
            return
        cycle = self.cycle
        if isinstance(cycle, FastRequest):
            cycle.more_body = False
            self.batch.add(self, cycle)
            return
        super().on_message_complete()
        if not cycle.response_complete:
            self.http_app.waiting.add(self)

    def on_response_complete(self) -> None:
        last = not self.pipeline
        self.http_app.waiting.discard(self)
        self._idle_since = self.loop.time()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if not last:
                cycle, app = self.pipeline.pop()
                self._start_asgi_task(cycle, app)
                if not cycle.more_body:
                    self.http_app.waiting.add(self)
        if self._rejected and last:
            self._send_rejection()

    def _reject_head(self, what: str) -> None:
        self._reject(431, f"{what}: expected at most {self.settings.max_head} bytes", "size")

    def _reject(self, status: int, why: str, reason: str) -> None:
        self._rejection = (status, why, reason)
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Reject bytes that never reached the application, after the answers before them; close."""
        if self._rejected:
            return
        self._rejected = True
        cycle = self.cycle
        waiting = cycle is not None and not cycle.response_complete
        if waiting and cycle.more_body:  # the rejected bytes belong to its body
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
            self._send_rejection()

    def _drop_body(self) -> None:
        cycle = self.cycle
        if not isinstance(cycle, FastRequest) or not cycle.more_body:
            return
        if not cycle.disconnected and not cycle.response_complete:
            self._release_body(cycle)
            self.http_app.client_disconnected(cycle)

    def _send_rejection(self) -> None:
        if self.transport.is_closing():
            return
        status, why, reason = self._rejection
        self.http_app.metrics.rejected(reason)
        if reason == "connections":
            self.connection_limit_log.log(why=why, connections=len(self.connections))
        else:
            log("rejected", status=status, reason=reason, why=why)
        body = orjson.dumps({"error": why})
        head = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head += retry + b"connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        self._linger()

    def _linger(self) -> None:
        """Close, but read on for a while, because unread bytes would reset the connection.

        The client would then lose the answer (RFC 9112, section 9.6).
        """
        if len(self.lingering) >= MAX_LINGERING:
            self.transport.close()
            return
        self.lingering.add(self)
        self.connections.discard(self)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lingering.discard(self)
        self.http_app.waiting.discard(self)
        self._drop_body()
        super().connection_lost(exc)

    def check_timeouts(self, now: float) -> None:
        """Disconnect a client that sends or receives too slowly."""
        size, since = self._unsent
        left = self.transport.get_write_buffer_size()
        if left == 0 or left != size:
            self._unsent = (left, now)
        elif now - since > self.settings.write_timeout:
            self.http_app.metrics.rejected("stalled")
            reset(self.transport)
        if self._rejected or self.transport.is_closing():
            return
        if self._head_since is not None:
            if now - self._head_since <= self.settings.head_timeout:
                return
            if not self._head_incomplete:
                close_unless_unread(self.transport)
            else:
                self._reject_slow("the head of the request", self.settings.head_timeout)
        elif self.cycle.response_complete:
            if now - self._idle_since > self.settings.keep_alive:
                close_unless_unread(self.transport)
        elif (
            self.cycle.more_body
            and not self.cycle.response_started
            and now - self._body_since > self.settings.body_timeout
        ):
            self._reject_slow("the body", self.settings.body_timeout)

    def _reject_slow(self, what: str, seconds: float) -> None:
        self._reject(408, f"{what}: not all here after {seconds:g} s", "slow")

    @property
    def busy(self) -> bool:
        """Whether a request is being received, waiting or being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def close_if_idle(self, now: float, since: float) -> None:
        """Close if no request is in progress or, `since` the shutdown, likely to be on its way."""
        idle = now - max(since, self._head_since or since) >= IDLE_BEFORE_CLOSE_S
        if idle and not self.busy and not self._head_incomplete:
            close_unless_unread(self.transport)

    def reject_incomplete(self) -> None:
        """Reject a request that is not complete when the time to drain is over."""
        cycle = self.cycle
        if isinstance(cycle, FastRequest) and cycle.more_body and not self._rejected:
            cycle.keep_alive = False
            rejection = unavailable("the server stops")
            self.send_response(cycle, self.http_app.reject(cycle, rejection))
        elif self._head_incomplete and not self.transport.is_closing():
            self._reject(503, "the server stops", "stops")


def _body_size(request: RequestResponseCycle) -> int:
    return request.size if isinstance(request, FastRequest) else len(request.body)


def with_path(target: bytes) -> bytes:
    """Return the target, with the path / for a URL without a path (RFC 9112, section 3.2.2)."""
    url = httptools.parse_url(target)
    if url.path is not None or url.schema is None:
        return target
    return b"/" if url.query is None else b"/?" + url.query
