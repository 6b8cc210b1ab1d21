"""A folder of proven models, and sockets that are closed after each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.raw_clients import opened
from tests.support.serving import lay


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("process") / "pipeline"
    lay(folder)
    return folder


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()
