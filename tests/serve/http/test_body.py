"""Request bodies: framing, compression, and the limit on all of them together."""

import contextlib
import gzip
import json
import select
import socket
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import requests

from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.protocol import RequestError
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.body import decompress_body, parse_length
from tests.support.bodies import ACCEPTED, REJECTED, Accepted, Rejected
from tests.support.raw_http import GOOD, INFER, MEGABYTE, Client, chunked, http
from tests.support.serving import Server, counted, network, running, until

LIMIT = 4 * MEGABYTE
PLAIN = b'{"inputs": []}'
ZIPPED, DEFLATED = gzip.compress(PLAIN, mtime=0), zlib.compress(PLAIN)


def decompress(body: bytes, encoding: str) -> bytes:
    headers = {b"content-encoding": encoding.encode("latin-1")} if encoding else {}
    return decompress_body(headers, body, Settings(max_body=MEGABYTE))


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (PLAIN, ""),
        (PLAIN, "identity"),
        (ZIPPED, "gzip"),
        (ZIPPED, " GZIP "),
        (ZIPPED, "x-gzip"),
        (DEFLATED, "deflate"),
    ],
)
def test_a_known_encoding_is_decompressed(body: bytes, encoding: str) -> None:
    assert decompress(body, encoding) == PLAIN


def raw_deflate() -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(PLAIN) + stream.flush()


@pytest.mark.parametrize(
    ("body", "encoding", "message", "status"),
    [
        (ZIPPED[:-9], "gzip", "the body is not one whole gzip stream", 400),
        (ZIPPED[:-1], "gzip", "the body is not one whole gzip stream", 400),
        (ZIPPED + b"x", "gzip", "the body is not one whole gzip stream", 400),
        (ZIPPED * 2, "gzip", "the body is not one whole gzip stream", 400),
        (b"", "gzip", "the body is not one whole gzip stream", 400),
        (ZIPPED[:-8] + bytes(4) + ZIPPED[-4:], "gzip", "incorrect data check", 400),
        (PLAIN, "gzip", "the body is not gzip: ", 400),
        (DEFLATED[:-9], "deflate", "the body is not one whole deflate stream", 400),
        (raw_deflate(), "deflate", "the body is not deflate: ", 400),
        (ZIPPED, "deflate", "the body is not deflate: ", 400),
        (ZIPPED, "gzip, gzip", "Content-Encoding: got gzip, gzip", 415),
        (b"\x0b", "br", "Content-Encoding: got br, expected gzip, deflate or none", 415),
        (b"(", "zstd", "Content-Encoding: got zstd", 415),
        (b"x", "g\xefp", "Content-Encoding: got gïp", 415),
        (
            gzip.compress(bytes(2 * MEGABYTE), 1, mtime=0),
            "gzip",
            "got 1048577 bytes or more, expected",
            413,
        ),
        (bytes(MEGABYTE + 1), "", "got 1048577 bytes or more, expected at most 1048576", 413),
    ],
)
def test_a_wrong_encoding_is_rejected(
    body: bytes, encoding: str, message: str, status: int
) -> None:
    with pytest.raises(RequestError) as rejection:
        decompress(body, encoding)
    assert message in str(rejection.value)
    assert rejection.value.status == status


@pytest.mark.parametrize("value", ["-1", "abc", "1.5", "", "²", "9" * 20, "0x10", "+5", "9, 9"])
def test_a_length_is_a_number_of_bytes(value: str) -> None:
    headers = {b"content-length": value.encode("latin-1")}
    with pytest.raises(RequestError, match=r"Content-Length: got .*, expected a number"):
        parse_length(headers, b"content-length")


def test_a_length_may_be_missing() -> None:
    assert parse_length({b"content-length": b"12"}, b"content-length") == 12
    assert parse_length({}, b"content-length") is None


# --- framing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server that holds one body of the largest size."""
    limits = ("--max-body", f"{LIMIT}", "--max-bodies", f"{LIMIT}")
    with running(*limits, folder=folder) as server:
        yield server
        assert not [event for event in server.log() if event["event"] in ("failed", "library")]


def fields_of(case: Rejected | Accepted) -> tuple[str, ...]:
    length = case.json_length
    return () if length is None else (f"Inference-Header-Content-Length: {length}",)


def with_length(case: Rejected | Accepted) -> bytes:
    return http(case.body, *fields_of(case))


def in_chunks(case: Rejected | Accepted) -> bytes:
    chunks = filter(None, (case.body[:9], case.body[9:]))
    return chunked(*chunks, fields=fields_of(case))


SAMPLE = 12  # every so many cases of a table: all of them are tests of the decoder
framings = pytest.mark.parametrize("framed", [with_length, in_chunks])


@framings
def test_invalid_bodies_are_rejected_and_the_connection_stays_open(
    server: Server, framed: Callable[[Rejected | Accepted], bytes]
) -> None:
    with Client(server) as client:
        for case in REJECTED[::SAMPLE]:
            answer = client.ask(framed(case))
            assert (case.what, answer.status) == (case.what, case.status)
            assert case.says in answer.error
            assert not answer.last
            assert client.ask(GOOD).status == 200


@framings
def test_odd_bodies_are_answered(
    server: Server, framed: Callable[[Rejected | Accepted], bytes]
) -> None:
    session = runtime.load(network().graph(folded=False))
    with Client(server) as client:
        for case in ACCEPTED[::SAMPLE]:
            answer = client.ask(framed(case))
            assert (case.what, answer.status) == (case.what, 200)
            (output,) = json.loads(answer.body)["outputs"]
            expected = session.run(case.images)
            assert output["shape"] == list(expected.shape)
            np.testing.assert_array_equal(np.array(output["data"], np.float32), expected.ravel())


# --- the limit on all bodies together -----------------------------------------------------------

HEAD = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n".encode()
NOT_JSON = b"HTTP/1.1 400"  # the answer to a complete body of zeros


@pytest.mark.parametrize(
    ("head", "end"),
    [
        (b"Content-Length: %d\r\n\r\n" % LIMIT, b""),
        (b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % LIMIT, b"\r\n0\r\n\r\n"),
    ],
    ids=["length", "chunks"],
)
def test_bodies_that_exceed_the_limit_together_get_503(
    server: Server, head: bytes, end: bytes
) -> None:
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(socket.create_connection(server.address, 10)) for _ in range(2)]
        for connection in both:
            connection.sendall(HEAD + head + bytes(3 * MEGABYTE))
        (one,), _, _ = select.select(both, [], [], 10)
        rejected = one.recv(1 << 16)
        (other,) = (connection for connection in both if connection is not one)
        other.sendall(bytes(MEGABYTE) + end)
        answered = other.recv(1 << 16)

    assert rejected.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in rejected
    assert answered.startswith(NOT_JSON)
    with Client(server) as client:
        assert client.ask(GOOD).status == 200


def test_a_client_that_disconnects_releases_its_bytes(server: Server) -> None:
    labels = {"model": "mnist-bn", "reason": "gone"}
    before = counted(server, "mnist_bn_rejects_total", **labels)

    def has_counted(number: int) -> bool:
        return counted(server, "mnist_bn_rejects_total", **labels) == before + number

    head = HEAD + b"Content-Length: %d\r\n\r\n" % LIMIT
    for number in range(1, 4):
        with socket.create_connection(server.address, 10) as connection:
            connection.sendall(head + bytes(3 * MEGABYTE))
        until(partial(has_counted, number))
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(head + bytes(LIMIT))
        assert connection.recv(1 << 16).startswith(NOT_JSON)


def test_a_rejection_for_lack_of_memory_is_counted_once_and_logged_at_most_once_a_second(
    server: Server,
) -> None:
    labels = {"model": "mnist-bn", "reason": "busy"}
    before = counted(server, "mnist_bn_rejects_total", **labels)
    logged = len(server.events("busy"))
    gone = counted(server, "mnist_bn_rejects_total", reason="gone")
    head = HEAD + b"X-Request-Id: of-mine\r\nContent-Length: %d\r\n\r\n" % LIMIT
    with socket.create_connection(server.address, 10) as full:
        full.sendall(head + bytes(LIMIT - 1))
        until(lambda: counted(server, "mnist_bn_queue") == 1)
        for _ in range(6):
            with socket.create_connection(server.address, 10) as connection:
                connection.sendall(head + bytes(LIMIT))
                rejected = connection.recv(1 << 16)
            assert rejected.startswith(b"HTTP/1.1 503")
            assert b"x-request-id: of-mine" in rejected
        full.sendall(b"x")
        assert full.recv(1 << 16).startswith(NOT_JSON)

    assert counted(server, "mnist_bn_rejects_total", **labels) == before + 6
    assert counted(server, "mnist_bn_rejects_total", reason="gone") == gone
    assert len(server.events("busy")) < logged + 6


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
def test_rejected_bodies_are_released(server: Server, last: bytes) -> None:
    sent = HEAD + last + b"Content-Length: %d\r\n\r\n" % LIMIT + bytes(LIMIT)
    with contextlib.ExitStack() as stack:
        before = server.memory()
        for _ in range(24):
            connection = stack.enter_context(socket.create_connection(server.address, 10))
            connection.sendall(sent)
            assert connection.recv(1 << 16).startswith(NOT_JSON)
        kept = server.memory() - before

    assert kept < 48 * MEGABYTE  # half of them


def test_bodies_beyond_the_limit_keep_no_memory(server: Server) -> None:
    head = HEAD + b"Content-Length: %d\r\n\r\n" % LIMIT
    before = server.memory()
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            connection = socket.create_connection(server.address, 10)
            stack.enter_context(connection).sendall(head + bytes(LIMIT - 9))
        requests.get(f"{server.url}/v2", timeout=10)
        kept = server.memory() - before

    assert kept < 48 * MEGABYTE  # of 120
