"""The models of every server of this package."""

from pathlib import Path

import pytest

from tests.support.serving import lay


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpc") / "pipeline"
    lay(folder)
    return folder
