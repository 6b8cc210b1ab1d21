"""Which models the processes of a server were asked to load or unload, and what each has done.

Kept as files, because any process can receive the request and every process must carry it out.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_batchnorm.core.files import write_json

CHANGES_FILE = "models.json"
LOCK_FILE = ".models.lock"

Changes = Mapping[str, tuple[int, bool]]  # model -> number of its last change, whether to serve it


class SharedState:
    """Changes requested of all processes of a server, and the progress of each process.

    A process has a file of its own from before it loads the first model until it has ended.
    """

    def __init__(self, folder: Path, pid: int | None = None) -> None:
        self._folder = folder
        self._own = self._path(pid or os.getpid())
        self._lock = FileLock(folder / LOCK_FILE)

    def _path(self, pid: int) -> Path:
        return self._folder / f"process-{pid}.json"

    def publish(self, done: Mapping[str, int], *, serves: bool) -> None:
        """Record the last change to each model that this process applied, and whether it serves."""
        write_json(self._own, {"serves": serves, "done": dict(done)})

    def serves(self, pid: int) -> bool:
        """Whether a process has started to serve."""
        return bool(_read(self._path(pid), {}).get("serves"))

    def remove(self, pid: int) -> None:
        """Delete the record of a process that has ended."""
        self._path(pid).unlink(missing_ok=True)

    def request(self, name: str, *, loaded: bool) -> int:
        """Request that all processes load or unload a model; return the number of this change."""
        with self._lock:
            changes = self.requested()
            number = changes.get(name, (0, True))[0] + 1
            write_json(self._folder / CHANGES_FILE, {**changes, name: (number, loaded)})
        return number

    def requested(self) -> Changes:
        """Return the last change requested for each model."""
        content = _read(self._folder / CHANGES_FILE, {})
        return {name: (number, loaded) for name, (number, loaded) in content.items()}

    def lagging(self, name: str, number: int) -> list[Path]:
        """Return the records of processes that have not applied change `number` to a model."""
        return [
            path
            for path in self._folder.glob("process-*.json")
            if _read(path, {"done": {name: number}})["done"].get(name, 0) < number
        ]


def _read(path: Path, missing: dict[str, Any]) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return missing
    return content
