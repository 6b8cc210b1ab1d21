import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from dvc_data.hashfile.hash import file_md5
from dvc_objects.fs.local import LocalFileSystem

from mnist_batchnorm.core.files import (
    digest,
    discard,
    replacing,
    write_bytes,
    write_json,
    write_text,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that holds an earlier output, alone in its folder."""
    path = tmp_path / "output"
    path.write_bytes(b"old")
    return path


def untouched(path: Path) -> bool:
    return path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_new_content_replaces_old(path: Path) -> None:
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_folders_are_made(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a/b/output", b"new")
    assert (tmp_path / "a/b/output").read_bytes() == b"new"


@pytest.mark.parametrize(
    "failure", [ValueError("bug"), OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()]
)
def test_failure_while_writing_leaves_the_old_file_alone(
    path: Path, failure: BaseException
) -> None:
    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of the ne")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert untouched(path)


def test_disk_that_takes_only_a_part_leaves_the_old_file_alone(path: Path, small_disk: int) -> None:
    with pytest.raises(OSError, match="too large"):
        write_bytes(path, bytes(small_disk + 1))
    assert untouched(path)


def test_content_that_is_no_json_leaves_the_old_file_alone(path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert untouched(path)


def test_killed_writer_leaves_the_old_file(path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mnist_batchnorm.core.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half of the ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_discarding_removes_what_a_killed_writer_left_and_nothing_else(path: Path) -> None:
    beside = [".output.0123456789abcdef.tmp", ".output.fedcba9876543210.tmp"]
    others = [".output2.0123456789abcdef.tmp", ".output", "output.tmp", "other"]
    for name in [*beside, *others]:
        (path.parent / name).write_bytes(b"half")
    discard(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(others)
    discard(path)  # there is nothing left to do
    discard(path.parent / "no folder/output")


def test_discarding_takes_names_literally(tmp_path: Path) -> None:
    (tmp_path / ".a1.0123456789abcdef.tmp").write_bytes(b"another's")
    discard(tmp_path / "a[0-9]")
    assert (tmp_path / ".a1.0123456789abcdef.tmp").exists()


def test_concurrent_writers_never_show_a_mixture(path: Path) -> None:
    size = 1 << 20
    contents = [bytes([letter]) * size for letter in b"abcd"]
    path.write_bytes(contents[0])

    def write(content: bytes) -> None:
        for _ in range(5):
            write_bytes(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(path.read_bytes())
    for writer in writers:
        writer.join()
    assert seen
    assert all(content in contents for content in seen)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_are_what_the_umask_gives(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(path) as temporary:
            temporary.unlink()  # some writers put a file of their own there
            temporary.touch(mode=0o600)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_into_a_cache_are_replaced_not_written_through(tmp_path: Path, link: Any) -> None:
    cached = tmp_path / "cached"
    cached.write_bytes(b"old")
    cached.chmod(0o444)  # as DVC protects its cache
    path = tmp_path / "output"
    link(path, cached)
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert cached.read_bytes() == b"old"


def test_text_is_utf8_with_lf(path: Path) -> None:
    write_text(path, "é\nsigma² ≤ 1\n")
    assert path.read_bytes() == b"\xc3\xa9\nsigma\xc2\xb2 \xe2\x89\xa4 1\n"


def test_json_keeps_order_and_reads_well_in_a_diff(path: Path) -> None:
    write_json(path, {"loss": 0.1, "accuracy": {"b": 1, "a": [1, 2]}})
    assert path.read_text() == (
        '{\n  "loss": 0.1,\n  "accuracy": {\n    "b": 1,\n    "a": [\n      1,\n      2\n    ]\n'
        "  }\n}\n"
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_json_number(path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"epochs": [{"loss": number}]})
    assert untouched(path)


def test_json_floats_come_back_exactly(path: Path) -> None:
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 0.13072677752919348]
    write_json(path, numbers)
    assert json.loads(path.read_text()) == numbers


@pytest.mark.parametrize("content", [b"", b"abc", b"a\r\nb\r\n", bytes(range(256)) * 10_000])
def test_digests(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert digest(path) == hashlib.sha256(content).hexdigest()
    assert digest(path, "md5") == file_md5(str(path), LocalFileSystem())  # type: ignore[no-untyped-call]
