"""Commands as a shell starts them, and every process that they start, however it is started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PATIENCE = 120.0  # seconds; the machine may be busy
MARK = "MNIST_BN_TEST"  # in the environment of a command and of all that it starts


def environment(**changed: str) -> dict[str, str]:
    """This process's variables without those that tell our commands something."""
    ours = ("DVC_", "MLFLOW_", "GIT_", "MNIST_", "TQDM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    scripts = Path(sys.executable).parent
    return kept | {"PATH": f"{scripts}{os.pathsep}{kept['PATH']}"} | changed


class Command:
    """A command in a process group of its own, a shell's job.

    Attributes:
        process: the command itself.
    """

    def __init__(
        self, folder: Path, *words: str, env: Mapping[str, str] | None = None, terminal: int = -1
    ) -> None:
        """Start it.

        Args:
            folder: where.
            words: the command line.
            env: its environment, by default `environment`.
            terminal: descriptor of one to show errors and progress on, instead of `err`.
        """
        self._mark = uuid.uuid4().hex
        self._err = folder.parent / f"{self._mark}.err"
        with self._err.open("wb") as err:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env={**(environment() if env is None else env), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err if terminal < 0 else terminal,
                start_new_session=True,
            )

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text(errors="replace")

    def until(self, condition: Callable[["Command"], bool]) -> None:
        """Wait for something that happens while it runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self):
            assert self.process.poll() is None, f"it ended too early:\n{self.err}"
            assert time.monotonic() < deadline, f"nothing yet:\n{self.err}"
            time.sleep(0.002)

    def wait(self) -> int:
        """Return its exit status."""
        return self.process.wait(PATIENCE)

    def processes(self, module: str = "") -> list[int]:
        """Ids of itself and all that it has started and that still run, or those of a module."""
        mark, found = f"{MARK}={self._mark}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if not module or module.encode() in words:
                        found.append(int(entry.name))
        return found

    def gone(self) -> bool:
        """Whether all of it ends by itself, soon."""
        deadline = time.monotonic() + 30
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """Kill it and all that it has started, as a power cut would."""
        while found := self.processes():
            kill(*found)
        self.process.wait()


def kill(*processes: int) -> None:
    """Send SIGKILL to processes that may have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def running(
    folder: Path, *words: str, env: Mapping[str, str] | None = None, terminal: int = -1
) -> Iterator[Command]:
    """Start a command; leave nothing of it behind."""
    command = Command(folder, *words, env=env, terminal=terminal)
    try:
        yield command
    finally:
        command.kill()


def run(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Return a command's exit status and what it wrote to standard error."""
    with running(folder, *words, env=env) as command:
        return command.wait(), command.err
