"""What every package contains, whatever its target."""

import json
from pathlib import Path

import numpy as np
import pytest

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import MODELS, REGISTERED, SERVED
from mnist_batchnorm.package.folder import MANIFEST
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.package.write import TARGETS
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.decode import decode
from mnist_batchnorm.serve.core.settings import Settings
from tests.package.conftest import Package

ALL_TARGETS = pytest.mark.parametrize("target", TARGETS)


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@ALL_TARGETS
def test_manifest_lists_every_file_and_the_proven_models(
    shared_package: Package, target: str
) -> None:
    folder = shared_package(target)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {name: digest(folder / name) for name in state(folder)}
    del files[MANIFEST]
    assert manifest.pop("files") == files
    models = {
        name: {
            "file": f"models/{file}",
            "sha256": digest(MODELS / file),
            "version": "1" if name in REGISTERED else digest(MODELS / file)[:12],
            "weights_sha256": ("a" if name in REGISTERED else "c") * 64,
        }
        for name, file in SERVED.items()
    }
    assert manifest == {"schema": 1, "target": target, "models": models}
    packaged = [digest(path) for path in folder.rglob("*.onnx")]
    assert sorted(packaged) == sorted(model["sha256"] for model in models.values())


@ALL_TARGETS
def test_example_is_real_images_and_what_the_models_answer(
    shared_package: Package, target: str
) -> None:
    folder = shared_package(target)
    images = read_proven().images[:3]
    request = decode((folder / "request.json").read_bytes(), None, Settings().limits)
    assert request.images.tobytes() == images.tobytes()
    answers = json.loads((folder / "answers.json").read_text())
    assert answers.keys() == SERVED.keys()
    for name, answer in answers.items():
        expected = runtime.load((MODELS / SERVED[name]).read_bytes()).run(images)
        assert np.array(answer["data"], np.float32).tobytes() == expected.tobytes()
        assert answer["shape"] == [*expected.shape]


@ALL_TARGETS
def test_same_models_give_the_same_bytes(package: Package, target: str) -> None:
    before = state(package(target))
    assert state(package(target, "--force")) == before


@ALL_TARGETS
def test_plain_network_may_be_absent(package: Package, target: str) -> None:
    (MODELS / "plain.onnx").unlink()
    folder = package(target)
    assert json.loads((folder / MANIFEST).read_text())["models"].keys() == REGISTERED.keys()
    assert len(list(folder.rglob("*.onnx"))) == len(REGISTERED)
    assert "mnist-plain" not in (folder / "README.md").read_text()
