"""Answer requests for inference without a task, and several in a turn of the event loop.

Between a connection and an ASGI application is a task that is told of a request by messages. That
takes as long as the network, and a request that says how long it is has no need to be read so.
"""

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mnist_batchnorm.serve.app import App, Served

if TYPE_CHECKING:
    from mnist_batchnorm.serve.connection import Protocol

TOGETHER = 32  # requests whose answers wait for each other: 2 ms


class Direct(RequestResponseCycle):
    """A request under way that is answered when it is all here, to uvicorn one like others.

    Args:
        served: the model that is asked.
        head: the headers that matter.
        keep_alive: whether another may follow on its connection.

    Attributes:
        began: when its head was here, by `time.perf_counter`.
        parts: of its body.
        size: bytes of these.
        crowded: whether too many others waited when it was all here.
    """

    message_event = asyncio.Event()  # for which nobody waits

    def __init__(self, served: Served, head: dict[bytes, bytes], keep_alive: bool) -> None:
        self.served = served
        self.head = head
        self.keep_alive = keep_alive
        self.began = perf_counter()
        self.parts: list[bytes] = []
        self.size = 0
        self.crowded = False
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False

    def pop_body(self) -> bytes:
        """Return the body, and forget it."""
        body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return body


class Turn:
    """Has the requests that came in one turn of the event loop answered together, at its end.

    A client that sleeps is woken by a write, which takes the system as long as it takes us to
    answer: one by one every write does so, together only the first. And what is done over and over
    is still in the processor's caches.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting: list[tuple[Protocol, Direct]] = []

    def put(self, connection: "Protocol", request: Direct) -> None:
        """Have a request answered that is all here, soon."""
        if not self._waiting:
            connection.loop.call_soon(self._answer, connection.loop)
        self._waiting.append((connection, request))

    def _answer(self, loop: asyncio.AbstractEventLoop) -> None:
        now, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
        if self._waiting:
            loop.call_soon(self._answer, loop)
        answers = [self._app.answer(request) for _, request in now]
        for (connection, request), answer in zip(now, answers, strict=True):
            self._app.room.give_back(request.size)
            connection.answer(request, *answer)
        self._app.metrics.count()
