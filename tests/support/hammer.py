"""Clients that load a server and count the outcome of every request."""

import asyncio
import base64
import contextlib
import copy
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import orjson

from mnist_batchnorm.artifacts.splits import network_input

Float32 = npt.NDArray[np.float32]
USERS = 3000  # of an open load, fewer than the connections that a server takes
TIMEOUT = 60.0  # seconds for an answer; the machine may be busy


def images(count: int, seed: int = 0) -> Float32:
    """Random images, float32 ``[count, 784]``."""
    return np.random.default_rng(seed).random((count, 784), np.float32)


def request(
    batch: Float32, model: str = "mnist-bn", version: str = "", *, last: bool = False
) -> bytes:
    """An inference request as it goes over the wire."""
    rows = batch.astype(float).tolist()
    body = orjson.dumps(
        {
            "inputs": [
                {"name": "image", "datatype": "FP32", "shape": list(batch.shape), "data": rows}
            ]
        }
    )
    return post(body, model, version, last=last)


def post(
    body: bytes,
    model: str = "mnist-bn",
    version: str = "",
    *,
    last: bool = False,
    extra: str = "",
) -> bytes:
    """A body as a request for inference, with more headers."""
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    extra += "connection: close\r\n" if last else ""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{extra}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def last(self) -> bool:
        """Whether the server announces that it closes."""
        return self.headers.get("connection") == "close"


class LostError(Exception):
    """The connection of a request ended before its answer was complete."""


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read one answer.

    Raises:
        LostError: The connection ends first.
    """
    try:
        async with asyncio.timeout(TIMEOUT):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await reader.readexactly(int(headers["content-length"]))
    except (asyncio.IncompleteReadError, OSError) as error:
        raise LostError(repr(error)) from None
    return Answer(int(first.split()[1]), headers, body)


Check = Callable[[Answer], str]


@dataclass
class Tally:
    """Outcomes of requests.

    Attributes:
        counts: requests by outcome: the result of `Check`, ``lost``, or ``unsent`` without a
            connection.
        losses: the errors of lost requests.
    """

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


def logits_of(content: bytes, batch: Float32) -> bytes:
    """The bits of an ONNX file's logits, computed in this process."""
    from mnist_batchnorm.parity import runtime

    return runtime.load(content).run(batch).astype(np.float32).tobytes()


def checker(expected: Mapping[str, bytes]) -> Check:
    """Return a check that names the version of an answer, or what is wrong with it.

    Args:
        expected: the bits of each version's logits.
    """

    def check(answer: Answer) -> str:
        content = orjson.loads(answer.body)
        if answer.status == 503 and content["error"] and answer.headers["retry-after"]:
            return "503"
        if answer.status != 200:
            return f"{answer.status} {content}"
        version: str = content["model_version"]
        logits = np.array(content["outputs"][0]["data"], np.float32).tobytes()
        return version if expected.get(version) == logits else f"wrong logits of {version}"

    return check


class Hammer:
    """Clients of one server.

    Args:
        address: host and port.
        check: of their answers.
    """

    def __init__(self, address: tuple[str, int], check: Check) -> None:
        self.address = address
        self.check = check
        self.tally = Tally()
        self.stopped = False
        self._random = random.Random(0)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            return await asyncio.open_connection(*self.address, limit=1 << 20)
        except OSError:
            self.tally.counts["unsent"] += 1
            return None

    async def client(
        self, sent: bytes, *, every: float = 0.0, cut: int = 0, pipelined: int = 1
    ) -> None:
        """Send requests until stopped or until the server accepts no connection.

        Args:
            sent: the request.
            every: mean seconds between requests.
            cut: bytes of a request before a pause; 0: no pause.
            pipelined: requests that are sent together.
        """
        connection = None
        while not self.stopped:
            connection = connection or await self._connect()
            if connection is None:
                return
            reader, writer = connection
            open_still = False
            try:
                if cut:
                    writer.write(sent[:cut])
                    await writer.drain()
                    await asyncio.sleep(self._random.uniform(0, 0.05))
                writer.write((sent * pipelined)[cut:])
                await writer.drain()
                for left in reversed(range(pipelined)):
                    answer = await read_answer(reader)
                    self.tally.counts[self.check(answer)] += 1
                    open_still = not answer.last
                    if not open_still and left:
                        raise LostError(f"{left} requests were sent behind the last")
            except (LostError, OSError) as error:
                self.tally.counts["lost"] += 1
                self.tally.losses.append(f"{error!r} cut={cut} pipelined={pipelined}")
            if not open_still:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                connection = None
            if every:
                await asyncio.sleep(self._random.uniform(0, 2 * every))
        if connection is not None:
            connection[1].close()


def version_of(content: bytes) -> str:
    """The served version of an ONNX file that is not registered."""
    return hashlib.sha256(content).hexdigest()[:12]


def prove(folder: Path, *contents: bytes) -> None:
    """Add these files to the gate's report as passed."""
    from mnist_batchnorm.parity import runtime

    path = folder / "reports/parity.json"
    report = json.loads(path.read_text())
    goldens = report["goldens"]
    pixels = np.frombuffer(base64.b64decode(goldens["images"]), np.uint8).reshape(-1, 784)
    for content in contents:
        graph = copy.deepcopy(report["graphs"]["bn.onnx"])
        graph["onnx"]["sha256"] = hashlib.sha256(content).hexdigest()
        name = f"{version_of(content)}.onnx"
        report["graphs"][name] = graph
        goldens["logits"][name] = runtime.load(content).run(network_input(pixels)).tolist()
    put(path, json.dumps(report).encode())


def put(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    beside.replace(path)


def rows(count: int, model: str = "mnist-bn", *, binary: bool = True) -> tuple[bytes, Float32]:
    """A short request of many images, as raw pixels, and the network's input.

    Args:
        count: number of images.
        model: its name.
        binary: whether the answer is raw, too.
    """
    pixels = np.random.default_rng(1).integers(0, 256, (count, 784), np.uint8)
    size = {"binary_data_size": pixels.size}
    content = {
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [count, 784], "parameters": size}
        ],
        "outputs": [{"name": "logits", "parameters": {"binary_data": binary}}],
    }
    head = orjson.dumps(content)
    extra = f"inference-header-content-length: {len(head)}\r\n"
    return post(head + pixels.tobytes(), model, extra=extra), network_input(pixels)


class _LightConnection(asyncio.Protocol):
    """A connection for one request at a time, with little overhead."""

    def __init__(self, load: "OpenLoad") -> None:
        self.load = load
        self.began = 0.0
        self.answer = b""
        self.size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def ask(self, began: float) -> None:
        """Send the request that was due at a moment."""
        self.began = began
        self.load.waiting += 1
        self.transport.write(self.load.sent)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if not self.size:
            end = self.answer.find(b"\r\n\r\n")
            if end < 0:
                return
            start = self.answer.index(b"content-length: ") + 16
            self.size = end + 4 + int(self.answer[start : self.answer.index(b"\r\n", start)])
        if len(self.answer) >= self.size:
            answer, self.answer, self.size = self.answer, b"", 0
            began, self.began = self.began, 0.0
            self.load.waiting -= 1
            self.load.record(self.load.classify(answer), began)
            self.load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.load.idle:
            self.load.idle.remove(self)
        if self.began:
            self.load.waiting -= 1
            self.load.record("lost", self.began)


class OpenLoad:
    """An open load: requests at times that do not depend on the answers.

    Args:
        address: host and port.
        sent: the request.
        right: the end of the correct answer.
    """

    def __init__(self, address: tuple[str, int], sent: bytes, right: bytes) -> None:
        self.address = address
        self.sent = sent
        self.right = right
        self.idle: list[_LightConnection] = []
        self.opened = 0
        self.waiting = 0
        self.seconds: dict[str, list[float]] = {}

    def classify(self, answer: bytes) -> str:
        status = answer[9:12].decode()
        if status == "200":
            return "200" if answer.endswith(self.right) else "wrong"
        return status if status != "503" or b"retry-after: 1" in answer else "503 alone"

    def record(self, outcome: str, began: float) -> None:
        now = asyncio.get_running_loop().time()
        self.seconds.setdefault(outcome, []).append(now - began)

    async def _connect_and_ask(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        self.opened += 1
        try:
            _, connection = await loop.create_connection(
                lambda: _LightConnection(self), *self.address
            )
        except OSError as error:
            self.record(f"unsent {error!r}", began)
        else:
            connection.ask(began)

    async def run(self, rate: float, seconds: float) -> None:
        """Send `rate` requests per second while users are left; wait for the answers."""
        loop = asyncio.get_running_loop()
        start, count = loop.time(), 0
        opening: set[asyncio.Task[None]] = set()
        while (now := loop.time()) - start < seconds:
            while (due := start + count / rate) <= now:
                count += 1
                if self.idle:
                    self.idle.pop().ask(due)
                elif self.waiting + len(opening) < USERS:
                    task = loop.create_task(self._connect_and_ask(due))
                    opening.add(task)
                    task.add_done_callback(opening.discard)
            await asyncio.sleep(0.001)
        async with asyncio.timeout(TIMEOUT):
            while self.waiting or opening:
                await asyncio.sleep(0.01)

    async def saturate(self, connections: int, seconds: float) -> float:
        """Keep a request open on each connection; return the answers per second."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for _ in range(connections):
            await self._connect_and_ask(loop.time())
        while loop.time() - start < seconds:
            while self.idle:
                self.idle.pop().ask(loop.time())
            await asyncio.sleep(0)
        rate = len(self.seconds["200"]) / (loop.time() - start)
        while self.waiting:
            await asyncio.sleep(0.01)
        return rate

    def summary(self) -> str:
        """Requests by outcome, with percentiles of their latency."""
        parts = []
        for outcome, seconds in sorted(self.seconds.items()):
            p50, p99, most = np.quantile(seconds, [0.5, 0.99, 1.0]) * 1e3
            parts.append(
                f"{outcome}: {len(seconds):,} (p50 {p50:.1f}, p99 {p99:.1f}, max {most:.1f} ms)"
            )
        return ", ".join(parts)

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self.idle):
            connection.transport.close()
