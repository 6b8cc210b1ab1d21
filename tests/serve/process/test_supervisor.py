"""Several worker processes act as one server."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support import commands
from tests.support.raw_clients import (
    CHECK,
    OLD,
    REQUEST,
    RIGHT,
    ask,
    connect,
    process_of,
    receive,
)
from tests.support.serving import (
    BEARER,
    TOKEN,
    Server,
    counted,
    running,
    until,
    workers_of,
)


@pytest.fixture(scope="module")
def three(folder: Path) -> Iterator[Server]:
    with running("--workers=3", folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        workers_of(server, 3)
        yield server


def test_a_killed_worker_is_replaced_and_loses_only_its_own_requests(three: Server) -> None:
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


def test_every_worker_has_applied_a_change_when_it_is_confirmed(three: Server) -> None:
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


def test_a_restarted_worker_applies_the_changes_of_the_others(three: Server, folder: Path) -> None:
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


def test_a_faulty_model_is_reported_once(folder: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered.onnx"
    altered.write_bytes(OLD + b"\0")
    words = ("mnist-bn", "serve", "--port=0", "--workers=3", str(altered))
    status, err = commands.run(folder, *words)
    first, *others = err.splitlines()
    assert status == 1
    assert first.startswith(f"FAILED: {altered} is not served")
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


def test_workers_that_get_the_signal_twice_still_drain(folder: Path) -> None:
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
