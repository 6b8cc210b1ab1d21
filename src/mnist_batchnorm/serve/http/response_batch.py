"""Answer several inference requests in one turn of the event loop."""

import asyncio
from collections import deque
from time import perf_counter
from traceback import format_exc
from typing import Protocol

from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.protocol import queue_full
from mnist_batchnorm.serve.http.app import App
from mnist_batchnorm.serve.http.fast_request import FastRequest, Response

BATCH_WINDOW_S = 0.001  # time for which computed answers wait for others
LARGE_BODY_BYTES = 1 << 16  # the answer to a larger body does not wait


class Connection(Protocol):
    """The connection of a request, see `connection.HttpConnection`."""

    loop: asyncio.AbstractEventLoop

    def send_response(self, request: FastRequest, response: Response) -> None: ...

    def abort(self, request: FastRequest) -> None: ...


class ResponseBatch:
    """Answers the requests that were read in one turn of the event loop, several together.

    Writing wakes a client that sleeps, which takes the system as long as computing the answer: if
    the answers are written one by one every write does so, together only the first. And repeated
    work finds the processor's caches filled.

    A turn that took long to read many requests gives as much time to answers as reading took. Of
    the requests that wait even then, the queue limit decides how many are kept.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting: deque[tuple[Connection, FastRequest]] = deque()
        self._turn_began = 0.0  # of the turn that added the first waiting request

    def add(self, connection: Connection, request: FastRequest) -> None:
        """Have a request answered whose body is complete."""
        if not self._waiting:
            self._turn_began = perf_counter()
            connection.loop.call_soon(self._end_turn, connection.loop)
        self._waiting.append((connection, request))

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        now = perf_counter()
        deadline = now + max(BATCH_WINDOW_S, now - self._turn_began)
        while self._waiting:
            self._answer_batch()
            if perf_counter() >= deadline:
                break
        places = max(0, self._app.settings.queue - len(self._app.waiting))
        while len(self._waiting) > places:
            connection, request = self._waiting.pop()
            connection.send_response(request, self._app.reject(request, queue_full()))
        if self._waiting:
            self._turn_began = perf_counter()
            loop.call_soon(self._end_turn, loop)

    def _answer_batch(self) -> None:
        deadline = perf_counter() + BATCH_WINDOW_S
        responses: list[tuple[Connection, FastRequest, Response]] = []
        while self._waiting:
            connection, request = self._waiting[0]
            if responses and (request.size > LARGE_BODY_BYTES or perf_counter() >= deadline):
                break
            self._waiting.popleft()
            try:
                responses.append((connection, request, self._app.handle(request)))
            except Exception as error:  # noqa: BLE001 - a bug, which must not stop the others
                log("failed", "error", why=repr(error), traceback=format_exc())
                connection.abort(request)
        self._app.metrics.flush()  # before sending: a client that was answered has been counted
        for connection, request, response in responses:
            connection.send_response(request, response)
