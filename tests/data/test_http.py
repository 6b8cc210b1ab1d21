import gzip
import io
import re
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import requests

from mnist_batchnorm.data import http
from mnist_batchnorm.data.http import Limits, SourceError, receive
from tests.support.file_server import (
    Handler,
    Reply,
    Server,
    answer,
    answer_in_turn,
    hang_up,
    not_http,
    pause_halfway,
    stall,
    status,
    trickle,
    trickle_headers,
)

# Patient enough for a busy machine; a test of impatience replaces one of them.
LIMITS = Limits(
    connect_s=5, read_s=10, grace_s=20, bytes_per_s=1, file_bytes=1 << 20, backoff_s=0.01
)
CONTENT = np.random.default_rng(0).bytes(20_000)


def test_a_terminal_shows_progress(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(http, "CHUNK_BYTES", 1000)
    server.replies["/file.gz"] = pause_halfway(CONTENT)
    assert receive(f"{server.url}/file.gz", LIMITS) == CONTENT
    assert re.search(r"file\.gz: +\d+%\|[^\r]+B/s", terminal.getvalue())
    assert terminal.getvalue().endswith("\r")  # the bar is wiped


def test_a_redirect_is_followed(server: Server) -> None:
    server.replies["/elsewhere"] = answer(CONTENT)
    server.replies["/file"] = status(302, Location="/elsewhere", Content_Length="0")
    assert receive(f"{server.url}/file", LIMITS) == CONTENT


def test_content_encoding_is_decoded(server: Server) -> None:
    server.replies["/file"] = answer(gzip.compress(CONTENT), Content_Encoding="gzip")
    assert receive(f"{server.url}/file", LIMITS) == CONTENT


def test_a_retry_starts_from_the_first_byte_and_is_logged(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CHUNK_BYTES", 1000)  # a part arrives before the transfer fails
    faults = (answer(CONTENT[:-100], len(CONTENT)), status(503))
    server.replies["/file"] = answer_in_turn(*faults, answer(CONTENT))

    assert receive(f"{server.url}/file", LIMITS) == CONTENT

    assert server.requested == ["/file"] * 3
    retries = capsys.readouterr().err.splitlines()
    assert len(retries) == 2
    assert all(line.startswith("file: ") and "; again in " in line for line in retries)


def test_the_delay_before_a_retry_doubles(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", delays.append)
    server.replies["/file"] = status(500)
    with pytest.raises(SourceError):
        receive(f"{server.url}/file", replace(LIMITS, attempts=4, backoff_s=1.0))
    assert len(delays) == 3
    # 1, 2 and 4 seconds and up to one of jitter
    assert all(2**n <= delay <= 2**n + 1 for n, delay in enumerate(delays))


WITHOUT_LENGTH = -1
FAULTS: dict[str, tuple[Reply, str, int, Limits]] = {
    # reply, reason, requests made, limits
    "404": (status(404), "HTTP status 404 Not Found", 1, LIMITS),
    "403": (status(403), "HTTP status 403 Forbidden", 1, LIMITS),
    "401": (status(401), "HTTP status 401 Unauthorized", 1, LIMITS),
    "429": (status(429), "HTTP status 429 Too Many Requests", 3, LIMITS),
    "500": (status(500), "HTTP status 500 Internal Server Error", 3, LIMITS),
    "redirect loop": (
        status(302, Location="/file", Content_Length="0"),
        "Exceeded 30 redirects",
        31,
        LIMITS,
    ),
    "redirect to a file": (
        status(302, Location="file:///etc/hosts", Content_Length="0"),
        "No connection adapters",
        1,
        LIMITS,
    ),
    "truncated": (
        answer(CONTENT[:-100], len(CONTENT)),
        r"transfer broke off: .*100 more expected",
        3,
        LIMITS,
    ),
    "endless body": (
        answer(bytes(2 << 20), WITHOUT_LENGTH),
        "sends more than 1,048,576 bytes",
        1,
        LIMITS,
    ),
    "encoded bomb": (
        answer(gzip.compress(bytes(8 << 20)), Content_Encoding="gzip"),
        "sends more than 1,048,576 bytes",
        1,
        LIMITS,
    ),
    "false encoding": (
        answer(b"<html>", Content_Encoding="gzip"),
        "failed to decode",
        1,
        LIMITS,
    ),
    "stall": (stall, "transfer broke off: .*Read timed out", 3, replace(LIMITS, read_s=0.2)),
    "trickle": (
        trickle,
        r"too slow: \d+ bytes in 0 s",
        1,
        replace(LIMITS, grace_s=0.4, bytes_per_s=1e6),
    ),
    "trickling headers": (trickle_headers, "too slow: 0 bytes", 1, replace(LIMITS, grace_s=0.4)),
    "hangs up": (hang_up, "transfer broke off", 3, LIMITS),
    "not HTTP": (not_http, "transfer broke off: .*BadStatusLine", 3, LIMITS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_and_retried_if_it_may_pass(server: Server, fault: str) -> None:
    server.replies["/file"], reason, requests, limits = FAULTS[fault]
    with pytest.raises(SourceError, match=reason):
        receive(f"{server.url}/file", limits)
    assert server.requested == ["/file"] * requests


def test_an_abandoned_connection_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def reply(handler: Handler) -> None:
        try:
            trickle(handler)
        except ConnectionError:
            closed.set()

    server.replies["/file"] = reply
    monkeypatch.setattr(http, "CHUNK_BYTES", 1)
    with pytest.raises(SourceError, match=r"too slow: [1-9]\d* bytes"):
        receive(f"{server.url}/file", replace(LIMITS, grace_s=0.4, bytes_per_s=1e6))
    assert closed.wait(10)


def test_a_refused_connection_is_not_retried(closed_port: int) -> None:
    with pytest.raises(SourceError, match=r"^no connection: .*refused"):
        receive(f"http://127.0.0.1:{closed_port}/file", replace(LIMITS, backoff_s=60))


def test_a_connection_timeout_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def get(url: str, **_: Any) -> None:
        requested.append(url)
        raise requests.ConnectTimeout

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(SourceError, match="no connection within 5 s"):
        receive("http://127.0.0.1/file", LIMITS)
    assert len(requested) == 1


def test_a_defect_in_the_reading_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "get", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        receive("http://127.0.0.1/file", LIMITS)


@pytest.mark.parametrize(
    "url", ["http://", "http://.x", "http://a b", "http://x:99999", f"http://{'a' * 64}.invalid"]
)
def test_a_malformed_url_is_a_bad_source(url: str) -> None:
    with pytest.raises(SourceError):
        receive(url, LIMITS)
