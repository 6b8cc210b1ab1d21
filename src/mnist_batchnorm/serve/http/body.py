"""Read request bodies: no larger, no slower and no more compressed than allowed."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Self

from mnist_batchnorm.serve.core.protocol import HEADER_LENGTH, RequestError, busy, refuse
from mnist_batchnorm.serve.core.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Headers = Iterable[tuple[bytes, bytes]]

WBITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # zlib's, of each content encoding
DIGITS = 18  # of a length; more is no length
FULL = "the server holds too many large requests, try again"
DISCARD_TIME = 2.0  # seconds for which a refused body is still read
NEEDED = frozenset(
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


class ClientGoneError(Exception):
    """The client has hung up before its request was whole."""


def pick(headers: Headers) -> dict[bytes, bytes]:
    """Return the headers that matter here; several of a name as a list (RFC 9110, section 5.3)."""
    picked = [field for field in headers if field[0] in NEEDED]
    head = dict(picked)
    if len(head) < len(picked):
        for name in head:
            head[name] = b", ".join(value for other, value in picked if other == name)
    return head


def length_of(head: dict[bytes, bytes], name: bytes) -> int | None:
    """Return the number of bytes that a header tells; None: it is not there.

    Raises:
        RequestError: It is no number.
    """
    value = head.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > DIGITS:
        refuse(name.decode().title(), value.decode("latin-1"), "a number of bytes", "header")
    return int(value)


class Room:
    """How many bytes of bodies are held at once, of all requests together.

    Attributes:
        limit: how many may be.
        held: how many are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> bool:
        """Hold so many more, and tell whether that is within the limit."""
        self.held += size
        return self.held <= self.limit

    def give_back(self, size: int) -> None:
        """Hold so many less."""
        self.held -= size


class Held:
    """Receives a request's body while there is room for it; gives the room back at the end.

    Args:
        room: that it takes of.
        receive: gives what comes.
    """

    def __init__(self, room: Room, receive: Receive) -> None:
        self._room = room
        self._receive = receive
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.give_back(self._size)

    async def __call__(self) -> Message:
        """Return what comes next.

        Raises:
            RequestError: There is no room for it.
        """
        message = await self._receive()
        size = len(message.get("body", b""))
        self._size += size
        if not self._room.take(size):
            raise busy(FULL, unread=True)
        return message


async def read_body(head: dict[bytes, bytes], receive: Receive, settings: Settings) -> bytes:
    """Read a request's body and undo its compression.

    Raises:
        RequestError: It is too large or not encoded as it says.
        ClientGoneError: The client has hung up, or was too slow and has been told.
    """
    limit = settings.max_body
    told = length_of(head, b"content-length")
    if told is not None and told > limit:
        raise too_large(told, limit, unread=True)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGoneError
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        body = await _read_on(body, receive, limit)
    return unpacked(head, body, settings)


def unpacked(head: dict[bytes, bytes], body: bytes, settings: Settings) -> bytes:
    """Undo a body's compression.

    Raises:
        RequestError: It is too large or not encoded as it says.
    """
    limit = settings.max_body
    if len(body) > limit:
        raise too_large(len(body), limit)
    encoding = head.get(b"content-encoding")
    return decompress(body, encoding, limit) if encoding else body


async def _read_on(first: bytes, receive: Receive, limit: int) -> bytes:
    body, more = bytearray(first), True
    while more:
        if len(body) > limit:
            raise too_large(len(body), limit, unread=True)
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def discard_body(receive: Receive, limit: int) -> None:
    """Read on for a while what is refused, so that the client comes to read the answer.

    A connection that is closed while bytes wait unread is reset, and the answer with it (RFC 9112,
    section 9.6).

    Args:
        receive: gives what comes.
        limit: bytes after which patience ends.
    """
    try:
        async with asyncio.timeout(DISCARD_TIME):
            while limit > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                limit -= len(message.get("body", b""))
    except TimeoutError:
        return


def decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Undo a content encoding, up to a size.

    Raises:
        RequestError: The encoding is unknown, or the body is not so encoded, or is larger.
    """
    encoding = encoding.strip().lower()
    if encoding == b"identity":
        return body
    told = encoding.decode("latin-1")
    if encoding not in WBITS:
        refuse("Content-Encoding", told, "gzip, deflate or none", "encoding", 415)
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {told}: {error}", reason="encoding") from None
    if len(plain) > limit:
        raise too_large(len(plain), limit)
    if not stream.eof or stream.unused_data:
        raise RequestError(f"the body is not one whole {told} stream", reason="encoding")
    return plain


def too_large(size: int, limit: int, *, unread: bool = False) -> RequestError:
    """Return what is wrong with a body of this size or more."""
    message = f"the body: got {size} bytes or more, expected at most {limit}"
    return RequestError(message, 413, "size", unread=unread)
