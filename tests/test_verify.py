import csv
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save_file

from mnist_batchnorm.export import export
from mnist_batchnorm.model import load_checkpoint, save_checkpoint
from mnist_batchnorm.parity.report import CHECKS
from tests.conftest import MnistBn, Outcome


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
        assert f"models/{name}: parity" in outcome.out
        assert max(float(row[name]) for row in rows) == pytest.approx(
            graph["summary"]["max_relative_error"], rel=1e-3
        )


def test_swapped_files(ready: Path, mnist_bn: MnistBn) -> None:
    kept, folded = ready / "models/bn.onnx", ready / "models/bn-folded.onnx"
    content = kept.read_bytes()
    kept.write_bytes(folded.read_bytes())
    folded.write_bytes(content)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "bn1 is not kept as BatchNormalization" in outcome.out
    assert "bn1 is kept as BatchNormalization, expected to be folded" in outcome.out
    assert "models/bn.onnx, models/bn-folded.onnx does not compute" in outcome.err


def test_file_that_onnx_runtime_cannot_load(ready: Path, mnist_bn: MnistBn) -> None:
    path = ready / "models/bn.onnx"
    graph = onnx.load(path)
    graph.graph.initializer[0].data_type = 999
    path.write_bytes(graph.SerializeToString())
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert parity(ready)["graphs"]["bn.onnx"]["summary"]["max_relative_error"] is None
    assert parity(ready)["graphs"]["bn-folded.onnx"]["parity"] is True
    assert {row["bn.onnx"] for row in error_rows(ready)} == {""}


def test_stage_demands_what_the_pipeline_writes_into_the_file(
    ready: Path, mnist_bn: MnistBn
) -> None:
    path = ready / "models/bn.onnx"
    graph = onnx.load(path)
    del graph.metadata_props[:]
    path.write_bytes(graph.SerializeToString())
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "mnist_batchnorm.input is missing" in outcome.out
    judged = mnist_bn("verify", "--onnx", str(path), "--weights", "models/bn.safetensors")
    assert judged.status == 0, judged.out  # a file that says nothing says nothing wrong


def test_checkpoint_with_a_nan(ready: Path, mnist_bn: MnistBn) -> None:
    path = ready / "models/bn.safetensors"
    checkpoint = load_checkpoint(path)
    checkpoint.state["linear1.bias"][0] = torch.nan
    save_checkpoint(path, checkpoint)
    outcome = mnist_bn("verify")
    assert outcome.status == 1
    assert "the checkpoint's own linear1.bias is not possible" in outcome.out
    assert parity(ready)["parity"] is False


@pytest.mark.parametrize("name", ["bn.onnx", "bn.safetensors"])
def test_stage_without_a_file(ready: Path, mnist_bn: MnistBn, name: str) -> None:
    (ready / "models" / name).unlink()
    outcome = mnist_bn("verify")
    assert outcome.status == 2
    assert "dvc repro" in outcome.err
    assert not (ready / "reports").exists()


class TestAnyTwoFiles:
    """``mnist-bn verify --onnx F --weights F``."""

    @pytest.fixture
    def judge(self, ready: Path, mnist_bn: MnistBn) -> Callable[..., Outcome]:
        def run(onnx_file: str, *options: str, weights: str = "models/bn.safetensors") -> Outcome:
            return mnist_bn("verify", "--onnx", onnx_file, "--weights", weights, *options)

        return run

    @pytest.mark.parametrize("name", ["bn.onnx", "bn-folded.onnx"])
    def test_parity(self, judge: Callable[..., Outcome], ready: Path, name: str) -> None:
        outcome = judge(f"models/{name}")
        assert outcome.status == 0, outcome.out
        assert outcome.out.startswith(f"models/{name}: parity\n")
        assert all(line.startswith("  ") for line in outcome.out.splitlines()[1:])
        assert len(outcome.out.splitlines()) < 24, "one screen"
        assert not (ready / "reports").exists()

    def test_without_the_test_images(self, judge: Callable[..., Outcome], ready: Path) -> None:
        shutil.rmtree(ready / "data")
        outcome = judge("models/bn.onnx")
        assert outcome.status == 0, outcome.out
        assert "judged by synthetic inputs alone" in outcome.err

    def test_json(self, judge: Callable[..., Outcome], ready: Path) -> None:
        report = json.loads(judge("models/bn.onnx", "--json").out)
        assert report["verdict"] == "parity"
        content = (ready / "models/bn.onnx").read_bytes()
        assert report["onnx"] == {"path": "models/bn.onnx", "sha256": sha256(content).hexdigest()}
        assert [check["name"] for check in report["checks"]] == list(CHECKS)

    def test_mistake_is_named(self, judge: Callable[..., Outcome], ready: Path) -> None:
        graph = onnx.load(ready / "models/bn.onnx")
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
        (ready / "frozen.onnx").write_bytes(graph.SerializeToString())
        outcome = judge("frozen.onnx")
        assert outcome.status == 1
        head, likely, *_ = outcome.out.splitlines()
        assert head == "frozen.onnx: NO PARITY"
        assert likely == "  likely: batch axis fixed at 32 (image)"
        assert outcome.err.startswith("FAILED: frozen.onnx does not compute")

    @pytest.mark.parametrize("keep", [0, 1, 1000])
    def test_part_of_a_file(self, judge: Callable[..., Outcome], ready: Path, keep: int) -> None:
        (ready / "part.onnx").write_bytes((ready / "models/bn.onnx").read_bytes()[:keep])
        outcome = judge("part.onnx")
        assert outcome.status == 1
        assert outcome.out.startswith("part.onnx: NO PARITY")

    def test_missing_file(self, judge: Callable[..., Outcome]) -> None:
        outcome = judge("absent.onnx")
        assert outcome.status == 2
        assert "absent.onnx cannot be read" in outcome.err

    def test_unreadable_checkpoint(self, judge: Callable[..., Outcome], ready: Path) -> None:
        (ready / "part.safetensors").write_bytes(b"part")
        outcome = judge("models/bn.onnx", weights="part.safetensors")
        assert outcome.status == 2
        assert "part.safetensors is not a readable safetensors file" in outcome.err

    def test_unknown_architecture(self, judge: Callable[..., Outcome], ready: Path) -> None:
        save_file({"weight": torch.zeros(3)}, ready / "foreign.safetensors")
        outcome = judge("models/bn.onnx", weights="foreign.safetensors")
        assert outcome.status == 2
        assert "foreign.safetensors is not a checkpoint of this project" in outcome.err

    @pytest.mark.parametrize(
        "options", [["--onnx", "a"], ["--weights", "a"], ["--json"], ["--onnx", "a", "--json"]]
    )
    def test_half_of_the_options(self, ready: Path, mnist_bn: MnistBn, options: list[str]) -> None:
        outcome = mnist_bn("verify", *options)
        assert outcome.status == 2
        assert "--onnx and --weights go together" in outcome.err
