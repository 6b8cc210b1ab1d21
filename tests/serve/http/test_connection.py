"""Connections against clients that are wrong, slow, strange or hostile, byte for byte."""

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.parity import runtime
from tests.support import serving
from tests.support.bodies import FLOAT, MISSING, request, tensor
from tests.support.raw_http import (
    GOOD,
    INFER,
    MEGABYTE,
    TIMEOUT_S,
    Answer,
    Client,
    chunked,
    good,
    http,
    zeros,
)
from tests.support.serving import Server, network

LIMIT = 32 << 20  # bytes of a body, the server's default
SLOW = 2.0  # seconds after which `hasty` gives up
HOST = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """One server for all that is wrong: in the end it is as it was."""
    with serving.running(folder=folder) as server:
        for _ in range(2):  # the largest that is allowed, so that all is in memory that may be
            with Client(server) as client:
                assert client.ask(zeros(10_000)).status == 200
        before = server.memory()
        yield server
        assert good(server)
        assert server.memory() - before < 48 * MEGABYTE
        assert server.stop() == 0
        bugs = [e for e in server.log() if e["event"] in ("failed", "library")]
        assert not bugs


@pytest.fixture(scope="module")
def hasty(folder: Path) -> Iterator[Server]:
    """A server that waits for nobody."""
    limits = ("--head-timeout", f"{SLOW}", "--body-timeout", f"{SLOW}", "--keep-alive", f"{SLOW}")
    with serving.running(*limits, folder=folder) as server:
        yield server
        assert server.stop() == 0
        assert not [e for e in server.log() if e["event"] in ("failed", "library")]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """What the model gives for the good request."""
    return runtime.load(network().graph(folded=False)).run(FLOAT)


def eventually(server: Server) -> None:
    """Wait until a server answers good requests."""
    deadline = time.monotonic() + TIMEOUT_S
    while not good(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def well(answer: Answer, logits: np.ndarray) -> None:
    """Fail unless it answers the good request, and rightly."""
    assert answer.status == 200
    (output,) = json.loads(answer.body)["outputs"]
    np.testing.assert_array_equal(np.array(output["data"], np.float32), logits[0])


# --- heads, encodings, paths, methods -----------------------------------------------------------


@dataclass(frozen=True)
class Wrong:
    """A request, byte for byte, and how it is refused.

    Attributes:
        what: is wrong with it.
        content: what is sent.
        status: of the answer.
        says: in the error.
        last: whether the connection ends with it.
    """

    what: str
    content: bytes
    status: int
    says: str
    last: bool = False


NO_HTTP = "the request is not HTTP/1.1"
ZIPPED, DEFLATED = gzip.compress(request(), mtime=0), zlib.compress(request())


def encoded(what: str, body: bytes, encoding: str, says: str, status: int = 400) -> Wrong:
    """A request with a Content-Encoding."""
    return Wrong(what, http(body, f"Content-Encoding: {encoding}"), status, says)


def no_http(what: str, content: bytes) -> Wrong:
    """What no HTTP server takes."""
    return Wrong(what, content, 400, NO_HTTP, last=True)


def headed(what: str, *fields: str, length: bool = True) -> Wrong:
    """A good request with wrong fields in its head."""
    return no_http(what, http(request(), *fields, length=length))


def json_length(value: str) -> Wrong:
    """A wrong length of the JSON."""
    content = http(request(), f"Inference-Header-Content-Length: {value}")
    says = f"Inference-Header-Content-Length: got {value}, expected a number of bytes"
    return Wrong(f"JSON of {value!r} bytes", content, 400, says)


def by_method(method: str, path: str = INFER) -> Wrong:
    """A method that a path does not take."""
    says = f"{method} {path}: this path does not take this method"
    return Wrong(f"{method} {path}", http(request(), method=method, path=path), 405, says)


def lost(path: str, says: str = "no such path") -> Wrong:
    """A path that leads nowhere."""
    return Wrong(f"path {path[:60]}", http(request(), path=path), 404, says)


def rebound(host: str) -> Wrong:
    """A request for another site, whose name leads here."""
    content = GOOD.replace(HOST, f"Host: {host}\r\n".encode("latin-1"))
    return Wrong(f"for host {host!r}", content, 403, f"Host: got {host}, expected localhost or")


def foreign(origin: str) -> Wrong:
    """What a browser sends for a page of another site without asking first."""
    content = http(request(), "Content-Type: text/plain", f"Origin: {origin}")
    return Wrong(f"from site {origin!r}", content, 403, f"Origin: got {origin}, expected this")


WRONG = [
    encoded("gzip cut", ZIPPED[:-20], "gzip", "the body is not one whole gzip stream"),
    encoded("Brotli", b"\x0b", "br", "Content-Encoding: got br, expected gzip, deflate", 415),
    Wrong("a head of 33 kB", http(request(), f"X: {'a' * 33_000}"), 431, "the head", last=True),
    Wrong("a head of 5 MB", http(request(), f"X: {'a' * 5_000_000}"), 431, "the head", last=True),
    Wrong("a path of 5 MB", http(path=f"/{'a' * 5_000_000}"), 431, "the head", last=True),
    Wrong(
        "10,000 fields",
        http(request(), *(f"x-{i}: {i}" for i in range(10_000))),
        431,
        "the head of the request: expected at most 32768 bytes",
        last=True,
    ),
    Wrong(
        "fields behind the body without end",
        chunked(request(), end=b"0\r\n" + b"X: y\r\n" * 500_000),
        431,
        "what is in the body besides its content: expected at most 32768 bytes",
        last=True,
    ),
    Wrong(
        "a chunk's extension of 3 MB",
        chunked(b"{}", end=b"1;" + b"x" * 3_000_000),
        431,
        "what is in the body besides its content: expected at most 32768 bytes",
        last=True,
    ),
    *(
        headed(f"Content-Length {value!r}", f"Content-Length: {value}", length=False)
        for value in ("abc", "-1", "+5", "1.5", "5, 5", "0x10", "9" * 30, "", "1_0", "5 5")
    ),
    headed("two lengths", "Content-Length: 5"),
    headed("the length twice", f"Content-Length: {len(request())}"),
    headed("a length and chunks", "Transfer-Encoding: chunked"),
    headed("gzip as the transfer's encoding", "Transfer-Encoding: gzip", length=False),
    headed("chunks inside", "Transfer-Encoding: chunked, identity", length=False),
    no_http("a chunk of xyz bytes", chunked(end=b"xyz\r\n")),
    no_http("a chunk of -1 bytes", chunked(end=b"-1\r\n")),
    no_http("a chunk of 2^120 bytes", chunked(end=b"f" * 30 + b"\r\n")),
    no_http("a chunk longer than it says", chunked(end=b"1\r\nabc")),
    headed("a folded field", "X: a\r\n b"),
    headed("a NUL in a field", "X: a\0b"),
    headed("a carriage return in a field", "X: a\rb"),
    headed("a control character in a field", "X: a\x01b"),
    headed("a line without colon", "hello"),
    headed("a space before the colon", "X : a"),
    headed("a bracket in a name", "X(: a"),
    headed("a field without name", ": a"),
    no_http("lines that end with LF only", GOOD.replace(b"\r\n", b"\n")),
    json_length("-1"),
    *map(by_method, ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "M-SEARCH")),
    by_method("POST", "/v2"),
    by_method("DELETE", "/v2/models/mnist-bn"),
    by_method("POST", "/v2/health/ready"),
    Wrong("a proxy's method", http(method="CONNECT", path="a:80"), 405, "no proxy", last=True),
    no_http("a method that nobody has", http(method="BREW")),
    no_http("a method in small letters", http(method="post")),
    lost("/../../etc/passwd"),
    lost("/%2e%2e/%2e%2e/etc/passwd"),
    lost("/static/../app.py"),
    lost("/static/%2e%2e%2fapp.py"),
    lost("/static/..%5capp.py"),
    lost("/v2/models/..%2f..%2fetc/infer"),
    lost("/v2/models/mnist-bn%00/infer", r"no model 'mnist-bn\x00' here; there is mnist-bn "),
    lost("/v2/models/mnist-bn/infer%00"),
    lost("/v2/models/mnist-bn/infer/"),
    lost("/v2/models/mnist-bn/infer%20"),
    lost("/v2/models/mnist-bn/"),
    lost("/v2/models"),
    lost("//v2/models/mnist-bn/infer"),
    lost("/v2//models/mnist-bn/infer"),
    lost("/v2/models//infer"),
    lost("/V2/models/mnist-bn/infer"),
    lost("/v2/models/MNIST-BN/infer", "no model 'MNIST-BN' here"),
    lost("/v2/models/%E6%95%B0/infer", "no model '数' here"),
    lost("/v2/models/%ff%fe/infer", "no model '\ufffd\ufffd' here"),
    lost("/v2/models/%ED%A0%80/infer", "no model '\ufffd\ufffd\ufffd' here"),
    lost("/v2/models/a%0d%0aX:b/infer", r"no model 'a\r\nX:b' here"),
    lost("/v2/models/%zz/infer", "no model '%zz' here"),
    lost("/v2/models/nope/infer", "no model 'nope' here; there is mnist-bn "),
    lost("/v2/models/mnist-bn/versions/9/infer", "no model 'mnist-bn' version '9' here"),
    lost("/v2/models/mnist-bn/versions/-1/infer", "version '-1' here"),
    lost("/v2/models/mnist-bn/versions//infer"),
    lost("/v2/models/mnist-bn/versions/1%2finfer/infer"),
    lost(f"/v2/models/{'a' * 30_000}/infer", "no model 'aaaaaaaa"),
    lost("/" + "a/" * 15_000),
    lost("*"),
    rebound("evil.example"),
    foreign("https://evil.example"),
    Wrong("no host", GOOD.replace(HOST, b""), 400, "Host: got none, expected one"),
    Wrong("two hosts", GOOD.replace(HOST, HOST * 2), 400, "Host: got localhost, localhost"),
    Wrong(
        "two lengths of the JSON",
        http(request(), *["Inference-Header-Content-Length: 9"] * 2),
        400,
        "Inference-Header-Content-Length: got 9, 9",
    ),
    no_http("a path without slash", http(path="v2/models")),
    no_http("a space in a path", http(path="/v2/mod els")),
    no_http("bytes in a path", http(path="/v2/models/\xe9/infer")),
    no_http("half a URL", http(path="http://[::1")),
    no_http("no path", http(path="?")),
    no_http("HTTP/1.2", http(version="HTTP/1.2")),
    no_http("HTTP/11", http(version="HTTP/11")),
    no_http("no HTTP", http(version="FTP/1.1")),
    no_http("HTTP/2's first bytes", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)),
    no_http("TLS", bytes.fromhex("16030100c8010000c40303") + bytes(200)),
    no_http("SSH", b"SSH-2.0-OpenSSH_9.2\r\n"),
    no_http("all bytes", bytes(range(256)) * 20),
    no_http("zeros", bytes(1000)),
    no_http("an answer", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.what)
def test_a_wrong_request_is_rejected_and_the_server_goes_on(
    server: Server, case: Wrong, logits: np.ndarray
) -> None:
    with Client(server) as client:
        answer = client.ask(case.content)
        assert (answer.status, answer.last) == (case.status, case.last)
        assert case.says in answer.error
        assert ("allow" in answer.fields) == (case.status == 405 and not case.last)
        if case.last:
            client.socket.shutdown(socket.SHUT_WR)
            assert client.ended()
        else:
            well(client.ask(GOOD), logits)
    assert good(server)


ODD = {
    "names in capitals": GOOD.replace(b"Content-Length", b"CONTENT-LENGTH"),
    "no space behind the colon": GOOD.replace(b"Host: localhost", b"Host:LOCALHOST:80"),
    "another address of this machine": GOOD.replace(b"localhost", b"127.1.2.3:8000"),
    "an address of IPv6": GOOD.replace(b"localhost", b"[::1]:8000"),
    "the server's own page": http(request(), "Origin: http://localhost"),
    "a content type of something else": http(request(), "Content-Type: text/plain"),
    "an impossible content type": http(request(), "Content-Type: ;;=,\xff"),
    "1,000 fields": http(request(), *(f"x{i}: 1" for i in range(1000))),
    "empty lines first": b"\r\n\r\n" + GOOD,
    "a query": http(request(), path=f"{INFER}?a=b&c"),
    "a fragment": http(request(), path=f"{INFER}#a"),
    "a whole URL": http(request(), path=f"http://a{INFER}"),
    "a name in escapes": http(request(), path="/v2/models/mnist%2Dbn/infer"),
    "gzip": http(ZIPPED, "Content-Encoding: gzip"),
    "GZIP": http(ZIPPED, "content-encoding: GZIP"),
    "x-gzip": http(ZIPPED, "Content-Encoding: x-gzip"),
    "deflate": http(DEFLATED, "Content-Encoding: deflate"),
    "identity": http(request(), "Content-Encoding: identity"),
    "an empty encoding": http(request(), "Content-Encoding: "),
    "an encoding of the answer": http(request(), "Accept-Encoding: gzip"),
    "one chunk": chunked(request()),
    "a chunk for each byte": chunked(*(bytes([byte]) for byte in request())),
    "chunks of gzip": chunked(ZIPPED[:100], ZIPPED[100:], fields=("Content-Encoding: gzip",)),
    "a chunk's extension": chunked(end=b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(request()), request())),
    "a field behind the body": chunked(request(), end=b"0\r\nX: y\r\n\r\n"),
    "another protocol offered": http(
        request(), "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"
    ),
    "another, and chunks": chunked(request(), fields=("Connection: Upgrade", "Upgrade: h2c")),
    "a WebSocket": http(request(), "Connection: Upgrade", "Upgrade: websocket"),
    "an odd request id": http(request(), "x-request-id: a b\xff"),
    "a long request id": http(request(), f"x-request-id: {'a' * 1000}"),
    "an odd trace": http(request(), "traceparent: 00-xyz", "tracestate: \xff"),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_an_odd_request_is_answered(server: Server, content: bytes, logits: np.ndarray) -> None:
    with Client(server) as client:
        well(client.ask(content), logits)
        well(client.ask(GOOD), logits)


@pytest.mark.parametrize("target", ["http://localhost", "http://localhost:8000", "http://a?b=c"])
def test_a_url_without_a_path_is_the_page(server: Server, target: str, logits: np.ndarray) -> None:
    with Client(server) as client:
        page = client.ask(http(method="GET", path="/", length=False))
        answer = client.ask(http(method="GET", path=target, length=False))
        assert (answer.status, answer.body) == (200, page.body)
        well(client.ask(GOOD), logits)


def test_a_head_request_is_answered_without_a_body(server: Server, logits: np.ndarray) -> None:
    with Client(server) as client:
        client.send(http(method="HEAD", path="/v2", length=False))
        answer = client.answer(body=False)
        assert (answer.status, int(answer.fields["content-length"]) > 50) == (200, True)
        client.send(http(request(), method="HEAD"))
        assert client.answer(body=False).status == 405
        well(client.ask(GOOD), logits)


@pytest.mark.parametrize("fields", [(), ("Connection: keep-alive",)])
def test_http_1_0_is_answered_once(
    server: Server, fields: tuple[str, ...], logits: np.ndarray
) -> None:
    with Client(server) as client:
        answer = client.ask(http(request(), *fields, version="HTTP/1.0"))
        well(answer, logits)
        assert answer.last
        assert client.ended()


def test_http_1_0_needs_no_host(server: Server, logits: np.ndarray) -> None:
    with Client(server) as client:
        well(client.ask(http(request(), version="HTTP/1.0").replace(HOST, b"")), logits)


def test_an_upgrade_in_each_of_many_requests_at_once(server: Server, logits: np.ndarray) -> None:
    offer = http(request(), "Connection: Upgrade", "Upgrade: h2c")
    with Client(server) as client:
        client.send(offer * 30 + GOOD)
        for _ in range(31):
            well(client.answer(), logits)


# --- several requests in one packet --------------------------------------------------------------


def test_requests_in_one_packet_are_answered_in_turn(server: Server, logits: np.ndarray) -> None:
    with Client(server) as client:
        client.send(GOOD + http(b"{}") + http(path="/x") + GOOD + http(b"[]") + GOOD)
        for status in (200, 400, 404, 200, 400, 200):
            answer = client.answer()
            assert answer.status == status
            if status == 200:
                well(answer, logits)


@pytest.mark.parametrize(
    "wrong",
    [b"nonsense\r\n\r\n", chunked(end=b"xyz\r\n"), chunked(request()[:9], end=b"xyz\r\n")],
    ids=["no HTTP", "a bad chunk", "a bad chunk behind a good one"],
)
@pytest.mark.parametrize("before", [1, 3])
def test_requests_before_a_wrong_one_are_answered_first(
    server: Server, before: int, wrong: bytes, logits: np.ndarray
) -> None:
    with Client(server) as client:
        client.send(GOOD * before + wrong)
        for _ in range(before):
            well(client.answer(), logits)
        answer = client.answer()
        assert (answer.status, answer.error, answer.last) == (400, NO_HTTP, True)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.ended()


def test_a_head_that_comes_with_the_end_of_a_large_body(server: Server, logits: np.ndarray) -> None:
    large = zeros(200)
    with Client(server) as client:
        for cut in (10, len(GOOD) - 10):
            client.send(large + GOOD[:cut])
            assert client.answer().status == 200
            well(client.ask(GOOD[cut:]), logits)


def test_a_request_in_single_bytes(server: Server, logits: np.ndarray) -> None:
    with Client(server) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in GOOD[:300]:
            client.send(bytes([byte]))
        well(client.ask(GOOD[300:]), logits)


def test_a_client_that_is_done_sending_is_answered(server: Server, logits: np.ndarray) -> None:
    with Client(server) as client:
        client.send(GOOD * 3)
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(3):
            well(client.answer(), logits)
        assert client.ended()


# --- too large -----------------------------------------------------------------------------------

HUGE = bytes(100_000_000)


def test_a_huge_body_is_rejected_before_it_is_sent(server: Server) -> None:
    with Client(server) as client:
        client.send(http(HUGE, "Expect: 100-continue")[: -len(HUGE)])
        answer = client.answer()  # and no 100 first
    assert (answer.status, answer.last) == (413, True)
    assert answer.error == f"the body: got 100000000 bytes or more, expected at most {LIMIT}"


def test_a_client_that_expects_100_continue_gets_it(server: Server, logits: np.ndarray) -> None:
    body = request()
    with Client(server) as client:
        client.send(http(body, "Expect: 100-continue")[: -len(body)])
        assert client.answer().status == 100
        well(client.ask(body), logits)


@pytest.mark.parametrize("path", [INFER, "/v2/repository/index"])
@pytest.mark.parametrize("with_length", [True, False])
def test_a_client_that_sends_a_huge_body_reads_the_rejection(
    server: Server, path: str, with_length: bool
) -> None:
    before = server.memory()
    with Client(server) as client:
        if with_length:
            client.send(http(HUGE, path=path))
        else:
            client.send(http(b"", "Transfer-Encoding: chunked", path=path, length=False))
            for _ in range(100):
                client.send(b"f4240\r\n" + HUGE[:1_000_000] + b"\r\n")
            client.send(b"0\r\n\r\n")
        answer = client.answer()
        assert (answer.status, answer.last) == (413, True)
        assert f"expected at most {LIMIT}" in answer.error
        assert client.ended()
    assert server.memory() - before < 80 * MEGABYTE
    assert good(server)


def test_a_huge_body_to_nowhere_is_read_to_its_end(server: Server, logits: np.ndarray) -> None:
    before = server.memory()
    with Client(server) as client:
        assert client.ask(http(HUGE, path="/x")).status == 404
        well(client.ask(GOOD), logits)
    assert server.memory() - before < 16 * MEGABYTE


@pytest.mark.parametrize("width", [1, 5])
def test_a_huge_list_of_numbers_is_rejected_at_once(server: Server, width: int) -> None:
    """Of a wrong length: it is not turned into objects, which are many times as large."""
    number = b"0,".rjust(width + 1, b" ")
    body = request(tensor(data="HERE")).replace(
        b'"HERE"', b"[%b0]" % (number * ((LIMIT - 1000) // len(number)))
    )
    with Client(server) as client:
        answer = client.ask(http(body))
    assert answer.status == 400
    assert "expected one of 784 for shape [1, 784]" in answer.error


# --- too slow ------------------------------------------------------------------------------------


HEAD, BODY = GOOD[: -len(request())], request()
SLOWLY = {  # what is sent at once, what a byte at a time; and of what the rest is missed
    "a head": (GOOD[:9], b"", "the head of the request"),
    "a head in bytes": (GOOD[:9], HEAD[9:-2], "the head of the request"),
    "a head after an answer": (GOOD + GOOD[:9], b"", "the head of the request"),
    "a body": (HEAD, b"", "the body"),
    "a body in bytes": (HEAD, BODY[:-1], "the body"),
    "the end of a body": (GOOD[:-99], b"", "the body"),
    "the end of a body in bytes": (GOOD[:-99], GOOD[-99:-1], "the body"),
    "a chunk": (chunked(BODY, end=b""), b"", "the body"),
    "another call's body": (http(BODY, path="/v2/repository/index")[:-9], b"", "the body"),
}


def test_a_slow_client_gets_408(hasty: Server) -> None:
    """All at once, because each takes its time."""
    with ExitStack() as stack:
        clients = {what: stack.enter_context(Client(hasty)) for what in SLOWLY}
        for what, (at_once, _, _) in SLOWLY.items():
            clients[what].send(at_once)
        expecting = stack.enter_context(Client(hasty))
        expecting.send(http(BODY, "Expect: 100-continue")[: -len(BODY)])
        for place in range(round(SLOW / 0.1) + 10):
            for what, (_, slowly, _) in SLOWLY.items():
                clients[what].send(slowly[place : place + 1])
            time.sleep(0.1)
        for what, (at_once, _, missed) in SLOWLY.items():
            if at_once.startswith(GOOD):
                assert clients[what].answer().status == 200
            answer = clients[what].answer()
            assert (what, answer.status, answer.last) == (what, 408, True)
            assert answer.error == f"{missed}: not all here after {SLOW:g} s"
            clients[what].socket.shutdown(socket.SHUT_WR)
            assert clients[what].ended()
        assert [expecting.answer().status for _ in range(2)] == [100, 408]


def test_an_idle_connection_is_closed(hasty: Server) -> None:
    with ExitStack() as stack:
        silent = stack.enter_context(Client(hasty))
        clients = [stack.enter_context(Client(hasty)) for _ in range(4)]
        for client, more in zip(clients, (b"", b"\r\n", b"\r\n\r\n", b""), strict=True):
            assert client.ask(GOOD).status == 200
            client.send(more)
        unread = stack.enter_context(Client(hasty))
        assert unread.ask(http(b"x" * 99, path="/x")[:-50]).status == 404
        unread.send(b"x")
        for client in (silent, *clients, unread):
            assert client.ended()


def test_slow_clients_take_no_places_in_the_queue(folder: Path) -> None:
    slow = [GOOD[:-9], GOOD[:9], http(HUGE)[:2000], http(BODY, path="/v2/repository/index")[:-5]]
    with serving.running("--queue", "4", folder=folder) as server, ExitStack() as stack:
        for content in slow * 10:
            stack.enter_context(Client(server)).send(content)
        assert [good(server) for _ in range(20)] == [True] * 20


# --- gone ----------------------------------------------------------------------------------------


def hang_up(client: Client) -> None:
    client.close()


def reset(client: Client) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


@pytest.mark.parametrize("go", [hang_up, reset])
@pytest.mark.parametrize(
    "cut", [0, 9, 60, len(GOOD) - len(request()), 2000, len(GOOD) - 1, len(GOOD)]
)
def test_a_client_that_disconnects_leaves_nothing_behind(
    server: Server, cut: int, go: Callable[[Client], None]
) -> None:
    for _ in range(5):
        client = Client(server)
        client.send(GOOD[:cut])
        go(client)
    assert good(server)


def test_a_client_that_reads_no_answers_is_not_read_from_forever(server: Server) -> None:
    """Requests wait in the client once its answers are not taken."""
    before = server.memory()
    many = zeros(100)
    with Client(server) as client:
        client.socket.settimeout(0.5)
        with suppress(TimeoutError):
            for _ in range(500):
                client.socket.sendall(many)
        assert good(server)
        assert server.memory() - before < 48 * MEGABYTE


@pytest.mark.slow
def test_a_client_that_reads_no_answer_is_disconnected(server: Server) -> None:
    """Also where the answer is the connection's last."""
    with Client(server) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(zeros(10_000, "Connection: close"))
        deadline = time.monotonic() + 90
        while connections(server) > 1:
            assert time.monotonic() < deadline
            time.sleep(1)


def connections(server: Server) -> int:
    """How many connections a server counts, the one that asks included."""
    with Client(server) as client:
        text = client.ask(http(method="GET", path="/metrics", length=False)).body.decode()
    (line,) = (line for line in text.splitlines() if line.startswith("mnist_bn_connections "))
    return round(float(line.split()[1]))


def test_a_connection_beyond_the_limit_gets_503(folder: Path) -> None:
    with serving.running("--max-connections", "3", folder=folder) as server:
        clients = [Client(server) for _ in range(3)]
        assert [client.ask(GOOD).status for client in clients] == [200] * 3
        for _ in range(3):
            with Client(server) as one_more:
                answer = one_more.ask(GOOD)
                assert (answer.status, answer.last) == (503, True)
                assert answer.error == "the server has too many connections, try again"
                assert answer.fields["retry-after"] == "1"
                one_more.socket.shutdown(socket.SHUT_WR)
                assert one_more.ended()
        assert [client.ask(GOOD).status for client in clients] == [200] * 3
        clients.pop().close()
        eventually(server)
        for client in clients:
            client.close()


def test_a_wrong_token_with_a_huge_body_is_answered(folder: Path) -> None:
    token = {"MNIST_BN_TOKEN": "0123456789abcdef"}
    with serving.running(folder=folder, env=token) as server, Client(server) as client:
        for given in ((), ("Authorization: Bearer x",), ("Authorization: B\xe9arer \xff",)):
            answer = client.ask(http(HUGE[:40_000_000], *given))
            assert answer.status == 401
            assert "expected Bearer and this server's token" in answer.error
        right = http(request(), "Authorization: bearer 0123456789abcdef")
        assert client.ask(right).status == 200


@pytest.mark.slow
def test_a_list_longer_than_the_parser_can_count_is_rejected(folder: Path) -> None:
    with serving.running("--max-body", f"{256 * MEGABYTE}", folder=folder) as server:
        body = (
            request(tensor(data=MISSING))[:-3] + b',"data":[' + b"0," * (40 * MEGABYTE) + b"0]}]}"
        )
        with Client(server) as client:
            answer = client.ask(http(body))
        assert answer.status == 400
        assert f"got a list of {40 * MEGABYTE + 1}, expected one of 784" in answer.error


def test_ids_and_parameters_are_repeated_in_the_answer(server: Server) -> None:
    parameters: dict[str, Any] = {"a": "é\U0001f600", "b": 2**63, "c": 0.1, "d": True}
    body = request(id="数" * 5000, parameters=parameters)
    with Client(server) as client:
        answer = client.ask(http(body, "x-request-id: abc-1"))
    content = json.loads(answer.body)
    assert (content["id"], content["parameters"]) == ("数" * 5000, parameters)
    assert answer.fields["x-request-id"] == "abc-1"
