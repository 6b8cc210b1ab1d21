"""Which versions a catalog serves, and how it reloads its sources."""

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import Float32


def run(images: Float32) -> Float32:
    return np.zeros((len(images), 10), np.float32)


OLD = Model("digits", "1", "a" * 64, None, None, run)
OTHER = replace(OLD, sha256="b" * 64)


@dataclass
class Given:
    """A source of whatever the test puts there."""

    model: Model
    name: str = "digits"

    def state(self) -> tuple[object, ...]:
        return self.model.identity

    def load(self) -> Model:
        return self.model


def test_two_files_of_one_version_are_an_error() -> None:
    first, second = OLD, OTHER
    with pytest.raises(CheckFailedError, match="digits has two files of version 1"):
        Catalog([Given(first), Given(second)], Metrics()).load()
    Catalog([Given(first), Given(first)], Metrics()).load()

    source = Given(replace(second, version="2"))
    catalog = Catalog([Given(first), source], Metrics())
    catalog.load()
    source.model = second
    asyncio.run(catalog.refresh())

    assert catalog.versions("digits") == ["1", "2"]
    assert "two files of version 1" in (catalog.slots[1].problem or "")


def test_an_unexpected_failure_does_not_affect_other_models(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    class Broken(Given):
        broken = False

        def load(self) -> Model:
            if self.broken:
                raise MemoryError("no room")
            return super().load()

    old = OLD
    names = "first", "broken", "last"
    _, broken, _ = sources = [Broken(replace(old, name=name), name) for name in names]
    catalog = Catalog(sources, Metrics())
    catalog.load()
    for source in sources:
        source.model = replace(source.model, version="new")
    broken.broken = True
    capsysbinary.readouterr()
    for _ in range(3):
        asyncio.run(catalog.refresh())

    assert [catalog.versions(name) for name in names] == [["new"], [old.version], ["new"]]
    assert catalog.slots[1].problem == "it could not be loaded: MemoryError('no room')"
    (failed,) = events(capsysbinary, "failed")
    assert (failed["model"], failed["why"]) == ("broken", "MemoryError('no room')")

    broken.broken = False
    asyncio.run(catalog.refresh())
    assert catalog.versions("broken") == ["new"]
    assert catalog.slots[1].problem is None


def test_reloaded_models_are_served_although_the_refresh_is_cancelled() -> None:
    class Endless(Given):
        def load(self) -> Model:
            raise asyncio.CancelledError

    new = OLD
    catalog = Catalog([Given(new), Endless(new, "endless")], Metrics())
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(catalog.refresh())

    assert catalog.versions("digits") == [new.version]


def test_changes_are_logged_in_the_order_of_the_sources(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    names = [str(number) for number in range(20)]
    catalog = Catalog([Given(replace(OLD, name=name), name) for name in names], Metrics())
    catalog.load()
    assert [event["model"] for event in events(capsysbinary, "served")] == names
    catalog.unload(frozenset(names))
    assert [event["model"] for event in events(capsysbinary, "retired")] == names


def events(capture: pytest.CaptureFixture[bytes], name: str) -> list[dict[str, Any]]:
    """What has been logged under one name."""
    lines = [json.loads(line) for line in capture.readouterr().err.splitlines()]
    return [line for line in lines if line["event"] == name]
