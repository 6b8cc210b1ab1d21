import csv
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mnist_batchnorm.export import export
from mnist_batchnorm.model import load_checkpoint, save_checkpoint
from tests.conftest import MnistBn


@pytest.fixture(scope="module")
def exported(weights: Path) -> dict[str, bytes]:
    return export(weights, opset=20)


@pytest.fixture
def ready(project: Path, prepared: Path, weights: Path, exported: dict[str, bytes]) -> Path:
    """A project in which everything before verify has run."""
    (project / "models").mkdir()
    (project / "data/prepared").mkdir(parents=True)
    shutil.copy(prepared / "test.safetensors", project / "data/prepared")
    shutil.copy(weights, project / "models/bn.safetensors")
    for name, content in exported.items():
        (project / "models" / name).write_bytes(content)
    return project


def parity(project: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project / "reports/parity.json").read_text())
    return content


def error_rows(project: Path) -> list[dict[str, str]]:
    with (project / "reports/parity/errors.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_honest_files(ready: Path, mnist_bn: MnistBn) -> None:
    outcome = mnist_bn("verify")
    assert outcome.status == 0, outcome.out
    content = parity(ready)
    assert content["parity"] is True
    rows = error_rows(ready)
    assert [row["image"] for row in rows] == [str(i) for i in range(500)]
    for name, graph in content["graphs"].items():
        assert f"{name}: parity" in outcome.out
        assert max(float(row[name]) for row in rows) == pytest.approx(
            graph["max_relative_error"], rel=1e-3
        )


def test_swapped_files(ready: Path, mnist_bn: MnistBn) -> None:
    kept, folded = ready / "models/bn.onnx", ready / "models/bn-folded.onnx"
    content = kept.read_bytes()
    kept.write_bytes(folded.read_bytes())
    folded.write_bytes(content)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert outcome.out.count("FAIL structure: operators are ") == 2
    assert "bn.onnx, bn-folded.onnx does not compute" in outcome.err


def test_file_that_onnx_runtime_cannot_load(ready: Path, mnist_bn: MnistBn) -> None:
    path = ready / "models/bn.onnx"
    graph = onnx.load(path)
    graph.graph.initializer[0].data_type = 999
    path.write_bytes(graph.SerializeToString())
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert parity(ready)["graphs"]["bn.onnx"]["max_relative_error"] is None
    assert parity(ready)["graphs"]["bn-folded.onnx"]["parity"] is True
    assert {row["bn.onnx"] for row in error_rows(ready)} == {""}


def test_checkpoint_with_a_nan(ready: Path, mnist_bn: MnistBn) -> None:
    path = ready / "models/bn.safetensors"
    checkpoint = load_checkpoint(path)
    checkpoint.state["linear1.bias"][0] = torch.nan
    save_checkpoint(path, checkpoint)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "linear1.bias" in outcome.out
    assert parity(ready)["parity"] is False


def test_missing_file(ready: Path, mnist_bn: MnistBn) -> None:
    (ready / "models/bn.onnx").unlink()
    outcome = mnist_bn("verify")
    assert outcome.status == 2
    assert "dvc repro export" in outcome.err
    assert not (ready / "reports").exists()
