"""Requests that are answered without a task, in the order of their arrival."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from mnist_batchnorm.serve.core.protocol import RequestError
from mnist_batchnorm.serve.http import response_batch
from mnist_batchnorm.serve.http.fast_request import FastRequest
from mnist_batchnorm.serve.http.response_batch import LARGE_BODY_BYTES, ResponseBatch


class Loop:
    """An event loop of which the test makes the turns."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, call: Callable[..., None], *given: Any) -> None:
        self.soon.append(lambda: call(*given))

    def turn(self) -> None:
        now, self.soon = self.soon, []
        for call in now:
            call()


class Server:
    """A turn of requests, and what happens to them: a name each.

    Args:
        queue: how many may wait.
        fails: the one that cannot even be refused.
    """

    def __init__(self, queue: int = 512, fails: str = "") -> None:
        self.events: list[str] = []
        self.loop = Loop()
        self.waiting: set[object] = set()
        self.settings = SimpleNamespace(queue=queue)
        self.metrics = SimpleNamespace(flush=lambda: self.events.append("counted"))
        self.batch = ResponseBatch(self)  # type: ignore[arg-type]
        self._fails = fails

    def add(self, names: Iterable[str], size: int = 9) -> None:
        for name in names:
            request = FastRequest((name, None), [], {}, keep_alive=True)  # type: ignore[arg-type]
            request.size = size
            self.batch.add(self, request)  # type: ignore[arg-type]

    def handle(self, request: FastRequest) -> str:
        name = str(request.served[0])
        if name == self._fails:
            raise OSError("no space left")
        self.events.append(f"computed {name}")
        return "sent"

    def send_response(self, request: FastRequest, response: str) -> None:
        self.events.append(f"{response} {request.served[0]}")

    def reject(self, request: FastRequest, error: RequestError) -> str:
        assert error.status == 503
        return "refused"

    def abort(self, request: FastRequest) -> None:
        self.events.append(f"aborted {request.served[0]}")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers wait for each other as long as it takes."""
    monkeypatch.setattr(response_batch, "BATCH_WINDOW_S", 3600.0)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn has time for one answer only."""
    monkeypatch.setattr(response_batch, "BATCH_WINDOW_S", 0.0)
    monkeypatch.setattr(response_batch, "perf_counter", lambda: 0.0)


@pytest.mark.usefixtures("patient")
def test_all_are_computed_then_counted_then_sent() -> None:
    server = Server()
    server.add("ab")
    assert not server.events
    server.loop.turn()
    assert server.events == ["computed a", "computed b", "counted", "sent a", "sent b"]
    server.add("c")
    server.loop.turn()
    assert server.events[5:] == ["computed c", "counted", "sent c"]
    assert not server.loop.soon


@pytest.mark.usefixtures("patient")
def test_none_waits_for_a_large_one_behind_it() -> None:
    server = Server()
    server.add("ab")
    server.add("L", LARGE_BODY_BYTES + 1)
    server.add("c")
    server.loop.turn()
    assert server.events.index("sent b") < server.events.index("computed L")
    assert server.events[-1] == "sent c"


@pytest.mark.usefixtures("hasty")
def test_the_newest_of_too_many_are_refused() -> None:
    server = Server(queue=2)
    server.add("abcdef")
    for _ in range(6):
        server.loop.turn()
    sent = [event for event in server.events if not event.startswith("co")]
    assert sent == ["sent a", "refused f", "refused e", "refused d", "sent b", "sent c"]


def test_answers_get_as_much_time_as_reading_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else under too much load most of it goes to requests that are refused."""
    server = Server(queue=0)
    now = 0.0
    monkeypatch.setattr(response_batch, "perf_counter", lambda: now)
    handle = server.handle

    def handle_in_a_second(request: FastRequest) -> str:
        nonlocal now
        now += 1
        return handle(request)

    monkeypatch.setattr(server, "handle", handle_in_a_second)
    server.add("abcdefgh")
    now += 5
    server.loop.turn()
    assert [event for event in server.events if event.startswith("sent")] == [
        f"sent {name}" for name in "abcde"
    ]
    assert server.events[-3:] == ["refused h", "refused g", "refused f"]


@pytest.mark.usefixtures("hasty")
def test_tasks_that_wait_take_places_in_the_queue() -> None:
    server = Server(queue=2)
    server.waiting = {1, 2, 3}
    server.add("abcd")
    server.loop.turn()
    assert server.events[2:] == ["sent a", "refused d", "refused c", "refused b"]
    assert not server.loop.soon


@pytest.mark.usefixtures("patient")
def test_what_cannot_even_be_refused_takes_nobody_along(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(fails="b")
    server.add("abc")
    server.loop.turn()
    assert server.events == ["computed a", "aborted b", "computed c", "counted", "sent a", "sent c"]
    assert "no space left" in capfd.readouterr().err
