"""What every process of a server must do alike: load, unload, and look for new files."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from mnist_batchnorm.files import write_json
from mnist_batchnorm.serve.app import has_token
from mnist_batchnorm.serve.catalog import Catalog
from mnist_batchnorm.serve.log import log
from mnist_batchnorm.serve.protocol import RequestError, refuse, unauthorized
from mnist_batchnorm.serve.settings import Settings

FILE = "models.json"
LOCK = ".models.lock"
PAUSE = 0.2  # seconds between looks at what the other processes were told


class Control:
    """Brings a catalog to what was asked of any process of the server.

    Args:
        catalog: the models.
        state: the folder that the processes share.
        watch: seconds between looks at the models' files; 0: never.
    """

    def __init__(self, catalog: Catalog, state: Path, watch: float) -> None:
        self.catalog = catalog
        self.watch = watch
        self._file = state / FILE
        self._lock = FileLock(state / LOCK)
        self._done: dict[str, int] = {}  # name -> how many of its changes were done here

    def require(self, name: str) -> None:
        """Make sure that there is such a model, served now or not.

        Raises:
            RequestError: There is not.
        """
        if name not in self.catalog.names:
            known = ", ".join(self.catalog.names)
            raise RequestError(f"no model {name[:200]!r} here; there is {known}", 404, "model")

    async def load(self, name: str) -> str | None:
        """Serve a model again, or look at its file anew.

        Returns:
            Why what is there now is refused; None: it is served.
        """
        self._tell(name, loaded=True)
        await self.follow()
        problems = [s.problem for s in self.catalog.slots if s.source.name == name and s.problem]
        return problems[0] if problems else None

    async def unload(self, name: str) -> None:
        """Serve a model no longer."""
        self._tell(name, loaded=False)
        await self.follow()

    def _tell(self, name: str, *, loaded: bool) -> None:
        with self._lock:
            asked = self._asked()
            changes, _ = asked.get(name, (0, True))
            write_json(self._file, {**asked, name: (changes + 1, loaded)})

    def _asked(self) -> dict[str, tuple[int, bool]]:
        try:
            asked = json.loads(self._file.read_bytes())
        except FileNotFoundError:
            return {}
        return {name: (changes, loaded) for name, (changes, loaded) in asked.items()}

    async def follow(self) -> None:
        """Do what any process was asked for and this one has not done."""
        asked = self._asked()
        new = {name: n for name, (n, _) in asked.items() if n != self._done.get(name)}
        if not new:
            return
        self._done |= new
        self.catalog.unloaded = frozenset(name for name, (_, loaded) in asked.items() if not loaded)
        self.catalog.publish()
        for name in new.keys() - self.catalog.unloaded:
            await self.catalog.refresh(name)

    async def run(self) -> None:
        """Follow the other processes and look at the files, until cancelled."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(PAUSE)
            try:
                await self.follow()
                if self.watch and time.monotonic() - looked >= self.watch:
                    looked = time.monotonic()
                    await self.catalog.refresh()
            except Exception as error:  # noqa: BLE001 - what is served goes on, whatever this was
                log("failed", "error", doing="look for new models", why=repr(error))


def allow_control(settings: Settings, head: dict[bytes, bytes]) -> None:
    """Make sure that whoever asks may load and unload models: nobody may without a token.

    Raises:
        RequestError: The server has no token, or the request does not bear it.
    """
    if not settings.token:
        raise RequestError(
            "loading and unloading need a token: start the server with --token-file", 403, "token"
        )
    if not has_token(head, settings.token.encode()):
        raise unauthorized()


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Refuse what would change a model that comes from the command line.

    Raises:
        RequestError: There is a parameter that is not known, or is none.
    """
    if unknown := parameters.keys() - {"unload_dependents"}:
        expected = "none: models come from the command line"
        refuse("parameters", ", ".join(sorted(unknown)), expected)
    for key, value in parameters.items():
        if not isinstance(value, bool):
            refuse(f"parameters.{key}", value, "true or false")
