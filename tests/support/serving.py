"""Servers as a shell starts them, on models that the gate has passed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import requests

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE, Split, save_split
from mnist_batchnorm.core.paths import CHECKPOINT, TEST_SPLIT
from tests.support import commands

if TYPE_CHECKING:
    from tests.support.graphs import Network

HOST = "127.0.0.1"
TOKEN = "the-token-of-these-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
END = 30.0  # seconds for a server to end when told to; the machine may be busy


@cache
def network() -> "Network":
    """The network of the regression checkpoint."""
    from mnist_batchnorm.network.model import load_checkpoint  # imports torch
    from tests.support.graphs import REGRESSION, Network, arrays_of

    return Network(arrays_of(load_checkpoint(REGRESSION / "checkpoint.safetensors").model()))


def lay(folder: Path, served: "Network | None" = None) -> None:
    """Write what a server needs: the ONNX files of both networks and the gate's report on them."""
    from tests.support.finished import PASSED, write_parity

    folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder):
        served = served or network()
        served.write()
        served.write_plain()
        CHECKPOINT.write_bytes(served.state["linear3.bias"].tobytes())
        labels = np.arange(CLASSES, dtype=np.uint8)
        images = np.random.default_rng(0).integers(0, 256, (CLASSES, SIDE, SIDE), np.uint8)
        save_split(TEST_SPLIT, Split(images, labels, labels.astype(np.int32)))
        write_parity(Path(), PASSED)


class Server:
    """A running server.

    Attributes:
        process: the command.
        url: where it is reached.
    """

    def __init__(self, command: commands.Command) -> None:
        """Wait until it serves."""
        self._command = command
        self.process: subprocess.Popen[bytes] = command.process
        command.until(lambda _: bool(self.events("serving")))
        self.url: str = self.events("serving")[0]["url"]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return HOST, int(self.url.rpartition(":")[2])

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log so far; fails on a line that is not a JSON object."""
        whole, _, _ = self._command.err.rpartition("\n")
        lines = []
        for line in whole.split("\n") if whole else ():
            assert line.startswith("{"), whole
            lines.append(json.loads(line))
        return lines

    def events(self, name: str) -> list[dict[str, Any]]:
        """The logged events of one name."""
        return [line for line in self.log() if line["event"] == name]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(END)

    def memory(self) -> int:
        """Resident bytes of the server and its workers."""
        resident = 0
        for process in self._command.processes():
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            (line,) = (line for line in lines if line.startswith("VmRSS:"))
            resident += int(line.split()[1]) << 10
        return resident


@contextmanager
def running(
    *arguments: str, folder: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start ``mnist-bn serve`` on a free port; leave nothing of it behind.

    Args:
        arguments: of the command; ``--port 0`` unless they name one.
        folder: where it is started; `lay` fills it.
        env: what its environment has besides this process's.
    """
    port = () if "--port" in arguments else ("--port", "0")
    words = ("mnist-bn", "serve", *port, *arguments)
    environment = commands.environment(**(env or {}))
    with commands.running(folder, *words, env=environment) as command:
        server = Server(command)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                with suppress(subprocess.TimeoutExpired):  # then it is killed
                    server.stop(signal.SIGINT)


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


def counted(server: Server, name: str, **labels: str) -> float:
    """The sum of what /metrics says under a name."""
    lines = requests.get(f"{server.url}/metrics", headers=BEARER, timeout=60).text.splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name and all(one in line for one in wanted)
    )
