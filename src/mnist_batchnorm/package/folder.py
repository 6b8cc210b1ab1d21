"""Replace a folder atomically, and only if it holds a package."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, fsync, write_json

MANIFEST = "manifest.json"  # marks a folder as a package, and lists its files


@contextlib.contextmanager
def replacing_folder(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a new folder that replaces ``directory`` unless the block raises.

    Its files are on disk (fsync) before the rename. Raises UserError as `require_replaceable`.
    """
    directory = directory.resolve()
    require_replaceable(directory, force=force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        require_replaceable(directory, force=force)  # again: the block may have taken a while
        _swap(temporary, directory)
        fsync(directory.parent)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def require_replaceable(directory: Path, *, force: bool) -> None:
    """Raise UserError unless a folder is absent, empty, or with ``force`` a package."""
    if Path.cwd().is_relative_to(directory.resolve()):
        raise UserError(f"{directory} is the current folder or above it; name another one")
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; name another place")
    if not any(directory.iterdir()):
        return
    if not is_package(directory):
        raise UserError(
            f"{directory} holds something else than a package of this command, which --force would "
            "delete too; name another folder, or empty it yourself"
        )
    if not force:
        raise UserError(f"{directory} holds a package already; replace it with --force")


def is_package(directory: Path) -> bool:
    """Whether a folder holds a package and nothing else."""
    try:
        listed = set(json.loads((directory / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    present = {path.relative_to(directory).as_posix() for path in _files(directory)}
    return present - {MANIFEST} <= listed


def write_manifest(directory: Path, content: dict[str, object]) -> None:
    """Write the manifest: ``content`` and the SHA-256 of each file."""
    files = {path.relative_to(directory).as_posix(): digest(path) for path in _files(directory)}
    write_json(directory / MANIFEST, {**content, "files": files})


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if not path.is_dir())


def _swap(new: Path, directory: Path) -> None:
    if not directory.exists():
        new.rename(directory)
        return
    old = new.with_suffix(".old.tmp")
    directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old)
