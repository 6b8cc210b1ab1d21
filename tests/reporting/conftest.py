"""A finished run of the pipeline, without and with its report."""

import shutil
from pathlib import Path

import pytest

from mnist_batchnorm.core.params import Params
from tests.conftest import ROOT
from tests.support.finished import finish


@pytest.fixture(scope="session")
def run(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage before report has run."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(ROOT / "params.yaml", folder)
    finish(folder, prepared, params)
    return folder


@pytest.fixture
def finished(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change, as working folder."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def reported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with its report."""
    from mnist_batchnorm.reporting.page import write_report
    from mnist_batchnorm.reporting.results import read_results

    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_report(read_results(), Path("reports"))
    return folder
