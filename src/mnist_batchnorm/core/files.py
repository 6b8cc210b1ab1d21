"""Files that are written atomically, and the hashes that identify them."""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_batchnorm.core.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends well.

    The new content is on disk (fsync) before the rename and the rename is on disk before the
    return, so a reader, a crash or a full disk sees the old file or the new one, never a part.
    If the block raises, the temporary file is removed and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # what the umask gives any new file
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)  # safetensors puts a file of mode 0600 in this one's place
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk; does nothing on Windows."""
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file, if it exists, and the temporary files of a killed `replacing`."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def read_output(path: Path, stage: str) -> bytes:
    """Read a file that a stage of the pipeline writes.

    Raises:
        UserError: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no {path}; run `dvc repro {stage}` first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` atomically as UTF-8 with LF line ends."""
    write_bytes(path, content.encode())


def write_csv(path: Path, columns: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows as CSV with LF line ends; floats keep all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, keys in their order; NaN and infinities are errors."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file; ``md5`` is the one that ``dvc.lock`` records."""
    with path.open("rb") as stream:
        return hashlib.file_digest(
            stream, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def hashes(paths: Sequence[Path], algorithm: str = "sha256") -> dict[str, str]:
    """Return the hash of each file by its path."""
    return {path.as_posix(): digest(path, algorithm) for path in paths}


def fingerprint(content: Mapping[str, object]) -> str:
    """Return the SHA-256 of JSON content, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
