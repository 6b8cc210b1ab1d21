"""The part of requirements.lock that an image installs, with versions and hashes."""

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mnist_batchnorm.core.errors import UserError

COMMENT = re.compile(r"\s*(#|$)")  # or an empty line
ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s\\;]+)")


def closure(names: Iterable[str]) -> set[str]:
    """Return the canonical names of distributions and all their requirements on this machine."""
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            declared = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed; run `make setup`") from None
        pending += [
            requirement.name
            for requirement in map(Requirement, declared)
            # without extras
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return needed


@dataclass(frozen=True)
class Pin:
    """A version in the lock, and its entry with hashes and marker but without comments."""

    version: str
    text: str


def locked(lock: Path, names: Iterable[str]) -> dict[str, list[Pin]]:
    """Return the lock's entries of distributions and all their requirements.

    Raises:
        UserError: The lock is missing or unreadable, or lacks one.
    """
    try:
        text = lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"no {lock} in {Path.cwd()}; run this in the folder that holds dvc.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{lock} cannot be read: {error}") from None
    entries: dict[str, list[Pin]] = {}
    for block in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if entry := ENTRY.match(block):
            lines = [line for line in block.splitlines() if not COMMENT.match(line)]
            pin = Pin(entry[2], "\n".join([*lines, ""]))
            entries.setdefault(canonicalize_name(entry[1]), []).append(pin)
    needed = sorted(closure(names))
    if missing := [name for name in needed if name not in entries]:
        raise UserError(f"{lock} lacks {', '.join(missing)}; run `make lock`")
    return {name: entries[name] for name in needed}
