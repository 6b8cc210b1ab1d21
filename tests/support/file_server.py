"""A server of a small MNIST, and the ways in which it can fail."""

import contextlib
import gzip
import hashlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from mnist_batchnorm.data.download import FILES

PIXELS = np.random.default_rng(0).integers(0, 256, size=(60, 784), dtype=np.uint8)
PIXELS[0, :256] = np.arange(256)
LABELS = np.arange(60) % 10
CONTENT = {
    "train-images": struct.pack(">4I", 0x0803, 50, 28, 28) + PIXELS[:50].tobytes(),
    "train-labels": struct.pack(">2I", 0x0801, 50) + bytes(LABELS[:50].tolist()),
    "t10k-images": struct.pack(">4I", 0x0803, 10, 28, 28) + PIXELS[50:].tobytes(),
    "t10k-labels": struct.pack(">2I", 0x0801, 10) + bytes(LABELS[50:].tolist()),
}
HASHES = {stem: hashlib.sha256(content).hexdigest() for stem, content in CONTENT.items()}
FIRST = FILES["train-images"]
GZIPPED = {stem: gzip.compress(content) for stem, content in CONTENT.items()}


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        self.server.replies.get(self.path, status(404))(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Answers each path with its reply, 404 by default, and records the paths requested."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requested: list[str] = []
        self.replies: dict[str, Reply] = {
            f"/{FILES[stem]}.gz": answer(content) for stem, content in GZIPPED.items()
        }
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client closed it, as it should
            super().handle_error(request, client_address)


Reply = Callable[[Handler], None]


def status(code: int, **headers: str) -> Reply:
    def reply(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return reply


def answer(content: bytes, length: int | None = None, **headers: str) -> Reply:
    """Send the content with ``length`` as Content-Length; -1: without the header."""
    declared = len(content) if length is None else length

    def reply(handler: Handler) -> None:
        headers_of_length = {} if declared < 0 else {"Content_Length": str(declared)}
        status(200, **headers_of_length, **headers)(handler)
        handler.wfile.write(content)

    return reply


def answer_in_turn(*replies: Reply) -> Reply:
    remaining = list(replies)

    def reply(handler: Handler) -> None:
        remaining.pop(0)(handler)

    return reply


def pause_halfway(content: bytes) -> Reply:
    def reply(handler: Handler) -> None:
        status(200, Content_Length=str(len(content)))(handler)
        handler.wfile.write(content[: len(content) // 2])
        time.sleep(0.3)
        handler.wfile.write(content[len(content) // 2 :])

    return reply


def stall(handler: Handler) -> None:
    answer(b"\x1f\x8b", length=1000)(handler)
    handler.server.stopping.wait()


def trickle(handler: Handler) -> None:
    status(200, Content_Length="1000000")(handler)
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"\x1f")


def trickle_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"x")


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def not_http(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
