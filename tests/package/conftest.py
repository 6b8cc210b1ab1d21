"""A folder with registered and proven models, and packages of them."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.package.kserve import LOCK
from mnist_batchnorm.package.requirements import locked
from tests.conftest import ROOT, MnistBn
from tests.support.candidates import GOOD, lay, prepare_folder

Package = Callable[..., Path]
PARITY = Path("reports/parity.json")


@pytest.fixture(scope="session")
def proven_template(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which version 1 is registered and proven, with the lock's ONNX Runtime."""
    from mnist_batchnorm.stages import register

    folder = tmp_path_factory.mktemp("proven") / "project"
    folder.mkdir()
    shutil.copy(ROOT / "params.yaml", folder)
    with chdir(folder):
        prepare_folder(folder, prepared)
        lay(GOOD)
        register.command.main([], standalone_mode=False)
        shutil.copy(ROOT / LOCK, LOCK)
        (pin,) = locked(LOCK, ["onnxruntime"])["onnxruntime"]
        change_parity(lambda content: content["versions"].update(onnxruntime=pin.version))
    return folder


@pytest.fixture
def proven(proven_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `proven_template`, as working folder."""
    folder = tmp_path / "project"
    shutil.copytree(proven_template, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def package(proven: Path, mnist_bn: MnistBn) -> Package:
    """Write a package of a target; return its folder."""

    def write(target: str, *options: str) -> Path:
        done = mnist_bn("package", target, "out", *options)
        assert (done.status, done.err) == (0, "")
        return proven / "out"

    return write


@pytest.fixture(scope="session")
def shared_packages(
    proven_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    from mnist_batchnorm.commands import package

    project = tmp_path_factory.mktemp("packages") / "project"
    shutil.copytree(proven_template, project)

    def write(target: str) -> Path:
        folder = project / target
        if not folder.exists():
            with chdir(project):
                package.command.main([target, target], standalone_mode=False)
        return folder

    return write


@pytest.fixture
def shared_package(
    shared_packages: Callable[[str], Path],
) -> Iterator[Callable[[str], Path]]:
    """The package of a target for tests that change nothing; its project is the working folder."""
    with chdir(shared_packages("triton").parent):
        yield shared_packages


def change_parity(change: Callable[[Any], object]) -> None:
    """Rewrite the gate's report."""
    content = json.loads(PARITY.read_text())
    change(content)
    PARITY.write_text(json.dumps(content))
