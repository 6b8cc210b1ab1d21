"""The JSON-lines protocol between parents and children, with small programs as children."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.core.child import (
    MessageReader,
    MessageWriter,
    describe_exit,
    encode_message,
    start_child,
    stop_child,
)

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a program as the module ``toy``, which ``-P`` does not keep from being found."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    children = []

    def start(program: str, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        (tmp_path / "toy.py").write_text(f"import os, sys, time\n{program}")
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} | options
        children.append(start_child("toy", *arguments, **options))
        return children[-1]

    yield start
    for child in children:
        stop_child(child)
        if child.stdout:
            child.stdout.close()


def messages(child: "subprocess.Popen[bytes]") -> list[Any]:
    """All messages of a child."""
    assert child.stdout
    return [message for batch in MessageReader(child.stdout.fileno()) for message in batch]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        with contextlib.suppress(OSError):  # closed by the test
            os.close(descriptor)


SEND = "from mnist_batchnorm.core.child import messages_to_parent\n"


def test_child_sends_messages_apart_from_what_it_prints(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    program = f"""{SEND}
with messages_to_parent() as send:
    print("from Python", flush=True)
    os.write(1, b"from C\\n")
    send({{"variant": sys.argv[1], "value": 0.1}})
    send(None)
"""
    assert messages(start(program, "bn")) == [{"variant": "bn", "value": 0.1}, None]
    assert capfd.readouterr().err == "from Python\nfrom C\n"


def test_child_gets_no_secret_and_a_session_of_its_own(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_BN_TOKEN", "secret-of-the-server")
    monkeypatch.setenv("MNIST_BN_KEY_PASSWORD", "secret-of-the-key")
    monkeypatch.setenv("OTHER", "kept")
    program = f"{SEND}with messages_to_parent() as send: send([dict(os.environ), os.getsid(0)])"
    child = start(program)
    ((environment, session),) = messages(child)
    assert environment["OTHER"] == "kept"
    assert not [value for value in environment.values() if value.startswith("secret-")]
    assert session == child.pid != os.getsid(0)


def test_working_directory_is_not_imported_from(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "shadow.py").write_text("")
    monkeypatch.chdir(folder)
    assert start("import shadow").wait() == 1


@pytest.mark.parametrize("shown", [False, True])
def test_warnings_are_shown_on_request(
    start: Start, capfd: pytest.CaptureFixture[str], shown: bool
) -> None:
    start("import warnings; warnings.warn('beware', stacklevel=1)", warnings=shown).wait()
    assert ("beware" in capfd.readouterr().err) == shown


def test_lines_arrive_whole_however_they_are_cut(pipe: tuple[int, int]) -> None:
    reader, writer = MessageReader(pipe[0]), pipe[1]
    text = encode_message({"epoch": 1}) + encode_message("zwölf")
    received = []
    for byte in text:
        os.write(writer, bytes([byte]))
        received.append(reader.read())
    os.write(writer, b'{"cut off": ')
    os.close(writer)
    assert [batch for batch in received if batch] == [[{"epoch": 1}], ["zwölf"]]
    assert list(reader) == []
    assert reader.read() is None


def test_iteration_waits_for_the_first_message(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], encode_message(1) + encode_message(2) + b"3")
    os.close(pipe[1])
    assert list(MessageReader(pipe[0])) == [[1, 2]]


def test_writer_neither_waits_for_a_slow_reader_nor_loses_a_message(pipe: tuple[int, int]) -> None:
    writer = MessageWriter(pipe[1])
    start = time.monotonic()
    for number in range(20_000):  # more than a pipe holds
        writer.send({"number": number})
    assert not writer.flush()
    assert time.monotonic() - start < 5
    reader = MessageReader(pipe[0])
    received: list[Any] = []
    while len(received) < 20_000:
        received += reader.read() or []
        writer.flush()
    assert [message["number"] for message in received] == list(range(20_000))
    assert writer.flush()


def test_writer_survives_its_reader(pipe: tuple[int, int]) -> None:
    writer = MessageWriter(pipe[1])
    os.close(pipe[0])
    writer.send("nobody reads this")
    assert writer.flush()


def test_child_that_ends_with_its_pipe_has_its_own_status(start: Start) -> None:
    assert stop_child(start("sys.stdin.read(); sys.exit(3)"), 30.0) == 3


def test_child_that_ignores_its_pipe_is_killed(start: Start) -> None:
    child = start(f"{SEND}with messages_to_parent() as send: send('up'); time.sleep(60)")
    assert child.stdout
    assert next(iter(MessageReader(child.stdout.fileno()))) == ["up"]
    begin = time.monotonic()
    assert stop_child(child, 0.2) == -signal.SIGKILL
    assert 0.2 <= time.monotonic() - begin < 10


def test_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(OSError, match="/nonexistent/python"):
        start_child("toy")


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (-signal.SIGSEGV, "was ended by SIGSEGV"),
        (-signal.SIGKILL, "was ended by SIGKILL, as the system does when memory runs out"),
    ],
)
def test_exit_status_in_words(status: int, text: str) -> None:
    assert describe_exit(status) == text
