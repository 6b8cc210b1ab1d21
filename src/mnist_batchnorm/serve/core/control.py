"""Load, unload and refresh models in every process of a server."""

import asyncio
import time
from collections.abc import Mapping

from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.protocol import RequestError, refuse, unavailable
from mnist_batchnorm.serve.core.shared_state import Changes, SharedState

POLL_INTERVAL_S = 0.2  # between checks for changes that other processes received
CONFIRMATION_TIMEOUT_S = 5.0  # for all processes to apply a change
CONFIRMATION_POLL_S = 0.02


class Control:
    """Applies the changes that any process of the server received to this process's catalog.

    Every `watch` seconds, unless that is 0, it checks for changed files.
    """

    def __init__(self, catalog: Catalog, state: SharedState, watch: float) -> None:
        self.catalog = catalog
        self.state = state
        self.watch = watch
        self._done: dict[str, int] = {}  # name -> number of the last applied change
        self._one_at_a_time = asyncio.Lock()

    def start(self) -> None:
        """Load the models before the server starts; raises what `Catalog.load` raises."""
        self.state.publish({}, serves=False)  # later changes wait for this process
        changes = self.state.requested()
        self._done = {name: number for name, (number, _) in changes.items()}
        self.catalog.unloaded = _unloaded(changes)
        self.catalog.load()

    def serve(self) -> None:
        """Report to the other processes that this one serves."""
        self.state.publish(self._done, serves=True)

    def require(self, name: str) -> None:
        """Raise RequestError unless the server has such a model, loaded or not."""
        if name not in self.catalog.names:
            known = ", ".join(self.catalog.names)
            raise RequestError(f"no model {name[:200]!r} here; there is {known}", 404, "model")

    async def load(self, name: str) -> str | None:
        """Load a model, or reload its file, in every process; return why the file is refused.

        Raises RequestError if a process does not apply the change in time; it will later.
        """
        await self._change(name, loaded=True)
        slots = [slot for slot in self.catalog.slots if slot.source.name == name]
        problem = next((slot.problem for slot in slots if slot.problem), None)
        if not any(slot.model for slot in slots):
            await self._change(name, loaded=False)  # it was unloaded, and stays so
        return problem

    async def unload(self, name: str) -> None:
        """Unload a model in every process; raises as `load`."""
        await self._change(name, loaded=False)

    async def _change(self, name: str, *, loaded: bool) -> None:
        number = await asyncio.to_thread(self.state.request, name, loaded=loaded)
        await self.apply_changes()
        deadline = time.monotonic() + CONFIRMATION_TIMEOUT_S
        while self.state.lagging(name, number):
            if time.monotonic() > deadline:
                raise unavailable(
                    f"not every process has done so after {CONFIRMATION_TIMEOUT_S:g} s; they will"
                )
            await asyncio.sleep(CONFIRMATION_POLL_S)

    async def apply_changes(self) -> None:
        """Apply the changes that any process received and this one has not applied."""
        async with self._one_at_a_time:
            changes = self.state.requested()
            new = {name: n for name, (n, _) in changes.items() if n != self._done.get(name)}
            if not new:
                return
            unloaded = _unloaded(changes)
            for name in new.keys() - unloaded:
                await self.catalog.refresh(name)
            self.catalog.unload(unloaded)
            self._done |= new
            await asyncio.to_thread(self.state.publish, self._done, serves=True)

    async def run(self) -> None:
        """Apply changes and refresh changed files until cancelled."""
        refreshed = time.monotonic()
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            try:
                await self.apply_changes()
                if self.watch and time.monotonic() - refreshed >= self.watch:
                    refreshed = time.monotonic()
                    await self.catalog.refresh()
            except Exception as error:  # noqa: BLE001 - the loaded models are served on
                log("failed", "error", doing="look for new models", why=repr(error))


def _unloaded(changes: Changes) -> frozenset[str]:
    return frozenset(name for name, (_, loaded) in changes.items() if not loaded)


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Raise RequestError for parameters that would change a model of the command line."""
    if unknown := parameters.keys() - {"unload_dependents"}:
        expected = "none: models come from the command line"
        refuse("parameters", ", ".join(sorted(unknown)), expected)
    for key, value in parameters.items():
        if not isinstance(value, bool):
            refuse(f"parameters.{key}", value, "true or false")
