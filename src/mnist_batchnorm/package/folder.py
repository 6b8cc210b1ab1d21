"""A folder that is written whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.files import digest, fsync, write_json

MANIFEST = "manifest.json"  # what marks a folder as a package, and lists it


@contextlib.contextmanager
def replacing_folder(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``directory`` that takes its place when the block ends well.

    Its files are on disk (fsync) before the rename. If the block raises, the new folder is removed
    and ``directory`` is untouched.

    Args:
        directory: absent or empty; with ``force`` it may also hold a package.
        force: replace a package.

    Raises:
        UserError: ``directory`` is anything else, or the current folder or one above it.
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
    """Refuse to write where something would be lost.

    Raises:
        UserError: It would.
    """
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
    """Tell whether a folder holds a package and nothing else."""
    try:
        listed = set(json.loads((directory / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    there = {path.relative_to(directory).as_posix() for path in _files(directory)}
    return there - {MANIFEST} <= listed


def write_manifest(directory: Path, content: dict[str, object]) -> None:
    """Write what a package is, and the SHA-256 of all its files."""
    files = {path.relative_to(directory).as_posix(): digest(path) for path in _files(directory)}
    write_json(directory / MANIFEST, {**content, "files": files})


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if not path.is_dir())


def _swap(new: Path, directory: Path) -> None:
    """Put ``new`` in the place of ``directory``, which may be absent; at worst nothing changes."""
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
