"""Ports are bound before there are workers; connections are limited to what the system allows."""

import resource
import signal
import time
from pathlib import Path

import pytest

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.process import listener as listening
from tests.support import commands
from tests.support.raw_clients import (
    CHECK,
    REQUEST,
    RIGHT,
    ask,
    ask_anew,
    connect,
    receive,
)
from tests.support.serving import (
    Server,
    until,
)


def test_connections_beyond_the_descriptors_that_the_system_allows_are_refused(
    folder: Path,
) -> None:
    limits = f"ulimit -n {listening.OTHER_DESCRIPTORS + 4}; exec mnist-bn serve --port 0"
    with commands.running(folder, "sh", "-c", limits) as command:
        server = Server(command)
        (event,) = server.events("few descriptors")
        assert event["max_connections"] == 4
        assert "ulimit -Hn" in event["why"]
        taken = [connect(server) for _ in range(4)]
        for connection in taken:
            assert CHECK(ask(connection)) == RIGHT
        for _ in range(3):
            with connect(server) as another:  # in two parts, as many clients do
                another.sendall(REQUEST[:200])
                time.sleep(0.05)
                another.sendall(REQUEST[200:])
                answer = receive(another)
                assert CHECK(answer) == "503"
                assert answer.last
                assert another.recv(1) == b""
        for connection in taken:
            assert CHECK(ask(connection)) == RIGHT
        taken.pop().close()
        until(lambda: ask_anew(server) == RIGHT)
        assert server.events("too many connections")[0]["connections"] > 4
        assert server.stop(signal.SIGINT) == 0


def test_descriptors_are_raised_to_what_connections_need() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = Settings(max_connections=1000)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        assert listening.raise_descriptor_limit(settings) is settings
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1000 + listening.OTHER_DESCRIPTORS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_below_one_connection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="100 open files are too few; raise `ulimit -n` to 266"):
        listening.raise_descriptor_limit(Settings(max_connections=10))


def test_a_port_that_cannot_be_bound_is_an_error() -> None:
    with listening.listen(Settings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port}: "):
            listening.listen(Settings(port=port))
        taken = Settings(grpc_port=port)
        with (
            pytest.raises(UserError, match=rf"cannot listen on .*, port {port} for gRPC: "),
            listening.reserve_grpc_port(taken),
        ):
            pass


def test_the_url_is_one_that_this_machine_can_reach() -> None:
    for host, url in (("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")):
        with listening.listen(Settings(host=host, port=0)) as listener:
            assert listening.url_of(listener).startswith(url)
