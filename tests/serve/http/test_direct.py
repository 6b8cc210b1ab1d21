"""Requests that are answered without a task, in the order that they come in."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from mnist_batchnorm.serve.core.protocol import RequestError
from mnist_batchnorm.serve.http import direct
from mnist_batchnorm.serve.http.direct import LARGE, Direct, Turn


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
        self.ready: set[object] = set()
        self.settings = SimpleNamespace(queue=queue)
        self.metrics = SimpleNamespace(count=lambda: self.events.append("counted"))
        self.turn = Turn(self)  # type: ignore[arg-type]
        self._fails = fails

    def put(self, names: Iterable[str], size: int = 9) -> None:
        for name in names:
            request = Direct((name, None), [], {}, keep_alive=True)  # type: ignore[arg-type]
            request.size = size
            self.turn.put(self, request)  # type: ignore[arg-type]

    def answer(self, request: Direct, answer: str | None = None) -> str:
        """Compute an answer, as an App; given one, send it, as a connection."""
        name = str(request.served[0])
        if name == self._fails:
            raise OSError("no space left")
        self.events.append(f"{answer or 'computed'} {name}")
        return "sent"

    def turn_away(self, request: Direct, error: RequestError) -> str:
        assert error.status == 503
        return "refused"

    def give_up(self, request: Direct) -> None:
        self.events.append(f"gave up {request.served[0]}")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers wait for each other as long as it takes."""
    monkeypatch.setattr(direct, "TOGETHER", 3600.0)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn has time for one answer only."""
    monkeypatch.setattr(direct, "TOGETHER", 0.0)
    monkeypatch.setattr(direct, "perf_counter", lambda: 0.0)


@pytest.mark.usefixtures("patient")
def test_all_are_computed_then_counted_then_sent() -> None:
    server = Server()
    server.put("ab")
    assert not server.events
    server.loop.turn()
    assert server.events == ["computed a", "computed b", "counted", "sent a", "sent b"]
    server.put("c")
    server.loop.turn()
    assert server.events[5:] == ["computed c", "counted", "sent c"]
    assert not server.loop.soon


@pytest.mark.usefixtures("patient")
def test_none_waits_for_a_large_one_behind_it() -> None:
    server = Server()
    server.put("ab")
    server.put("L", LARGE + 1)
    server.put("c")
    server.loop.turn()
    assert server.events.index("sent b") < server.events.index("computed L")
    assert server.events[-1] == "sent c"


@pytest.mark.usefixtures("hasty")
def test_the_newest_of_too_many_are_refused() -> None:
    server = Server(queue=2)
    server.put("abcdef")
    for _ in range(6):
        server.loop.turn()
    told = [event for event in server.events if not event.startswith("co")]
    assert told == ["sent a", "refused f", "refused e", "refused d", "sent b", "sent c"]


def test_answers_get_as_much_time_as_reading_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else under too much load most of it goes to requests that are refused."""
    server = Server(queue=0)
    now = 0.0
    monkeypatch.setattr(direct, "perf_counter", lambda: now)
    answer = server.answer

    def answer_in_a_second(request: Direct, given: str | None = None) -> str:
        nonlocal now
        now += given is None
        return answer(request, given)

    monkeypatch.setattr(server, "answer", answer_in_a_second)
    server.put("abcdefgh")
    now += 5
    server.loop.turn()
    assert [event for event in server.events if event.startswith("sent")] == [
        f"sent {name}" for name in "abcde"
    ]
    assert server.events[-3:] == ["refused h", "refused g", "refused f"]


@pytest.mark.usefixtures("hasty")
def test_tasks_that_wait_take_places_in_the_queue() -> None:
    server = Server(queue=2)
    server.ready = {1, 2, 3}
    server.put("abcd")
    server.loop.turn()
    assert server.events[2:] == ["sent a", "refused d", "refused c", "refused b"]
    assert not server.loop.soon


@pytest.mark.usefixtures("patient")
def test_what_cannot_even_be_refused_takes_nobody_along(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(fails="b")
    server.put("abc")
    server.loop.turn()
    assert server.events == ["computed a", "gave up b", "computed c", "counted", "sent a", "sent c"]
    assert "no space left" in capfd.readouterr().err
