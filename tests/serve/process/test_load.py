"""Servers under more load than they can take, and with everything failing around them, for minutes.

``MNIST_BN_SOAK_SECONDS`` says for how long altogether; the figures are printed (``pytest -s``).
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import requests
import uvloop

from tests.support import commands
from tests.support.candidates import shifted
from tests.support.hammer import (
    Hammer,
    OpenLoad,
    checker,
    images,
    logits_of,
    prove,
    put,
    request,
    rows,
    version_of,
)
from tests.support.raw_clients import RIGHT, ask, connect
from tests.support.serving import (
    BEARER,
    TOKEN,
    Server,
    counted,
    lay,
    network,
    running,
    until,
    workers_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SOAK = float(os.environ.get("MNIST_BN_SOAK_SECONDS", "180"))

BATCH = images(1)
REQUEST, ANEW = request(BATCH), request(BATCH, last=True)
CONTENTS = [network().graph(folded=False), *(shifted(by).graph(folded=False) for by in (0.5, 1.0))]
CHECK = checker({version_of(content): logits_of(content, BATCH) for content in CONTENTS})
VERSIONS = {version_of(content) for content in CONTENTS}
TOLERATED = 24 << 20  # bytes by which memory may differ: allocators keep some


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    lay(folder)
    prove(folder, *CONTENTS[1:])
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a figure, past what pytest keeps."""

    def show(text: str) -> None:
        with capsys.disabled():
            os.write(1, f"\n{text}".encode())

    return show


def hammered(
    server: Server,
    meanwhile: Callable[[Hammer], Awaitable[None]],
    *,
    steady: int = 8,
    anew: int = 4,
) -> Hammer:
    """Clients that ask all the time while something else goes on."""

    async def run() -> Hammer:
        clients = Hammer(server.address, CHECK)
        ways = [clients.client(REQUEST) for _ in range(steady)]
        ways += [clients.client(ANEW) for _ in range(anew)]
        ways += [clients.client(REQUEST, every=0.3) for _ in range(steady)]
        jobs = [asyncio.create_task(way) for way in ways]
        await meanwhile(clients)
        clients.stopped = True
        await asyncio.wait_for(asyncio.gather(*jobs), commands.PATIENCE)
        return clients

    return asyncio.run(run())


def test_ends_under_load_lose_nothing(folder: Path, say: Callable[[str], None]) -> None:
    end = time.monotonic() + 0.2 * SOAK
    answered = rounds = 0
    for workers, delay, number in itertools.cycle(
        itertools.product((1, 3), (0, 0.3), (signal.SIGTERM, signal.SIGINT))
    ):
        with running(f"--workers={workers}", f"--drain-delay={delay}", folder=folder) as server:
            workers_of(server, workers)

            async def stop(
                _: Hammer, server: Server = server, number: signal.Signals = number
            ) -> None:
                await asyncio.sleep(0.5)
                server.process.send_signal(number)
                assert await asyncio.to_thread(server.process.wait, commands.PATIENCE) == 0

            clients = hammered(server, stop, steady=12, anew=12)
        counts = clients.tally.counts
        assert counts["lost"] == 0, clients.tally.losses
        assert counts.keys() <= {RIGHT, "503", "unsent"}
        answered, rounds = answered + counts[RIGHT] + counts["503"], rounds + 1
        if time.monotonic() > end:
            break
    say(f"{rounds} ends under load: {answered:,} requests answered, 0 lost")


def test_killed_workers_take_only_their_own_requests_along(
    folder: Path, say: Callable[[str], None]
) -> None:
    kills, lost = 0, 0
    with running("--workers=3", folder=folder) as server:
        workers_of(server, 3)

        async def kill(clients: Hammer) -> None:
            nonlocal kills, lost
            choice = random.Random(0)
            end = time.monotonic() + 0.15 * SOAK
            while time.monotonic() < end:
                await asyncio.sleep(0.5)
                alive = {event["pid"] for event in server.events("serving")}
                alive -= {event["pid"] for event in server.events("worker died")}
                os.kill(choice.choice(sorted(alive)), signal.SIGKILL)
                kills += 1
                while len(server.events("serving")) < 3 + kills:
                    await asyncio.sleep(0.05)
            lost = clients.tally.counts["lost"]
            await asyncio.sleep(1)

        clients = hammered(server, kill)
        counts = clients.tally.counts
        assert counts.keys() <= {RIGHT, "lost"}
        assert counts["lost"] == lost  # nothing after the last kill
        assert lost <= kills * 20  # there are 20 clients
        done = counted(server, "mnist_bn_requests_total")
        assert counts[RIGHT] <= done <= counts[RIGHT] + lost
        assert requests.get(f"{server.url}/v2/health/ready", timeout=60).ok
        assert server.stop() == 0
        assert not server.events("killed")
    say(
        f"{kills} workers of 3 killed under load: {counts[RIGHT]:,} requests answered, {lost} lost "
        f"with their workers; the metrics say {done:,.0f}"
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_every_answer_is_from_one_version(
    folder: Path, say: Callable[[str], None], workers: int
) -> None:
    path, swaps = folder / "models/bn.onnx", 60
    words = (f"--workers={workers}", "--watch=0.05")
    with running(*words, folder=folder, env={"OMP_NUM_THREADS": "1"}) as server:
        workers_of(server, workers)
        levels = []

        async def swap(_: Hammer) -> None:
            bad = itertools.cycle((CONTENTS[0][:-500], b"garbage", CONTENTS[1] + b"\0"))
            for swap in range(swaps + 10):
                if swap % 10 == 5:
                    refused = len(server.events("refused"))
                    put(path, next(bad))
                    while len(server.events("refused")) < refused + workers:
                        await asyncio.sleep(0.01)
                content = CONTENTS[(swap + 1) % len(CONTENTS)]
                put(path, content)
                loaded = workers * (swap + 1)
                while len(server.events("retired")) < loaded:
                    await asyncio.sleep(0.01)
                if swap >= 9:
                    levels.append(server.memory())

        clients = hammered(server, swap)
        counts = clients.tally.counts
        assert counts["lost"] == 0, clients.tally.losses
        assert counts.keys() <= VERSIONS, counts
        assert all(counts[version] for version in VERSIONS)
        assert counted(server, "mnist_bn_swaps_total", outcome="loaded") == workers * (swaps + 10)
        assert counted(server, "mnist_bn_swaps_total", outcome="refused") >= workers * 7
        assert counted(server, "mnist_bn_model_info", model="mnist-bn") == 1
    grown = levels[-1] - levels[0]
    say(
        f"{swaps} swaps under load, {workers} workers: {sum(counts.values()):,} requests, each "
        f"from one version ({', '.join(str(counts[version]) for version in sorted(VERSIONS))}), "
        f"0 lost; memory {levels[0] >> 20} MiB after 10 swaps, {grown / 2**20:+.1f} MiB after 60"
    )
    assert grown < workers * TOLERATED


def test_versions_side_by_side_and_reloaded_under_load(
    folder: Path, say: Callable[[str], None]
) -> None:
    first, second = folder / "models/first.onnx", folder / "models/second.onnx"
    first.write_bytes(CONTENTS[0])
    second.write_bytes(CONTENTS[1])
    words = ("mnist-bn=models/first.onnx", "mnist-bn=models/second.onnx", "--watch=0.05")
    with running(*words, folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        authorized = f"authorization: Bearer {TOKEN}\r\n"
        repository = f"{server.url}/v2/repository/models/mnist-bn"

        def post(path: str) -> None:
            assert requests.post(f"{repository}/{path}", headers=BEARER, timeout=60).ok

        def to(version: str) -> bytes:
            sent = request(BATCH, version=version)
            return sent.replace(b"host:", f"{authorized}host:".encode(), 1)

        async def run() -> dict[str, Hammer]:
            by_version = {
                version: Hammer(server.address, CHECK)
                for version in ("", *(version_of(content) for content in CONTENTS[:2]))
            }
            jobs = [
                asyncio.create_task(clients.client(to(version)))
                for version, clients in by_version.items()
                for _ in range(3)
            ]
            for _ in range(10):
                await asyncio.to_thread(post, "load")
                await asyncio.sleep(0.1)
            put(second, CONTENTS[2])
            await asyncio.sleep(1)
            put(second, CONTENTS[1])
            await asyncio.sleep(1)
            await asyncio.to_thread(post, "unload")
            await asyncio.sleep(0.2)
            await asyncio.to_thread(post, "load")
            await asyncio.sleep(0.5)
            for clients in by_version.values():
                clients.stopped = True
            await asyncio.gather(*jobs)
            return by_version

        by_version = asyncio.run(run())
    assert not any(clients.tally.counts["lost"] for clients in by_version.values())
    for version, clients in by_version.items():
        gone = {what for what in clients.tally.counts if what.startswith("404")}
        assert gone  # while it was unloaded
        assert clients.tally.counts.keys() - gone - {"lost"} == {version or version_of(CONTENTS[0])}
    total = sum(sum(clients.tally.counts.values()) for clients in by_version.values())
    say(f"two versions side by side, loaded 11 times and one of them swapped: {total:,} requests")


def test_more_load_than_it_can_take(folder: Path, say: Callable[[str], None]) -> None:
    sent, batch = rows(100)
    right = logits_of(CONTENTS[0], batch)
    seconds = 0.1 * SOAK
    with running("--queue=128", folder=folder) as server:
        busy = OpenLoad(server.address, sent, right)

        async def saturate() -> float:
            rate = await busy.saturate(32, max(2.0, seconds / 4))
            busy.close()
            return rate

        top = uvloop.run(saturate())  # a client must not be slower than the server
        say(f"saturated: {top:,.0f} requests/s of 100 images each")
        assert busy.seconds.keys() == {"200"}
        for share in (0.5, 1.0, 2.0, 0.5):
            load = OpenLoad(server.address, sent, right)

            async def offer(load: OpenLoad = load, share: float = share) -> None:
                await load.run(share * top, seconds)
                load.close()

            uvloop.run(offer())
            assert load.seconds.keys() <= {"200", "503"}, load.summary()
            offered = sum(map(len, load.seconds.values())) / seconds
            say(f"offered {share:g} of that, {offered:,.0f}/s: {load.summary()}")
            with connect(server) as connection:  # at once all is well again
                for _ in range(20):
                    assert ask(connection, sent).status == 200
        assert len(server.events("busy")) < 10 * SOAK  # not a line for each
        assert requests.get(f"{server.url}/v2/health/ready", timeout=60).ok


def test_a_thousand_idle_connections_do_not_matter(
    folder: Path, say: Callable[[str], None]
) -> None:
    sent, batch = rows(1)
    right = logits_of(CONTENTS[0], batch)
    with running(folder=folder) as server:

        def measured() -> str:
            load = OpenLoad(server.address, sent, right)

            async def run() -> None:
                await load.saturate(8, 0.02 * SOAK)
                load.close()

            uvloop.run(run())
            assert load.seconds.keys() == {"200"}
            return load.summary()

        alone, before = measured(), server.memory()
        idle = [connect(server) for _ in range(1000)]
        for connection in idle:
            assert ask(connection).status == 200
        among = measured()
        held = server.memory() - before
        until(lambda: counted(server, "mnist_bn_connections") >= 1000)
        for connection in idle:
            assert ask(connection).status == 200
        say(f"8 clients alone: {alone}\n8 among 1,000 idle, {held >> 20} MiB: {among}")


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def reset(connection: socket.socket) -> None:
    """Hang up without a word of good-bye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_clients_that_go_leave_nothing_behind(folder: Path, say: Callable[[str], None]) -> None:
    large, _ = rows(200)
    head = REQUEST.index(b"\r\n\r\n") + 4
    ways = {
        "connected": b"",
        "in the head": REQUEST[:20],
        "in the body": REQUEST[: head + 20],
        "in a large body": large[: len(large) // 2],
        "before the answer": REQUEST,
        "before a large answer": large,
    }
    count = max(100, int(2 * SOAK))
    with running(folder=folder) as server:
        first = descriptors(server)

        def memory_after() -> int:
            for sent in ways.values():
                for hang_up in (reset, socket.socket.close):
                    for some in range(0, count, 50):
                        gone = [connect(server) for _ in range(min(50, count - some))]
                        for connection in gone:
                            with contextlib.suppress(OSError):  # it may have been refused already
                                connection.sendall(sent)
                            hang_up(connection)
            until(lambda: descriptors(server) <= first + 1)  # /metrics
            until(lambda: counted(server, "mnist_bn_connections") <= 1)
            until(lambda: counted(server, "mnist_bn_queue") <= 1)
            return server.memory()

        # some megabytes more or less stay with the C library, whoever was last
        memory = max(memory_after(), memory_after())
        grown = min(memory_after(), memory_after()) - memory
        unexpected = [line for line in server.log() if line["event"] in {"library", "failed"}]
        assert not unexpected
        say(
            f"{8 * count * len(ways):,} clients gone in {len(ways)} places: {first} descriptors "
            f"before and after, memory {memory >> 20} MiB, {grown / 2**20:+.1f} MiB"
        )
        assert grown < TOLERATED
        with connect(server) as connection:
            assert ask(connection).status == 200


def test_who_does_not_take_an_answer_is_cut_off(folder: Path) -> None:
    sent, _ = rows(42_000, binary=False)  # the answer is more than the system keeps for a client
    words = ("--write-timeout=1", "--max-rows=42000")
    with running(*words, folder=folder) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(sent)
        until(lambda: counted(server, "mnist_bn_rejects_total", reason="stalled") == 1)
        taken = 0
        with pytest.raises(ConnectionResetError):  # noqa: PT012
            while True:
                more = len(connection.recv(1 << 16))
                assert more
                taken += more
        assert taken > 0
        with connect(server) as another:
            assert ask(another).status == 200
