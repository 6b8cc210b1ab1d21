"""An inference request that is answered without a task or ASGI messages."""

import asyncio
from dataclasses import dataclass, field
from time import perf_counter

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mnist_batchnorm.serve.core.service import Headers, ServedModel

Response = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body


@dataclass(eq=False)
class FastRequest(RequestResponseCycle):
    """A request that is answered as soon as its body is complete.

    uvicorn keeps it like one of its own cycles, but never calls the ASGI part.
    """

    served: ServedModel
    all_headers: list[tuple[bytes, bytes]]  # as received
    headers: Headers  # those that `body.select_headers` selects
    keep_alive: bool
    began: float = field(default_factory=perf_counter)  # the headers were complete
    parts: list[bytes] = field(default_factory=list)  # of the body, `size` bytes together
    size: int = 0
    more_body: bool = True
    disconnected: bool = False
    response_started: bool = False
    response_complete: bool = False
    message_event = asyncio.Event()  # nobody waits for it

    def pop_body(self) -> bytes:
        """Return the body and release it."""
        body = b"".join(self.parts)  # one part is not copied
        self.parts.clear()
        return body
