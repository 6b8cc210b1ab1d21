"""A folder with registered and proven models, and packages of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.package.kserve import LOCK
from mnist_batchnorm.package.requirements import locked
from tests.conftest import ROOT, MnistBn
from tests.support.candidates import GOOD, lay, prepare_folder

Package = Callable[..., Path]
PARITY = Path("reports/parity.json")


@pytest.fixture
def proven(project: Path, prepared: Path, mnist_bn: MnistBn) -> Path:
    """A folder in which version 1 is registered and proven, with the lock's ONNX Runtime."""
    prepare_folder(project, prepared)
    lay(GOOD)
    assert mnist_bn("register").status == 0
    shutil.copy(ROOT / LOCK, LOCK)
    (pin,) = locked(LOCK, ["onnxruntime"])["onnxruntime"]
    change_parity(lambda content: content["versions"].update(onnxruntime=pin.version))
    return project


@pytest.fixture
def package(proven: Path, mnist_bn: MnistBn) -> Package:
    """Write a package of a target; return its folder."""

    def write(target: str, *options: str) -> Path:
        done = mnist_bn("package", target, "out", *options)
        assert (done.status, done.err) == (0, "")
        return proven / "out"

    return write


def change_parity(change: Callable[[Any], object]) -> None:
    """Rewrite the gate's report."""
    content = json.loads(PARITY.read_text())
    change(content)
    PARITY.write_text(json.dumps(content))
