"""Clients that ask a server again and again, and count what becomes of every request."""

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
from mnist_batchnorm.parity import runtime

Float32 = npt.NDArray[np.float32]
USERS = 3000  # of an open load, fewer than the connections that a server takes
TIMEOUT = 60.0  # seconds for an answer; the machine may be busy


def images(count: int, seed: int = 0) -> Float32:
    """Images whose every bit counts, float32 ``[count, 784]``."""
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
        """Whether the server says that it hangs up."""
        return self.headers.get("connection") == "close"


class LostError(Exception):
    """A request was sent, and its connection ended before its answer was whole."""


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
    """What became of the requests.

    Attributes:
        counts: requests by what became of them: what `Check` says of the answer, ``lost``, or
            ``unsent`` where there was no connection.
        losses: what happened to the lost ones.
    """

    counts: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


def logits_of(content: bytes, batch: Float32) -> bytes:
    """What an ONNX file gives in this process, bit for bit."""
    return runtime.load(content).run(batch).astype(np.float32).tobytes()


def checker(expected: Mapping[str, bytes]) -> Check:
    """Return what says of an answer from which version it is, or what is wrong with it.

    Args:
        expected: the bits of the logits of each version.
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
        """Ask until stopped or until the server takes no connection any more.

        Args:
            sent: the request.
            every: seconds between requests, on average.
            cut: bytes after which the request makes a pause; 0: none.
            pipelined: requests that are sent at once.
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
    """The version as which an ONNX file is served that is not registered."""
    return hashlib.sha256(content).hexdigest()[:12]


def prove(folder: Path, *contents: bytes) -> None:
    """Let the gate's report say that it has passed these files too."""
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
    """Put a file in the place of another at once."""
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    beside.replace(path)


def rows(count: int, model: str = "mnist-bn", *, binary: bool = True) -> tuple[bytes, Float32]:
    """A request of many images in little space, as raw pixels, and what the network is given.

    Args:
        count: images.
        model: that is asked.
        binary: whether the answer is to be as short.
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


class _Asker(asyncio.Protocol):
    """A connection for one request at a time, as light as can be."""

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
            told = self.answer.index(b"content-length: ") + 16
            self.size = end + 4 + int(self.answer[told : self.answer.index(b"\r\n", told)])
        if len(self.answer) >= self.size:
            answer, self.answer, self.size = self.answer, b"", 0
            began, self.began = self.began, 0.0
            self.load.waiting -= 1
            self.load.note(self.load.what(answer), began)
            self.load.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.load.idle:
            self.load.idle.remove(self)
        if self.began:
            self.load.waiting -= 1
            self.load.note("lost", self.began)


class OpenLoad:
    """Requests at moments that do not depend on the answers, as from many people.

    Args:
        address: host and port.
        sent: the request.
        right: the end of the right answer.
    """

    def __init__(self, address: tuple[str, int], sent: bytes, right: bytes) -> None:
        self.address = address
        self.sent = sent
        self.right = right
        self.idle: list[_Asker] = []
        self.opened = 0
        self.waiting = 0
        self.seconds: dict[str, list[float]] = {}

    def what(self, answer: bytes) -> str:
        """Say what an answer is."""
        status = answer[9:12].decode()
        if status == "200":
            return "200" if answer.endswith(self.right) else "wrong"
        return status if status != "503" or b"retry-after: 1" in answer else "503 alone"

    def note(self, what: str, began: float) -> None:
        """Count a request that is over."""
        now = asyncio.get_running_loop().time()
        self.seconds.setdefault(what, []).append(now - began)

    async def _ask_anew(self, began: float) -> None:
        loop = asyncio.get_running_loop()
        self.opened += 1
        try:
            _, asker = await loop.create_connection(lambda: _Asker(self), *self.address)
        except OSError as error:
            self.note(f"unsent {error!r}", began)
        else:
            asker.ask(began)

    async def run(self, rate: float, seconds: float) -> None:
        """Send so many requests a second while users are left; wait for the answers."""
        loop = asyncio.get_running_loop()
        start, count = loop.time(), 0
        opening: set[asyncio.Task[None]] = set()
        while (now := loop.time()) - start < seconds:
            while (due := start + count / rate) <= now:
                count += 1
                if self.idle:
                    self.idle.pop().ask(due)
                elif self.waiting + len(opening) < USERS:
                    task = loop.create_task(self._ask_anew(due))
                    opening.add(task)
                    task.add_done_callback(opening.discard)
            await asyncio.sleep(0.001)
        async with asyncio.timeout(TIMEOUT):
            while self.waiting or opening:
                await asyncio.sleep(0.01)

    async def saturate(self, connections: int, seconds: float) -> float:
        """Keep so many requests open; return how many were answered a second."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for _ in range(connections):
            await self._ask_anew(loop.time())
        while loop.time() - start < seconds:
            while self.idle:
                self.idle.pop().ask(loop.time())
            await asyncio.sleep(0)
        rate = len(self.seconds["200"]) / (loop.time() - start)
        while self.waiting:
            await asyncio.sleep(0.01)
        return rate

    def told(self) -> str:
        """Requests by what became of them, with the time that half of them and 99 % took."""
        parts = []
        for what, seconds in sorted(self.seconds.items()):
            p50, p99, most = np.quantile(seconds, [0.5, 0.99, 1.0]) * 1e3
            parts.append(
                f"{what}: {len(seconds):,} (p50 {p50:.1f}, p99 {p99:.1f}, max {most:.1f} ms)"
            )
        return ", ".join(parts)

    def close(self) -> None:
        """Hang up."""
        for asker in list(self.idle):
            asker.transport.close()
