"""What every process of a server must do alike: load, unload, and look for new files."""

import asyncio
import time
from collections.abc import Mapping

from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.protocol import RequestError, busy, refuse, unauthorized
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import has_token
from mnist_batchnorm.serve.process.shared_state import Roll

PAUSE = 0.2  # seconds between looks at what the other processes were told
PATIENCE = 5.0  # seconds for all of them to do it
LOOK = 0.02  # seconds between looks at whether they have


class Control:
    """Brings a catalog to what was asked of any process of the server.

    Args:
        catalog: the models.
        roll: of the processes.
        watch: seconds between looks at the models' files; 0: never.
    """

    def __init__(self, catalog: Catalog, roll: Roll, watch: float) -> None:
        self.catalog = catalog
        self.roll = roll
        self.watch = watch
        self._done: dict[str, int] = {}  # name -> how many of its changes were made here
        self._one_at_a_time = asyncio.Lock()

    def start(self) -> None:
        """Load what is to be served, before anything is.

        Raises:
            UserError: A model is missing or is no model.
            CheckFailedError: One is not fit to be served.
        """
        self.roll.sign({}, serves=False)  # so that what is asked for from now on waits for us
        asked = self.roll.asked()
        self._done = {name: number for name, (number, _) in asked.items()}
        self.catalog.unloaded = frozenset(name for name, (_, loaded) in asked.items() if not loaded)
        self.catalog.load()

    def serve(self) -> None:
        """Tell the other processes that this one serves."""
        self.roll.sign(self._done, serves=True)

    def require(self, name: str) -> None:
        """Make sure that there is such a model, served now or not.

        Raises:
            RequestError: There is not.
        """
        if name not in self.catalog.names:
            known = ", ".join(self.catalog.names)
            raise RequestError(f"no model {name[:200]!r} here; there is {known}", 404, "model")

    async def load(self, name: str) -> str | None:
        """Serve a model again, or look at its file anew, in every process.

        Returns:
            Why what is there now is refused; None: it is served.

        Raises:
            RequestError: Not all processes have done it in time; they will.
        """
        await self._ask(name, loaded=True)
        slots = [slot for slot in self.catalog.slots if slot.source.name == name]
        problem = next((slot.problem for slot in slots if slot.problem), None)
        if not any(slot.model for slot in slots):
            await self._ask(name, loaded=False)  # it was unloaded, and so it stays
        return problem

    async def unload(self, name: str) -> None:
        """Serve a model no longer, in any process.

        Raises:
            RequestError: As `load`.
        """
        await self._ask(name, loaded=False)

    async def _ask(self, name: str, *, loaded: bool) -> None:
        number = await asyncio.to_thread(self.roll.ask, name, loaded=loaded)
        await self.follow()
        deadline = time.monotonic() + PATIENCE
        while self.roll.behind(name, number):
            if time.monotonic() > deadline:
                raise busy(f"not every process has done so after {PATIENCE:g} s; they will")
            await asyncio.sleep(LOOK)

    async def follow(self) -> None:
        """Do what any process was asked for and this one has not done."""
        async with self._one_at_a_time:
            asked = self.roll.asked()
            new = {name: n for name, (n, _) in asked.items() if n != self._done.get(name)}
            if not new:
                return
            unloaded = frozenset(name for name, (_, loaded) in asked.items() if not loaded)
            for name in new.keys() - unloaded:
                await self.catalog.refresh(name)
            self.catalog.unload(unloaded)
            self._done |= new
            await asyncio.to_thread(self.roll.sign, self._done, serves=True)

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
