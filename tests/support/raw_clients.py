"""Clients that write bytes to a server's socket, and the answers that two models must give."""

import socket

from tests.support import commands
from tests.support.candidates import shifted
from tests.support.hammer import Answer, checker, images, logits_of, version_of
from tests.support.hammer import request as inference
from tests.support.serving import Server, network

BATCH = images(1)
REQUEST = inference(BATCH)
OLD, NEW = network().graph(folded=False), shifted(0.5).graph(folded=False)
CHECK = checker({version_of(content): logits_of(content, BATCH) for content in (OLD, NEW)})
RIGHT = version_of(OLD)

opened: list[socket.socket] = []  # closed after each test by a fixture of conftest.py


def connect(server: Server) -> socket.socket:
    """A connection that the test's end closes at the latest."""
    opened.append(socket.create_connection(server.address, timeout=commands.PATIENCE))
    return opened[-1]


def receive(connection: socket.socket) -> Answer:
    """One answer."""
    content = b""
    while b"\r\n\r\n" not in content:
        more = connection.recv(1 << 16)
        assert more, f"the connection ended after {content!r}"
        content += more
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        more = connection.recv(1 << 16)
        assert more, f"the connection ended after {body!r}"
        body += more
    return Answer(int(first.split()[1]), headers, body)


def ask(connection: socket.socket, sent: bytes = REQUEST) -> Answer:
    connection.sendall(sent)
    return receive(connection)


def ask_anew(server: Server) -> str:
    """What comes of a request on a connection of its own."""
    with connect(server) as connection:
        return CHECK(ask(connection))


def process_of(answer: Answer) -> str:
    """Which process answered: request ids begin with a word of its own."""
    return answer.headers["x-request-id"].partition("-")[0]
