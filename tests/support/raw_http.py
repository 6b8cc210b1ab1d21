"""Write bytes to an HTTP server and read its answers, byte for byte."""

import json
import socket
from contextlib import suppress
from dataclasses import dataclass

from tests.support.bodies import PIXELS, bytes_tensor, request
from tests.support.serving import Server

INFER = "/v2/models/mnist-bn/infer"
TIMEOUT_S = 60.0  # the machine may be busy
MEGABYTE = 1 << 20


def http(
    body: bytes = b"",
    *fields: str,
    method: str = "POST",
    path: str = INFER,
    version: str = "HTTP/1.1",
    length: bool = True,
) -> bytes:
    """A request, byte for byte; with the body's length unless told not."""
    lines = [f"{method} {path} {version}", "Host: localhost", *fields]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", fields: tuple[str, ...] = ()) -> bytes:
    """A request whose body comes in chunks."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return http(body + end, "Transfer-Encoding: chunked", *fields, length=False)


GOOD = http(request())


def zeros(rows: int, *fields: str) -> bytes:
    """A request of many images, as pixels."""
    body = request(bytes_tensor(shape=[rows, PIXELS], data="HERE"))
    return http(body.replace(b'"HERE"', b"[%b0]" % (b"0," * (rows * PIXELS - 1))), *fields)


@dataclass
class Answer:
    """An answer; the names of its fields are in lower case."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def last(self) -> bool:
        """Whether it announces that the connection closes."""
        return self.fields.get("connection") == "close"

    @property
    def error(self) -> str:
        """The error message; fails if the answer contains anything else."""
        assert self.fields["content-type"] == "application/json"
        content = json.loads(self.body)
        assert list(content) == ["error"]
        text: str = content["error"]
        return text


class Client:
    """A connection."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(server.address, timeout=TIMEOUT_S)
        self._stream = self.socket.makefile("rb")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._stream.close()
        self.socket.close()

    def send(self, content: bytes) -> None:
        """Send bytes, as far as the server reads them."""
        with suppress(ConnectionError):  # the server may have answered and closed
            self.socket.sendall(content)

    def answer(self, *, body: bool = True) -> Answer:
        """Read the next answer; fails if there is none."""
        line = self._stream.readline()
        assert line, "the server closed without an answer"
        version, status, _ = line.decode("ascii").split(" ", 2)
        assert version == "HTTP/1.1"
        fields = {}
        while (line := self._stream.readline()) != b"\r\n":
            name, _, value = line.decode("ascii").partition(": ")
            assert name not in fields
            fields[name.lower()] = value.removesuffix("\r\n")
        size = int(fields.get("content-length", 0)) if body else 0
        return Answer(int(status), fields, self._stream.read(size))

    def ask(self, content: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(content)
        return self.answer()

    def ended(self) -> bool:
        """Wait until the server closes; fails if it sends anything before, or resets."""
        return self._stream.read(1) == b""


def good(server: Server) -> bool:
    """Whether a server answers a good request on a new connection."""
    with Client(server) as client:
        return client.ask(GOOD).status == 200
