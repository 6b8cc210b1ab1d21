"""The served models: versions by name, and the sources that new versions come from."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exc
from typing import Protocol

from mnist_batchnorm.artifacts.parity_report import HASH_DIGITS
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import REGISTRY
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model

State = tuple[object, ...]


class Source(Protocol):
    """The origin of a model: a file, or a version in MLflow's registry."""

    @property
    def name(self) -> str: ...

    def state(self) -> State:
        """Return a value that differs as soon as the model may have changed; cheap."""
        ...

    def load(self) -> Model:
        """Return the model; UserError: there is none, CheckFailedError: it is not proven."""
        ...


@dataclass(frozen=True)
class FileSource:
    """An ONNX file with the gate's report."""

    name: str
    onnx: Path
    parity: Path
    allow_unverified: bool = False

    def state(self) -> State:
        return tuple(stamp(path) for path in (self.onnx, self.parity, REGISTRY))

    def load(self) -> Model:
        return models.load(
            self.name, self.onnx, self.parity, allow_unverified=self.allow_unverified
        )


def stamp(path: Path) -> State:
    """Return a value that differs as soon as `stat` sees a change of the file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


@dataclass
class Slot:
    """A source and the model that is served from it."""

    source: Source
    model: Model | None = None
    seen: State | None = None  # the source's state at the last check
    problem: str | None = None  # why that state is not served


class Catalog:
    """All models of a server, which `publish` replaces atomically; a model in use stays usable.

    Attributes:
        slots: the sources; the first of a name is its default version.
        unloaded: names that are not served.
    """

    def __init__(self, sources: Sequence[Source], metrics: Metrics) -> None:
        self.slots = [Slot(source) for source in sources]
        self.metrics = metrics
        self.unloaded: frozenset[str] = frozenset()
        self.on_publish: Callable[[], None] = lambda: None
        self._one_at_a_time = asyncio.Lock()
        self._served: Mapping[str, Mapping[str, Model]] = {}

    def find(self, name: str, version: str | None = None) -> Model | None:
        """Return a served model, by default its default version; None: not served."""
        versions = self._served.get(name, {})
        if version is None:
            return next(iter(versions.values()), None)
        return versions.get(version)

    def __iter__(self) -> Iterator[Model]:
        for versions in self._served.values():
            yield from versions.values()

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are served, the default first."""
        return list(self._served.get(name, ()))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(slot.source.name for slot in self.slots))

    @property
    def ready(self) -> bool:
        """Whether all models that should be served are."""
        return all(slot.model or slot.source.name in self.unloaded for slot in self.slots)

    def load(self) -> None:
        """Load all models except for the unloaded ones, before the server starts.

        Raises what `Source.load` raises, and CheckFailedError for two files of one version.
        """
        for slot in self.slots:
            if slot.source.name not in self.unloaded:
                slot.seen = slot.source.state()
                slot.model = self._load(slot)
        self.publish()

    def unload(self, names: frozenset[str]) -> None:
        """Unload these models, and serve all others."""
        self.unloaded = names
        for slot in self.slots:
            if slot.source.name in names:
                slot.model = slot.seen = slot.problem = None
        self.publish()

    def _load(self, slot: Slot) -> Model:
        model = slot.source.load()
        for other in self.slots:
            theirs = other.model
            if other is slot or theirs is None or theirs.sha256 == model.sha256:
                continue
            if (theirs.name, theirs.version) == (model.name, model.version):
                raise CheckFailedError(
                    f"{model.name} has two files of version {model.version}, SHA-256 "
                    f"{theirs.sha256[:HASH_DIGITS]}… and {model.sha256[:HASH_DIGITS]}…; serve one "
                    "under another name"
                )
        return model

    async def refresh(self, name: str | None = None) -> None:
        """Load the sources that have changed, or those of a name, and serve their models.

        A model that is not proven is refused, and the previous one stays. Any other failure is
        logged and does not affect other models.
        """
        async with self._one_at_a_time:
            changed = False
            try:
                for slot in self.slots:
                    source_name = slot.source.name
                    if source_name == name or (name is None and source_name not in self.unloaded):
                        changed |= await self._check(slot, force=name is not None)
            finally:
                if changed:
                    self.publish()

    async def _check(self, slot: Slot, *, force: bool) -> bool:
        try:
            state = slot.source.state()
            if state == slot.seen and not force:
                return False
            changed = await self._reload(slot)
        except Exception as error:  # noqa: BLE001 - a bug, which must not affect other models
            name, problem = slot.source.name, f"it could not be loaded: {error!r}"
            if slot.problem != problem:  # each check tries again; it is logged once
                log("failed", "error", model=name, why=repr(error), traceback=format_exc())
                self.metrics.swapped(name, "refused")
            slot.problem = problem
            return False
        slot.seen = state
        return changed

    async def _reload(self, slot: Slot) -> bool:
        source, previous = slot.source, slot.model
        try:
            model = await asyncio.to_thread(self._load, slot)
        except (UserError, CheckFailedError) as error:
            slot.problem = str(error)
            version = previous and previous.version
            log("refused", "error", model=source.name, why=slot.problem, still_serving=version)
            self.metrics.swapped(source.name, "refused")
            return False
        slot.problem = None
        if previous and model.identity == previous.identity:
            return False
        slot.model = model
        self.metrics.swapped(source.name, "loaded")
        return True

    def publish(self) -> None:
        """Serve the last model of each source; atomic."""
        before = {model.identity: model for model in self}
        served: dict[str, dict[str, Model]] = {}
        for slot in self.slots:
            if slot.model and slot.source.name not in self.unloaded:
                served.setdefault(slot.source.name, {}).setdefault(slot.model.version, slot.model)
        self._served = served
        now = {model.identity: model for model in self}
        for identity, model in (before | now).items():
            if (identity in before) != (identity in now):
                self._log_change(model, served=identity in now)
        self.on_publish()

    def _log_change(self, model: Model, *, served: bool) -> None:
        self.metrics.served(model.name, model.version, model.sha256, model.verified, served)
        fields = {"model": model.name, "version": model.version, "sha256": model.sha256}
        if served and model.unproven:
            log("unverified", "warning", **fields, why=model.unproven)
        else:
            log("served" if served else "retired", **fields)
