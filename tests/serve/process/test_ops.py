"""Ending, replacing and limiting a server loses nobody's request."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.process import listener as listening
from tests.support import commands
from tests.support.candidates import shifted
from tests.support.hammer import (
    Answer,
    Check,
    Hammer,
    checker,
    images,
    logits_of,
    prove,
    put,
    version_of,
)
from tests.support.hammer import request as inference
from tests.support.serving import NETWORK, Server, lay, running

TOKEN = "the-token-of-these-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BATCH = images(1)
REQUEST = inference(BATCH)
OLD, NEW = NETWORK.graph(folded=False), shifted(0.5).graph(folded=False)
CHECK = checker({version_of(content): logits_of(content, BATCH) for content in (OLD, NEW)})
RIGHT = version_of(OLD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ops") / "pipeline"
    lay(folder)
    return folder


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + commands.PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing yet"
        time.sleep(0.01)


def wait_for_event(server: Server, name: str, count: int) -> None:
    until(lambda: len(server.events(name)) >= count)


def workers_of(server: Server, count: int) -> list[int]:
    """Their ids, once there are so many."""
    wait_for_event(server, "serving", count)
    return [event["pid"] for event in server.events("serving")]


def connect(server: Server) -> socket.socket:
    """A connection that the test's end closes at the latest."""
    opened.append(socket.create_connection(server.address, timeout=commands.PATIENCE))
    return opened[-1]


opened: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


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


def counted(server: Server, name: str, **labels: str) -> float:
    """The sum of what /metrics says under a name."""
    lines = requests.get(f"{server.url}/metrics", headers=BEARER, timeout=60).text.splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name and all(one in line for one in wanted)
    )


# --- Ending -------------------------------------------------------------------------------------


async def hammer(server: Server, check: Check, number: signal.Signals) -> tuple[Hammer, int]:
    """Send requests in every way that people do, and a signal among them."""
    clients = Hammer(server.address, check)
    anew = inference(BATCH, last=True)
    ways = [
        *[clients.client(REQUEST) for _ in range(6)],
        *[clients.client(anew) for _ in range(6)],
        *[clients.client(REQUEST, every=0.1) for _ in range(10)],
        *[clients.client(REQUEST, every=0.5) for _ in range(30)],
        *[clients.client(REQUEST, cut=cut) for cut in (1, 30, 30, 500, 500)],
        *[clients.client(REQUEST, pipelined=3) for _ in range(3)],
    ]
    jobs = [asyncio.create_task(way) for way in ways]
    await asyncio.sleep(0.7)
    server.process.send_signal(number)
    await asyncio.wait_for(asyncio.gather(*jobs), commands.PATIENCE)
    return clients, await asyncio.to_thread(server.process.wait, commands.PATIENCE)


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGTERM), (3, signal.SIGTERM), (1, signal.SIGINT)]
)
def test_no_request_is_lost_when_the_server_ends(
    folder: Path, workers: int, number: signal.Signals
) -> None:
    with running(f"--workers={workers}", "--drain-delay=0.5", folder=folder) as server:
        workers_of(server, workers)
        clients, status = asyncio.run(hammer(server, CHECK, number))
        counts = clients.tally.counts
        assert counts["lost"] == 0, clients.tally.losses
        assert counts.keys() <= {RIGHT, "503", "unsent"}
        assert counts[RIGHT] > 200
        assert status == 0
        assert len(server.events("stopped")) == workers + (workers > 1)
        assert not [line for line in server.log() if line["level"] != "info"]


def test_not_ready_at_once_but_serving_until_the_delay_is_over(folder: Path) -> None:
    with (
        running("--drain-delay=1", "--drain=5", folder=folder) as server,
        connect(server) as before,
    ):
        assert not ask(before).last
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.events("draining"))
        ready = requests.get(f"{server.url}/v2/health/ready", timeout=60)
        assert ready.status_code == 503
        assert ready.headers["connection"] == "close"
        assert requests.get(f"{server.url}/v2/health/live", timeout=60).status_code == 200
        for connection in (before, connect(server)):
            answer = ask(connection)
            assert CHECK(answer) == RIGHT
            assert answer.last
            assert connection.recv(1) == b""
        assert server.process.wait(commands.PATIENCE) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(server)


def test_who_holds_a_request_open_is_refused_when_time_is_up(folder: Path) -> None:
    head = REQUEST.index(b"\r\n\r\n") + 4
    with running("--drain-delay=0", "--drain=1", folder=folder) as server:
        with connect(server) as in_head, connect(server) as in_body, connect(server) as late:
            in_head.sendall(REQUEST[: head // 2])
            in_body.sendall(REQUEST[: head + 9])
            late.sendall(REQUEST[:-9])
            until(lambda: counted(server, "mnist_bn_queue") >= 2)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.events("draining"))
            assert CHECK(ask(late, REQUEST[-9:])) == RIGHT
            for connection in (in_head, in_body):
                assert CHECK(receive(connection)) == "503"
        assert server.process.wait(commands.PATIENCE) == 0
        assert [event["connections"] for event in server.events("cut")] == [2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it_at_once(folder: Path, workers: int) -> None:
    with running(f"--workers={workers}", "--drain=600", folder=folder) as server:
        workers_of(server, workers)
        with connect(server) as connection:
            connection.sendall(REQUEST[:-1])
            server.process.send_signal(signal.SIGTERM)
            until(lambda: len(server.events("draining")) == workers)
            assert server.stop(signal.SIGINT) == 128 + signal.SIGINT


def test_workers_that_get_the_signal_twice_drain_all_the_same(folder: Path) -> None:
    """As from a terminal, or a system that stops all processes of a service."""
    with running("--workers=2", "--drain-delay=0", folder=folder) as server:
        workers = workers_of(server, 2)
        with connect(server) as connection:
            connection.sendall(REQUEST[:-1])
            server.process.send_signal(signal.SIGINT)
            until(lambda: len(server.events("draining")) == 2)
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):  # the one that has nothing to do
                    os.kill(worker, signal.SIGINT)
            assert CHECK(ask(connection, REQUEST[-1:])) == RIGHT
        assert server.process.wait(commands.PATIENCE) == 0
        assert not server.events("killed")


def test_connections_in_the_backlog_are_served_and_no_new_ones_come() -> None:
    listener = listening.listen(Settings(port=0))
    address = listener.getsockname()
    before = [socket.create_connection(address) for _ in range(20)]
    opened.extend([listener, *before])
    listening.drop_new(listener)
    with pytest.raises(TimeoutError):
        socket.create_connection(address, timeout=0.2)
    for client in before:
        client.sendall(b"asked")

    async def accept_late() -> list[bytes]:
        emptied = asyncio.create_task(listening.empty_backlog(listener))
        accepted = []
        for _ in before:
            await asyncio.sleep(0.03)
            assert not emptied.done()
            accepted.append(listener.accept()[0])
            opened.append(accepted[-1])
        await emptied
        return [connection.recv(5) for connection in accepted]

    assert asyncio.run(accept_late()) == [b"asked"] * 20
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


# --- Workers ------------------------------------------------------------------------------------


def process_of(answer: Answer) -> str:
    """Which process answered: request ids begin with a word of its own."""
    return answer.headers["x-request-id"].partition("-")[0]


@pytest.fixture(scope="module")
def three(folder: Path) -> Iterator[Server]:
    with running("--workers=3", folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        workers_of(server, 3)
        yield server


def test_a_killed_worker_is_replaced_and_takes_nobody_elses_requests_along(three: Server) -> None:
    authorized = REQUEST.replace(b"host:", f"authorization: Bearer {TOKEN}\r\nhost:".encode())
    asked = counted(three, "mnist_bn_requests_total")
    connections: list[socket.socket] = []
    owners: list[str] = []
    while len(connections) < 12 or len(set(owners)) < 2:
        connections.append(connect(three))
        owners.append(process_of(ask(connections[-1], authorized)))
        assert len(connections) < 1000, "all connections go to one worker"
    count = len(connections)
    assert counted(three, "mnist_bn_requests_total") == asked + count
    until(lambda: counted(three, "mnist_bn_connections") >= count)

    for connection in connections:
        connection.sendall(authorized[:-1])
    threads = len(list(Path(f"/proc/{three.process.pid}/task").iterdir()))
    assert threads == 1  # what forks must have no others
    (killed,) = (e["pid"] for e in three.events("serving") if e["ids"] == owners[0])
    started = len(three.events("serving"))
    os.kill(killed, signal.SIGKILL)
    died, served = set(), set()
    for connection, owner in zip(connections, owners, strict=True):
        with connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(authorized[-1:])
            if connection.recv(1, socket.MSG_PEEK):
                assert CHECK(receive(connection)) == RIGHT
                served.add(owner)
                continue
        died.add(owner)
    assert died == {owners[0]}
    assert served == set(owners) - died

    until(lambda: three.events("worker died"))
    (event,) = three.events("worker died")
    assert (event["pid"], event["status"]) == (killed, -signal.SIGKILL)
    *before, new = workers_of(three, started + 1)
    assert new not in before
    lost = owners.count(owners[0])
    assert counted(three, "mnist_bn_requests_total") == asked + 2 * count - lost
    until(lambda: counted(three, "mnist_bn_connections") <= 3)
    assert counted(three, "mnist_bn_model_info", version=RIGHT) == 1


def test_statistics_are_those_of_all_workers(three: Server) -> None:
    def stats() -> Any:
        path = f"{three.url}/v2/models/mnist-bn/stats"
        return requests.get(path, headers=BEARER, timeout=60).json()["model_stats"][0]

    failed, began = stats()["inference_stats"]["fail"]["count"], time.time()
    path, owners = f"{three.url}/v2/models/mnist-bn/infer", set[str]()
    asked = 0
    while len(owners) < 2:
        answer = requests.post(path, json={}, headers=BEARER, timeout=60)
        assert answer.status_code == 400
        owners.add(answer.headers["x-request-id"].partition("-")[0])
        asked += 1
    assert stats()["inference_stats"]["fail"]["count"] == failed + asked

    authorized = REQUEST.replace(b"host:", f"authorization: Bearer {TOKEN}\r\nhost:".encode())
    with connect(three) as connection:
        ask(connection, authorized)
    until(lambda: stats()["last_inference"] >= began * 1000 - 100)
    for _ in range(10):  # whichever process answers
        assert stats()["last_inference"] >= began * 1000 - 100


def test_all_workers_have_loaded_and_unloaded_when_the_answer_comes(three: Server) -> None:
    repository = f"{three.url}/v2/repository/models/mnist-bn"

    def seen() -> set[int]:
        path = f"{three.url}/v2/models/mnist-bn/ready"
        return {requests.get(path, headers=BEARER, timeout=60).status_code for _ in range(30)}

    for _ in range(3):
        assert requests.post(f"{repository}/unload", headers=BEARER, timeout=60).ok
        assert seen() == {404}
        assert requests.post(f"{repository}/load", headers=BEARER, timeout=60).ok
        assert seen() == {200}
    assert not [line for line in three.log() if line["event"] == "failed"]


def test_a_worker_that_starts_late_does_what_the_others_were_told(
    three: Server, folder: Path
) -> None:
    """Even where the file of the model that was unloaded is gone."""
    path, aside = folder / "models/bn-folded.onnx", folder / "models/aside.onnx"
    repository = f"{three.url}/v2/repository/models/mnist-bn-folded"
    assert requests.post(f"{repository}/unload", headers=BEARER, timeout=60).ok
    path.rename(aside)
    try:
        known = workers_of(three, 3)
        os.kill(known[-1], signal.SIGKILL)
        workers_of(three, len(known) + 1)
        event = three.events("serving")[-1]
        assert event["pid"] not in known
        served = [model.partition(" ")[0] for model in event["models"]]
        assert served == ["mnist-bn", "mnist-plain"]
        load = requests.post(f"{repository}/load", headers=BEARER, timeout=60)
        assert (load.status_code, "no models/bn-folded.onnx" in load.text) == (400, True)
        assert requests.get(f"{three.url}/v2/health/ready", timeout=60).ok  # it stays unloaded
    finally:
        aside.rename(path)
    assert requests.post(f"{repository}/load", headers=BEARER, timeout=60).ok


def test_what_keeps_workers_from_starting_is_said_once(folder: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered.onnx"
    altered.write_bytes(OLD + b"\0")
    for source, expected, begins in (
        ("missing.onnx", 2, "error: no missing.onnx"),
        (str(altered), 1, f"FAILED: {altered} is not served"),
    ):
        words = ("mnist-bn", "serve", "--port=0", "--workers=3", source)
        status, err = commands.run(folder, *words)
        first, *others = err.splitlines()
        assert status == expected
        assert first.startswith(begins)
        assert [json.loads(line)["event"] for line in others] == ["stopped"]


def test_workers_end_when_their_parent_is_killed(folder: Path) -> None:
    with running("--workers=2", "--drain-delay=0", folder=folder) as server:
        workers = workers_of(server, 2)
        with connect(server) as connection:
            assert CHECK(ask(connection)) == RIGHT
            connection.sendall(REQUEST[:-1])
            server.process.kill()
            server.process.wait()
            until(lambda: len(server.events("orphaned")) == 2)
            assert CHECK(ask(connection, REQUEST[-1:])) == RIGHT
        until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        with pytest.raises(ConnectionRefusedError):
            connect(server)


# --- New models ---------------------------------------------------------------------------------


def test_models_are_swapped_and_rolled_back_and_bad_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    lay(folder)
    path = folder / "models/bn.onnx"
    with running("--watch=0.05", folder=folder) as server:
        assert ask_anew(server) == version_of(OLD)
        prove(folder, NEW)
        put(path, NEW)
        until(lambda: ask_anew(server) == version_of(NEW))
        refusals = len(server.events("refused"))
        for bad in (NEW[:-1000], b"garbage", NEW + b"\0", b""):
            put(path, bad)
            refusals += 1
            wait_for_event(server, "refused", refusals)
            event = server.events("refused")[-1]
            assert event["still_serving"] == version_of(NEW)
            assert ask_anew(server) == version_of(NEW)
        path.unlink()
        until(lambda: "no models/bn.onnx" in server.events("refused")[-1]["why"])
        assert counted(server, "mnist_bn_swaps_total", outcome="refused") >= refusals
        put(path, OLD)
        until(lambda: ask_anew(server) == version_of(OLD))
        assert counted(server, "mnist_bn_swaps_total", outcome="loaded") == 2
        assert requests.get(f"{server.url}/v2/health/ready", timeout=60).ok


# --- Limits -------------------------------------------------------------------------------------


def test_one_connection_too_many_is_refused_cleanly(folder: Path) -> None:
    with running("--max-connections=4", folder=folder) as server:
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


def test_requests_that_come_at_once_are_refused_beyond_the_queue(folder: Path) -> None:
    head = REQUEST.index(b"\r\n\r\n") + 4
    with running("--queue=16", folder=folder) as server:
        connections = [connect(server) for _ in range(100)]
        for connection in connections:
            connection.sendall(REQUEST[:head])
        until(lambda: counted(server, "mnist_bn_queue") >= 100)
        assert ask_anew(server) == RIGHT  # those whose bodies are on their way do not count
        server.process.send_signal(signal.SIGSTOP)
        for connection in connections:
            connection.sendall(REQUEST[head:])
        server.process.send_signal(signal.SIGCONT)
        counts = Counter(CHECK(receive(connection)) for connection in connections)
        assert counts.keys() == {RIGHT, "503"}
        assert counts[RIGHT] >= 16
        assert [CHECK(ask(connection)) for connection in connections] == [RIGHT] * 100
        assert sum(1 + event["held_back"] for event in server.events("busy")) <= counts["503"]


def test_who_is_slow_with_a_second_request_holds_no_place(folder: Path) -> None:
    with running("--queue=2", "--drain=0.1", folder=folder) as server:
        for _ in range(4):
            slow = connect(server)
            slow.sendall(REQUEST + REQUEST[:-9])
            assert CHECK(receive(slow)) == RIGHT
        assert [ask_anew(server) for _ in range(10)] == [RIGHT] * 10


def test_descriptors_are_raised_to_what_connections_need() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = Settings(max_connections=1000)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        assert listening.fit_descriptors(settings) is settings
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1000 + listening.RESERVE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_descriptors_mean_fewer_connections_and_a_warning(folder: Path) -> None:
    limits = f"ulimit -n {listening.RESERVE + 3}; exec mnist-bn serve --port 0"
    with commands.running(folder, "sh", "-c", limits) as command:
        server = Server(command)
        (event,) = server.events("few descriptors")
        assert event["max_connections"] == 3
        assert "ulimit -Hn" in event["why"]
        connections = [connect(server) for _ in range(4)]
        assert [CHECK(ask(one)) for one in connections] == [RIGHT, RIGHT, RIGHT, "503"]
        assert server.stop() == 0


def test_too_few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(UserError, match="100 open files are too few; raise `ulimit -n` to 266"):
        listening.fit_descriptors(Settings(max_connections=10))


def test_a_log_that_nobody_reads_any_more_stops_nothing(folder: Path) -> None:
    words = ("mnist-bn", "serve", "--port", "0", "--drain-delay", "0", "--access-log")
    process = subprocess.Popen(
        words, cwd=folder, env=commands.environment(), stderr=subprocess.PIPE
    )
    try:
        assert process.stderr
        url = ""
        while not url:
            url = json.loads(process.stderr.readline()).get("url", "")
        process.stderr.close()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(3):
            with socket.create_connection(address, timeout=60) as connection:
                assert CHECK(ask(connection)) == RIGHT
            with socket.create_connection(address, timeout=60) as connection:
                assert ask(connection, b"nonsense\r\n\r\n").status == 400
        process.terminate()
        assert process.wait(commands.PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
