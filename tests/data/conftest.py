import socket
from collections.abc import Iterator

import pytest

from tests.support.file_server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:  # but not listening: refuses, and nobody else gets the port
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
