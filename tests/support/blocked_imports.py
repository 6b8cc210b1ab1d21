"""Run Python as if only the core install and some extras were there."""

import os
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@cache
def owners() -> dict[str, set[str]]:
    """Canonical names of the distributions that install each top-level module."""
    return {
        module: {canonicalize_name(name) for name in names}
        for module, names in packages_distributions().items()
    }


def declared(extra: str | None) -> list[Requirement]:
    """The direct requirements of an extra, or of the core (None), with nested extras expanded."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    requirements = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            requirements += [inner for name in requirement.extras for inner in declared(name)]
        else:
            requirements.append(requirement)
    return requirements


def installed_by(*extras: str) -> set[str]:
    """The distributions that pip would install, by canonical name."""
    pending = [*declared(None), *(item for extra in extras for item in declared(extra))]
    found: set[str] = set()
    seen: set[str] = set()
    while pending:
        requirement = pending.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        try:
            needs = map(Requirement, distribution(requirement.name).requires or [])
        except PackageNotFoundError:  # for another platform
            continue
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        pending += [
            need
            for need in needs
            if need.marker is None or any(map(need.marker.evaluate, environments))
        ]
    return found


def run_with_extras(extras: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that can import what the core install and the extras contain."""
    available = installed_by(*extras)
    blocked = {
        module
        for module, names in owners().items()
        if not names & available and module != PROJECT["name"].replace("-", "_")
    }
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked}{BLOCK}{code}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
