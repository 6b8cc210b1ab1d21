"""Read and decompress request bodies within the limits of size."""

import asyncio
import contextlib
import zlib
from collections.abc import Iterable, Iterator

from starlette.types import Message, Receive

from mnist_batchnorm.serve.core.protocol import HEADER_LENGTH, RequestError, refuse, unavailable
from mnist_batchnorm.serve.core.service import Headers
from mnist_batchnorm.serve.core.settings import Settings

WBITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # zlib's wbits by content encoding
MAX_LENGTH_DIGITS = 18
DISCARD_TIMEOUT_S = 2.0  # for which the body of a rejected request is read
SELECTED = frozenset(
    (
        b"content-length",
        HEADER_LENGTH,
        b"content-encoding",
        b"authorization",
        b"host",
        b"origin",
        b"x-request-id",
        b"traceparent",
    )
)


class ClientDisconnectedError(Exception):
    """The client disconnected before its request was complete."""


def select_headers(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the headers that are used; joins repeated ones by commas (RFC 9110, section 5.3)."""
    selected = [field for field in fields if field[0] in SELECTED]
    headers = dict(selected)
    if len(headers) < len(selected):
        for name in headers:
            headers[name] = b", ".join(value for other, value in selected if other == name)
    return headers


def parse_length(headers: Headers, name: bytes) -> int | None:
    """Return the number of bytes in a header, if it is there; RequestError: not a number."""
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
        refuse(name.decode().title(), value.decode("latin-1"), "a number of bytes", "header")
    return int(value)


class ByteBudget:
    """Limit on the bytes of all request bodies held at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def acquire(self, size: int) -> bool:
        """Reserve `size` bytes; return whether the total is within the limit."""
        self.used += size
        return self.used <= self.limit

    def release(self, size: int) -> None:
        self.used -= size

    @contextlib.contextmanager
    def limiting(self, receive: Receive) -> Iterator[Receive]:
        """Return ASGI's receive within the budget; releases the bytes at the end of the block."""
        total = 0

        async def receive_within_budget() -> Message:
            nonlocal total
            message = await receive()
            size = len(message.get("body", b""))
            total += size
            if not self.acquire(size):
                why = "the server holds too many large requests, try again"
                raise unavailable(why, unread=True)
            return message

        try:
            yield receive_within_budget
        finally:
            self.release(total)


async def read_body(headers: Headers, receive: Receive, settings: Settings) -> bytes:
    """Receive and decompress a request's body.

    Raises:
        RequestError: The body is too large, or not encoded as its header claims.
        ClientDisconnectedError: The client disconnected, or was too slow and has been answered.
    """
    limit = settings.max_body
    length = parse_length(headers, b"content-length")
    if length is not None and length > limit:
        raise too_large(length, limit, unread=True)
    body, more = await _receive_part(receive)
    if more:  # a body in one part is not copied
        buffer = bytearray(body)
        while more:
            if len(buffer) > limit:
                raise too_large(len(buffer), limit, unread=True)
            part, more = await _receive_part(receive)
            buffer += part
        body = bytes(buffer)
    return decompress_body(headers, body, settings)


async def _receive_part(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] != "http.request":
        raise ClientDisconnectedError
    return message.get("body", b""), message.get("more_body", False)


def decompress_body(headers: Headers, body: bytes, settings: Settings) -> bytes:
    """Return the body without its content encoding; raises RequestError as `read_body`."""
    limit = settings.max_body
    if len(body) > limit:
        raise too_large(len(body), limit)
    encoding = headers.get(b"content-encoding")
    if not encoding:
        return body
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return body
    name = encoding.decode("latin-1")
    if encoding not in WBITS:
        refuse("Content-Encoding", name, "gzip, deflate or none", "encoding", 415)
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {name}: {error}", reason="encoding") from None
    if len(plain) > limit:
        raise too_large(len(plain), limit)
    if not stream.eof or stream.unused_data:
        raise RequestError(f"the body is not one whole {name} stream", reason="encoding")
    return plain


async def discard_body(receive: Receive, limit: int) -> None:
    """Receive up to `limit` bytes of a rejected request, so that the client reads the answer.

    Closing a connection with unread bytes resets it and discards the answer (RFC 9112, section
    9.6).
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while limit > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                limit -= len(message.get("body", b""))


def too_large(size: int, limit: int, *, unread: bool = False) -> RequestError:
    """Return the error of a body of `size` bytes or more."""
    message = f"the body: got {size} bytes or more, expected at most {limit}"
    return RequestError(message, 413, "size", unread=unread)
