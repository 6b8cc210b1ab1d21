"""Child processes that exchange JSON lines with their parent through pipes.

Three pairs use it: `training.processes` reads the events of its workers, `training.live` feeds
`mlflow_sync.live_child`, and `serve.registry.supervisor` sends `serve.registry.child` one request,
reads one answer, and ends it by closing the pipe.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

SECRETS = ("MNIST_BN_TOKEN", "MNIST_BN_KEY_PASSWORD")  # environment variables no child needs
CHUNK_BYTES = 1 << 16


def start_child(
    module: str,
    *arguments: str,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    warnings: bool = False,
) -> "subprocess.Popen[bytes]":
    """Run a module of the installed package in a session of its own.

    Ctrl-C in a terminal therefore reaches the parent alone, which stops its children.
    """
    options = ["-P"]  # whatever lies in the working directory is not imported
    if not warnings:
        options += ["-W", "ignore"]
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *options, "-m", module, *arguments],
        stdin=stdin,
        stdout=stdout,
        env={name: value for name, value in os.environ.items() if name not in SECRETS},
        bufsize=0,
        start_new_session=True,
    )


def stop_child(child: "subprocess.Popen[bytes]", grace_s: float = 0.0) -> int:
    """Close the child's standard input, kill it unless it ends in time, return its exit status."""
    try:
        if child.stdin:
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
    finally:
        child.kill()  # has no effect on a process that has ended
        child.wait()
    return child.returncode


def describe_exit(status: int) -> str:
    """Describe an exit status as the predicate of a sentence: ``was ended by SIGKILL``."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def encode_message(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


class MessageReader:
    """Reads JSON lines from a pipe; a line that the writer did not finish is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._partial = b""

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> list[Any] | None:
        """Wait for data; return the messages completed by it, None at the end of the pipe."""
        chunk = os.read(self._descriptor, CHUNK_BYTES)
        if not chunk:
            return None
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the messages of each `read` that completes some, until the end of the pipe."""
        return filter(None, iter(self.read, None))


class MessageWriter:
    """Writes JSON lines to a pipe without ever blocking or raising.

    What a full pipe does not accept is kept for the next call; what a dead reader cannot get is
    dropped, as its exit status will show.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unsent = b""
        os.set_blocking(descriptor, False)

    def send(self, message: object) -> None:
        """Write a message, or keep what the pipe does not accept now."""
        self._unsent += encode_message(message)
        self.flush()

    def flush(self) -> bool:
        """Write what the pipe accepts now; return whether nothing is left to write."""
        try:
            written = os.write(self._descriptor, self._unsent)
        except BlockingIOError:
            written = 0
        except BrokenPipeError:
            written = len(self._unsent)
        self._unsent = self._unsent[written:]
        return not self._unsent


@contextlib.contextmanager
def messages_to_parent() -> Iterator[Callable[[object], None]]:
    """In the child, yield a function that sends a message through standard output.

    Whatever else is printed there goes to standard error, even from a library's C code.

    Raises:
        BrokenPipeError: By the function; the parent has ended.
    """
    with os.fdopen(os.dup(1), "wb", buffering=0) as stream:
        os.dup2(2, 1)

        def send(message: object) -> None:
            stream.write(encode_message(message))

        yield send
