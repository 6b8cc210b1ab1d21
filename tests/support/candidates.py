"""A folder in which everything before stage register has run, for one network after another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mnist_batchnorm.artifacts.goldens import (
    GOLDEN_FILES,
    GOLDEN_FOLDER,
    GOLDEN_IMAGES,
    read_golden_images,
    write_pinned_outputs,
)
from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.core.paths import (
    CHECKPOINT,
    MODELS,
    PROMOTION,
    REGISTERED,
    REGISTRY,
    TEST_SPLIT,
)
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.promotion.goldens import pin_outputs
from mnist_batchnorm.promotion.onnx_model import load_onnx_model
from tests.conftest import ROOT
from tests.support.finished import PASSED, write_parity
from tests.support.graphs import REGRESSION, Network, arrays_of

GOOD = Network(arrays_of(load_checkpoint(REGRESSION / "checkpoint.safetensors").model()))
# Their errors on the slice's 500 test images, by how far the score of 3 is raised; GOOD has 26.
ALIKE = 0.5  # 2 more, p = 0.25
WORSE = 3.0  # 18 more, p = 4e-6
BAD = 12.0  # accuracy below 0.9
FLOOR = 0.9


def shifted(by: float) -> Network:
    """GOOD, with the score of one digit raised."""
    bias = GOOD.state["linear3.bias"] + by * (np.arange(10) == 3).astype(np.float32)
    return replace(GOOD, state=GOOD.state | {"linear3.bias": bias.astype(np.float32)})


def prepare_folder(project: Path, prepared: Path) -> None:
    """Fill the current folder with what does not depend on the batch-norm network."""
    GOOD.write_plain()
    TEST_SPLIT.parent.mkdir(parents=True)
    shutil.copy(prepared / "test.safetensors", TEST_SPLIT)
    GOLDEN_FOLDER.mkdir(parents=True)
    shutil.copy(ROOT / GOLDEN_IMAGES, GOLDEN_IMAGES)
    demand(project, min_accuracy=FLOOR)


def demand(project: Path, **changed: float | str) -> None:
    """Change section register of params.yaml."""
    path = project / "params.yaml"
    head, _, section = path.read_text().partition("\nregister:\n")
    for name, value in changed.items():
        lines = section.splitlines(keepends=True)
        (where,) = (i for i, line in enumerate(lines) if line.startswith(f"  {name}:"))
        lines[where] = f"  {name}: {value}\n"
        section = "".join(lines)
    path.write_text(f"{head}\nregister:\n{section}")


def lay(network: Network, *, pin: bool = True) -> None:
    """Write both ONNX files, their checkpoint, the gate's verdict and, unless told not to, pin."""
    network.write()
    CHECKPOINT.write_bytes(network.state["linear3.bias"].tobytes())
    write_parity(Path(), PASSED)
    if pin:
        models = [load_onnx_model(MODELS / file) for file in REGISTERED.values()]
        write_pinned_outputs(GOLDEN_FILES["bn"], pin_outputs(models, *read_golden_images()))


def ledger() -> Ledger:
    """The registry as it is."""
    return Ledger.load(REGISTRY)


def champion() -> int | None:
    """The number of the champion."""
    found = ledger().champion
    return found.version if found else None


def promotion() -> Any:
    """The record of the last decision."""
    return json.loads(PROMOTION.read_text())


def refusals() -> set[str]:
    """The rules that refused last."""
    return {name for name, rule in promotion()["rules"].items() if not rule["passed"]}


def state() -> tuple[bytes, bytes]:
    """All that the stage writes."""
    return REGISTRY.read_bytes(), PROMOTION.read_bytes()
