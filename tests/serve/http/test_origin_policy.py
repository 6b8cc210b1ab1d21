"""Which hosts and origins are accepted, by the server's address, token and --cors."""

from contextlib import nullcontext

import pytest

from mnist_batchnorm.serve.core.protocol import RequestError
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.origin_policy import OriginPolicy

CORS = Settings(origins=("https://a.example",))
TOKEN = Settings(token="0123456789abcdef")
EXPOSED = Settings(host="0.0.0.0")


def enforce(settings: Settings, method: str = "POST", version: str = "1.1", **headers: str) -> None:
    fields = {"host": "localhost", **headers}
    encoded = {name.encode(): value.encode("latin-1") for name, value in fields.items() if value}
    policy = OriginPolicy(settings)
    for _ in range(2):  # also from the cache of hosts
        policy.enforce(encoded, method, version)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
    ],
)
def test_a_local_server_accepts_this_machine_as_host(host: str) -> None:
    enforce(Settings(), host=host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1:80:80",
        "10.0.0.1",
        "[::1",
        "\xff",
    ],
)
def test_a_local_server_rejects_other_hosts(host: str) -> None:
    with pytest.raises(RequestError, match="expected localhost or an address") as rejection:
        enforce(Settings(), host=host)
    assert rejection.value.status == 403
    assert str(rejection.value).startswith(f"Host: got {host}")


def test_an_empty_host_is_rejected() -> None:
    with pytest.raises(RequestError, match="Host: got , expected localhost"):
        OriginPolicy(Settings()).enforce({b"host": b""}, "GET", "1.1")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_only_http_1_0_needs_no_host(version: str) -> None:
    with nullcontext() if version == "1.0" else pytest.raises(RequestError, match="got none"):
        enforce(Settings(), host="", version=version)


def test_two_hosts_are_rejected() -> None:
    with pytest.raises(RequestError, match="Host: got a, b, expected one host"):
        enforce(TOKEN, host="a, b")


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost:3000",
        "http://localhost.evil.example",
        "null",
    ],
)
@pytest.mark.parametrize("settings", [Settings(), CORS, EXPOSED], ids=["local", "cors", "exposed"])
def test_pages_of_other_sites_may_read_only(settings: Settings, origin: str) -> None:
    enforce(settings, "GET", origin=origin)
    with pytest.raises(RequestError, match=f"Origin: got {origin}, expected this") as rejection:
        enforce(settings, "POST", origin=origin)
    assert rejection.value.status == 403


def test_an_empty_origin_is_another_site() -> None:
    with pytest.raises(RequestError, match="Origin: got , expected this"):
        OriginPolicy(Settings()).enforce({b"host": b"localhost", b"origin": b""}, "POST", "1.1")


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        (Settings(), {"origin": "http://localhost"}),
        (CORS, {"origin": "https://a.example"}),
        (CORS, {"origin": "http://localhost"}),
        (Settings(origins=("*",)), {"origin": "https://b.example"}),
        (TOKEN, {"host": "evil.example", "origin": "https://evil.example"}),
        (EXPOSED, {"host": "evil.example"}),
    ],
)
def test_what_may_send_requests(settings: Settings, headers: dict[str, str]) -> None:
    enforce(settings, "POST", **headers)
