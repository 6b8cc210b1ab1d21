"""What an image must install: a part of requirements.lock, with its versions and hashes."""

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mnist_batchnorm.core.errors import UserError

ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s\\;]+)")


def closure(names: Iterable[str]) -> set[str]:
    """Return these distributions and all that they need on this machine, by canonical name.

    Raises:
        UserError: One is not installed.
    """
    found: set[str] = set()
    pending = {canonicalize_name(name) for name in names}
    while pending:
        name = pending.pop()
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed; run `make setup`") from None
        wanted = (Requirement(need) for need in needs)
        pending |= {
            canonicalize_name(need.name)
            for need in wanted
            # an extra that nobody asked for: its marker is about a name other than ""
            if need.marker is None or need.marker.evaluate({"extra": ""})
        }
        pending -= found
    return found


@dataclass(frozen=True)
class Pin:
    """One line of the lock: a version, for some Python versions or platforms perhaps.

    Attributes:
        version: the version.
        text: the entry, hashes and marker included, comments not.
    """

    version: str
    text: str


def locked(lock: Path, names: Iterable[str]) -> dict[str, list[Pin]]:
    """Return the lock's entries of these distributions and of all that they need.

    Args:
        lock: as ``make lock`` writes it.
        names: of distributions.

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
            pin = Pin(entry[2], _without_comments(block))
            entries.setdefault(canonicalize_name(entry[1]), []).append(pin)
    needed = sorted(closure(names))
    if missing := [name for name in needed if name not in entries]:
        raise UserError(f"{lock} lacks {', '.join(missing)}; run `make lock`")
    return {name: entries[name] for name in needed}


def _without_comments(block: str) -> str:
    lines = [line for line in block.splitlines() if line and not line.lstrip().startswith("#")]
    return "\n".join(lines) + "\n"
