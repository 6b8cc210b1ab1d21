"""The processes of a server, and what each was asked for and has done."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mnist_batchnorm.core.files import write_json

ASKED = "models.json"
LOCK = ".models.lock"

Asked = Mapping[str, tuple[int, bool]]  # name -> how many changes were asked for, and the last


class Roll:
    """What the processes of a server tell each other, as files.

    Each has one of its own, from before it loads the first model until it has ended.

    Args:
        folder: of the files.
        process: which one this is, by its id.
    """

    def __init__(self, folder: Path, process: int | None = None) -> None:
        self._folder = folder
        self._own = self._path(process or os.getpid())
        self._lock = FileLock(folder / LOCK)

    def _path(self, process: int) -> Path:
        return self._folder / f"process-{process}.json"

    def sign(self, done: Mapping[str, int], *, serves: bool) -> None:
        """Tell how many changes to each model this process has made, and whether it serves."""
        write_json(self._own, {"serves": serves, "done": dict(done)})

    def serves(self, process: int) -> bool:
        """Tell whether a process has come to serve."""
        return bool(_read(self._path(process), {}).get("serves"))

    def strike(self, process: int) -> None:
        """Take a process that has ended off the roll."""
        self._path(process).unlink(missing_ok=True)

    def ask(self, name: str, *, loaded: bool) -> int:
        """Ask all processes to serve a model or not to; return the number of this change."""
        with self._lock:
            asked = self.asked()
            number = asked.get(name, (0, True))[0] + 1
            write_json(self._folder / ASKED, {**asked, name: (number, loaded)})
        return number

    def asked(self) -> Asked:
        """Return what was asked for so far."""
        found = _read(self._folder / ASKED, {})
        return {name: (number, loaded) for name, (number, loaded) in found.items()}

    def behind(self, name: str, number: int) -> list[Path]:
        """Return who has not made a change yet."""
        return [
            path
            for path in self._folder.glob("process-*.json")
            if _read(path, {"done": {name: number}})["done"].get(name, 0) < number
        ]


def _read(path: Path, missing: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return missing
    return found
