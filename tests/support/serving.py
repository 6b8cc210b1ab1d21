"""Servers as a shell starts them, on models that the gate has passed."""

import json
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE, Split, save_split
from mnist_batchnorm.core.paths import CHECKPOINT, TEST_SPLIT
from mnist_batchnorm.network.model import load_checkpoint
from tests.support import commands
from tests.support.finished import PASSED, write_parity
from tests.support.graphs import REGRESSION, Network, arrays_of

HOST = "127.0.0.1"
END = 30.0  # seconds for a server to end when told to; the machine may be busy
NETWORK = Network(arrays_of(load_checkpoint(REGRESSION / "checkpoint.safetensors").model()))


def lay(folder: Path, network: Network = NETWORK) -> None:
    """Write what a server needs: the ONNX files of both networks and the gate's verdict on them."""
    folder.mkdir(parents=True, exist_ok=True)
    with chdir(folder):
        network.write()
        network.write_plain()
        CHECKPOINT.write_bytes(network.state["linear3.bias"].tobytes())
        labels = np.arange(CLASSES, dtype=np.uint8)
        images = np.random.default_rng(0).integers(0, 256, (CLASSES, SIDE, SIDE), np.uint8)
        save_split(TEST_SPLIT, Split(images, labels, labels.astype(np.int32)))
        write_parity(Path(), PASSED)


class Server:
    """A server that runs.

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
        """What it has logged so far; fails on a line that is no JSON object."""
        whole, _, _ = self._command.err.rpartition("\n")
        lines = []
        for line in whole.split("\n") if whole else ():
            assert line.startswith("{"), whole
            lines.append(json.loads(line))
        return lines

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has logged so far under one name."""
        return [line for line in self.log() if line["event"] == name]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end; return its exit status once it has."""
        self.process.send_signal(number)
        return self.process.wait(END)

    def memory(self) -> int:
        """Bytes that it and its workers keep in memory."""
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
