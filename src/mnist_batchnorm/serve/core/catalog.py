"""What is served: for each name its versions, and where new ones come from."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import format_exc
from types import MappingProxyType
from typing import Protocol

from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.paths import REGISTRY
from mnist_batchnorm.serve.core import models
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import SHORT, Model

State = tuple[object, ...]


class Source(Protocol):
    """Where a model comes from."""

    @property
    def name(self) -> str:
        """That its model is served as."""
        ...

    def state(self) -> State:
        """Return what differs as soon as the model may have changed; cheap."""
        ...

    def load(self) -> Model:
        """Load and check the model.

        Raises:
            UserError: There is none.
            CheckFailedError: It is not fit to be served.
        """
        ...


@dataclass(frozen=True)
class FileSource:
    """An ONNX file with the gate's report.

    Attributes:
        name: that it is served as.
        onnx: the file.
        parity: the report.
        allow_unverified: serve it whatever the report says.
    """

    name: str
    onnx: Path
    parity: Path
    allow_unverified: bool = False

    def state(self) -> State:
        """Return what identifies the present content of the files, as far as `stat` sees it."""
        return tuple(stamp(path) for path in (self.onnx, self.parity, REGISTRY))

    def load(self) -> Model:
        """Load the file as it is now; see `models.load`."""
        return models.load(
            self.name, self.onnx, self.parity, allow_unverified=self.allow_unverified
        )


def stamp(path: Path) -> State:
    """Return what differs as soon as a file does, as far as `stat` sees it."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass
class Slot:
    """A source and what is served from it.

    Attributes:
        source: where it comes from.
        model: that is served; None: none yet.
        seen: the source's state when it was last looked at.
        problem: why that state is not served; None: it is.
    """

    source: Source
    model: Model | None = None
    seen: State | None = None
    problem: str | None = None


@dataclass
class Catalog:
    """All models of a server.

    A request sees the whole as it was at one moment: `publish` replaces it at once, and whoever
    holds a model keeps it.

    Attributes:
        sources: in order; the first of a name is its default version.
        metrics: told of what is loaded and served.
        unloaded: names that are not served although there are sources.
    """

    sources: Sequence[Source]
    metrics: Metrics
    unloaded: frozenset[str] = frozenset()
    on_publish: Callable[[], None] = lambda: None
    _slots: list[Slot] = field(init=False)
    _one_at_a_time: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _served: Mapping[str, Mapping[str, Model]] = field(
        init=False, default_factory=lambda: MappingProxyType({})
    )

    def __post_init__(self) -> None:
        self._slots = [Slot(source) for source in self.sources]

    def find(self, name: str, version: str | None = None) -> Model | None:
        """Return a model, of its default version unless another is named; None: not served."""
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
    def slots(self) -> Sequence[Slot]:
        """The sources with what is served from each."""
        return tuple(self._slots)

    @property
    def names(self) -> list[str]:
        """All names, served now or not."""
        return list(dict.fromkeys(source.name for source in self.sources))

    @property
    def ready(self) -> bool:
        """Whether everything that should be served is."""
        return all(slot.model or slot.source.name in self.unloaded for slot in self._slots)

    def load(self) -> None:
        """Load all models but those that are unloaded, before anything is served.

        Raises:
            UserError: One is missing or is no model.
            CheckFailedError: One is not fit to be served, or would hide another.
        """
        for slot in self._slots:
            if slot.source.name not in self.unloaded:
                slot.seen = slot.source.state()
                slot.model = self._load(slot)
        self.publish()

    def unload(self, names: frozenset[str]) -> None:
        """Serve these no longer, and all others."""
        self.unloaded = names
        for slot in self._slots:
            if slot.source.name in names:
                slot.model = slot.seen = slot.problem = None
        self.publish()

    def _load(self, slot: Slot) -> Model:
        model = slot.source.load()
        for other in self._slots:
            if other is slot or other.model is None:
                continue
            theirs = other.model
            same = (theirs.name, theirs.version) == (model.name, model.version)
            if same and theirs.sha256 != model.sha256:
                raise CheckFailedError(
                    f"{model.name} has two files of version {model.version}, SHA-256 "
                    f"{theirs.sha256[:SHORT]}… and {model.sha256[:SHORT]}…; serve one under "
                    "another name"
                )
        return model

    async def refresh(self, name: str | None = None) -> None:
        """Look at the sources, of one name or all, and serve what they hold by now.

        What is not fit to be served is refused, and the model before it goes on. What fails in
        another way is logged, and keeps no other model from being served.

        Args:
            name: look at these even if nothing seems to have changed.
        """
        async with self._one_at_a_time:
            changed = False
            try:
                for slot in self._slots:
                    if slot.source.name == name or (
                        name is None and slot.source.name not in self.unloaded
                    ):
                        changed |= await self._look(slot, anew=name is not None)
            finally:
                if changed:
                    self.publish()

    async def _look(self, slot: Slot, *, anew: bool) -> bool:
        """Take what a source holds, if that may have changed; tell whether another is served."""
        try:
            state = slot.source.state()
            if state == slot.seen and not anew:
                return False
            changed = await self._try(slot)
        except Exception as error:  # noqa: BLE001 - a bug, which is this model's affair only
            name, problem = slot.source.name, f"it could not be loaded: {error!r}"
            if slot.problem != problem:  # it is tried again at each look, and told of once
                log("failed", "error", model=name, why=repr(error), traceback=format_exc())
                self.metrics.swapped(name, "refused")
            slot.problem = problem
            return False
        slot.seen = state
        return changed

    async def _try(self, slot: Slot) -> bool:
        source, before = slot.source, slot.model
        try:
            model = await asyncio.to_thread(self._load, slot)
        except (UserError, CheckFailedError) as error:
            slot.problem = str(error)
            kept = before and before.version
            log("refused", "error", model=source.name, why=slot.problem, still_serving=kept)
            self.metrics.swapped(source.name, "refused")
            return False
        slot.problem = None
        if before and model.identity == before.identity:
            return False
        slot.model = model
        self.metrics.swapped(source.name, "loaded")
        return True

    def publish(self) -> None:
        """Serve what the sources last gave, all at once."""
        before = {model.identity: model for model in self}
        served: dict[str, dict[str, Model]] = {}
        for slot in self._slots:
            if slot.model and slot.source.name not in self.unloaded:
                served.setdefault(slot.source.name, {}).setdefault(slot.model.version, slot.model)
        self._served = MappingProxyType(served)
        now = {model.identity: model for model in self}
        for key, model in before.items():
            if key not in now:
                self._note(model, served=False)
        for key, model in now.items():
            if key not in before:
                self._note(model, served=True)
        self.on_publish()

    def _note(self, model: Model, *, served: bool) -> None:
        self.metrics.served(model.name, model.version, model.sha256, model.verified, served)
        fields = {"model": model.name, "version": model.version, "sha256": model.sha256}
        if served and model.unproven:
            log("unverified", "warning", **fields, why=model.unproven)
        else:
            log("served" if served else "retired", **fields)
