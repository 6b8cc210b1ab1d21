"""A folder whose ledger and MLflow hold several versions, each with its run and its report."""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mnist_batchnorm import cli
from mnist_batchnorm.artifacts.goldens import (
    GOLDEN_FILES,
    GOLDEN_FOLDER,
    GOLDEN_IMAGES,
    read_golden_images,
    write_pinned_outputs,
)
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import CHECKPOINT, MODELS, REGISTERED
from mnist_batchnorm.promotion.goldens import pin_outputs
from mnist_batchnorm.promotion.onnx_model import load_onnx_model
from tests.conftest import ROOT
from tests.support import store
from tests.support.candidates import FLOOR, demand
from tests.support.finished import PASSED, finish, write_pages, write_parity
from tests.support.graphs import Network


def prepare(folder: Path, prepared: Path, params: Params) -> None:
    """Make every stage but register have run in a folder, under DVC, with an empty store."""
    finish(folder, prepared, params)
    write_pages(folder)
    store.make_trainable(folder)
    (folder / GOLDEN_FOLDER).mkdir(parents=True)
    shutil.copy(ROOT / GOLDEN_IMAGES, folder / GOLDEN_IMAGES)
    subprocess.run(["dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    (folder / "mlflow.db").write_bytes(store.empty_database())


def lay(name: str, network: Network) -> None:
    """Make a network the present one: files, in DVC's cache too, the gate's verdict, goldens."""
    network.write()
    store.write_checkpoint(CHECKPOINT, name)
    write_parity(Path(), PASSED)
    paths = [MODELS / file for file in REGISTERED.values()]
    for path in paths:
        md5 = digest(path, "md5")
        cached = Path(".dvc/cache/files/md5") / md5[:2] / md5[2:]
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cached)
    models = [load_onnx_model(path) for path in paths]
    write_pinned_outputs(GOLDEN_FILES["bn"], pin_outputs(models, *read_golden_images()))


def register(
    folder: Path, networks: Mapping[str, Network], commands: Sequence[str] = ("register", "sync")
) -> None:
    """Register networks one after the other in a prepared folder, by these commands for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        demand(folder, min_accuracy=FLOOR)
        for name, network in networks.items():
            lay(name, network)
            for command in commands:
                patch.setattr(sys, "argv", ["mnist-bn", command])
                with pytest.raises(SystemExit) as end:
                    cli.main()
                assert end.value.code == 0
