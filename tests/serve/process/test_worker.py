"""A server loses no request when it ends, swaps models or reaches its limits."""

import asyncio
import json
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import requests

from tests.support import commands
from tests.support.hammer import Check, Hammer, prove, put, version_of
from tests.support.hammer import request as inference
from tests.support.raw_clients import (
    BATCH,
    CHECK,
    NEW,
    OLD,
    REQUEST,
    RIGHT,
    ask,
    ask_anew,
    connect,
    receive,
)
from tests.support.serving import (
    Server,
    counted,
    lay,
    running,
    until,
    wait_for_event,
    workers_of,
)


async def hammer(server: Server, check: Check, number: signal.Signals) -> tuple[Hammer, int]:
    """Send requests in every way that clients do, and a signal meanwhile."""
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


@pytest.mark.parametrize(("workers", "number"), [(3, signal.SIGTERM), (1, signal.SIGINT)])
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


def test_the_server_is_not_ready_but_serves_until_the_drain_delay_is_over(folder: Path) -> None:
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


def test_an_incomplete_request_is_refused_when_the_drain_time_is_up(folder: Path) -> None:
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
def test_a_second_signal_ends_the_server_at_once(folder: Path, workers: int) -> None:
    with running(f"--workers={workers}", "--drain=600", folder=folder) as server:
        workers_of(server, workers)
        with connect(server) as connection:
            connection.sendall(REQUEST[:-1])
            server.process.send_signal(signal.SIGTERM)
            until(lambda: len(server.events("draining")) == workers)
            assert server.stop(signal.SIGINT) == 128 + signal.SIGINT


def test_models_are_swapped_and_rolled_back_and_bad_files_refused(tmp_path: Path) -> None:
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


def test_simultaneous_requests_beyond_the_queue_are_refused(folder: Path) -> None:
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


def test_a_slow_second_request_holds_no_place_in_the_queue(folder: Path) -> None:
    with running("--queue=2", "--drain=0.1", folder=folder) as server:
        for _ in range(4):
            slow = connect(server)
            slow.sendall(REQUEST + REQUEST[:-9])
            assert CHECK(receive(slow)) == RIGHT
        assert [ask_anew(server) for _ in range(10)] == [RIGHT] * 10


def test_the_server_goes_on_when_its_log_is_closed(folder: Path) -> None:
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
