"""Answer requests for inference without a task, and several in a turn of the event loop.

Between a connection and an ASGI application is a task that is told of a request by messages. That
takes as long as the network, and a request that says how long it is has no need to be read so.
"""

import asyncio
from collections import deque
from time import perf_counter
from traceback import format_exc
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.http.app import Answer, App, Served, crowd

if TYPE_CHECKING:
    from mnist_batchnorm.serve.http.connection import Protocol

TOGETHER = 0.001  # seconds for which answers wait for each other
LARGE = 65536  # bytes of a body whose answer waits for no other


class Direct(RequestResponseCycle):
    """A request under way that is answered when it is all here.

    To uvicorn it is one like others, but nothing of its own for ASGI is ever called.

    Args:
        served: the model that is asked.
        headers: all of them.
        head: those that matter.
        keep_alive: whether another may follow on its connection.

    Attributes:
        began: when its head was here, by `time.perf_counter`.
        parts: of its body.
        size: bytes of these.
    """

    message_event = asyncio.Event()  # for which nobody waits

    def __init__(
        self,
        served: Served,
        headers: list[tuple[bytes, bytes]],
        head: dict[bytes, bytes],
        keep_alive: bool,
    ) -> None:
        self.served = served
        self.headers = headers
        self.head = head
        self.keep_alive = keep_alive
        self.began = perf_counter()
        self.parts: list[bytes] = []
        self.size = 0
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False

    def pop_body(self) -> bytes:
        """Return the body, and forget it."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return body


class Turn:
    """Answers the requests that come in a turn of the event loop, some together.

    A client that sleeps is woken by a write, which takes the system as long as it takes us to
    answer: one by one every write does so, together only the first. And what is done over and over
    is still in the processor's caches.

    A turn that is long because many are read from gives as much time to answers as reading took.
    Of those that wait even then, only so many are kept as may wait.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting: deque[tuple[Protocol, Direct]] = deque()
        self._began = 0.0  # when a turn did in which requests wait

    def put(self, connection: "Protocol", request: Direct) -> None:
        """Have a request answered that is all here."""
        if not self._waiting:
            self._began = perf_counter()
            connection.loop.call_soon(self._end, connection.loop)
        self._waiting.append((connection, request))

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        now = perf_counter()
        deadline = now + max(TOGETHER, now - self._began)
        while self._waiting:
            self._answer()
            if perf_counter() >= deadline:
                break
        room = max(0, self._app.settings.queue - len(self._app.ready))
        while len(self._waiting) > room:
            connection, request = self._waiting.pop()
            connection.answer(request, self._app.turn_away(request, crowd()))
        if self._waiting:
            self._began = perf_counter()
            loop.call_soon(self._end, loop)

    def _answer(self) -> None:
        """Answer some, none of which waits long for the others."""
        deadline = perf_counter() + TOGETHER
        answers: list[tuple[Protocol, Direct, Answer]] = []
        while self._waiting:
            connection, request = self._waiting[0]
            if answers and (request.size > LARGE or perf_counter() >= deadline):
                break
            self._waiting.popleft()
            try:
                answers.append((connection, request, self._app.answer(request)))
            except Exception as error:  # noqa: BLE001 - a bug, that must not stop all others
                log("failed", "error", why=repr(error), traceback=format_exc())
                connection.give_up(request)
        self._app.metrics.count()  # before they go out: whoever is answered has been counted
        for connection, request, answer in answers:
            connection.answer(request, answer)
