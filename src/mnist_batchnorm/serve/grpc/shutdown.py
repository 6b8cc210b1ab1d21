"""End gRPC calls when the server stops, without losing a request that was sent."""

import asyncio
from collections.abc import Callable
from typing import Any

from mnist_batchnorm.serve.core.protocol import unavailable

IDLE_BEFORE_END_S = 0.05  # without a request, after which a stream is ended
LINGER_S = 1.0  # after which a stream is ended although requests still arrive


class Shutdown:
    """Ends streams and rejects new calls once the server stops."""

    def __init__(self) -> None:
        self._idle_streams: set[asyncio.Timeout] = set()  # that wait for a request
        self._deadline: float | None = None  # end of reading, by the loop's time
        self._last_rejected = 0.0  # time of the last call that was rejected

    def check(self) -> None:
        """Raise RequestError if the server stops."""
        if self._deadline is not None:
            self._last_rejected = asyncio.get_running_loop().time()
            raise unavailable("the server stops")

    async def read(self, context: Any) -> Any:
        """Read a stream's next message, or its end; RequestError: the server stops."""
        now = asyncio.get_running_loop().time()
        until = None if self._deadline is None else min(now + IDLE_BEFORE_END_S, self._deadline)
        try:
            async with asyncio.timeout_at(until) as timeout:
                self._idle_streams.add(timeout)
                return await context.read()
        except TimeoutError:
            raise unavailable("the server stops") from None
        finally:
            self._idle_streams.discard(timeout)

    async def drain(self, at_once: Callable[[], bool]) -> None:
        """Reject new calls, and end each stream once the requests that it sent are answered.

        gRPC cancels calls that arrive while it shuts down, so this returns when no more arrive, or
        after `LINGER_S`.

        Args:
            at_once: whether to wait for nothing.
        """
        time = asyncio.get_running_loop().time
        self._last_rejected = time()
        self._deadline = self._last_rejected + LINGER_S
        for timeout in self._idle_streams:
            timeout.reschedule(self._last_rejected + IDLE_BEFORE_END_S)
        while time() < min(self._deadline, self._last_rejected + 2 * IDLE_BEFORE_END_S):
            if at_once():
                return
            await asyncio.sleep(IDLE_BEFORE_END_S)
