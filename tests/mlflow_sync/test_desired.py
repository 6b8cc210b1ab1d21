"""What MLflow should contain, by what the stages have written."""

import json
import shutil
from pathlib import Path

import pytest

from mnist_batchnorm.mlflow_sync.desired import read_all
from mnist_batchnorm.mlflow_sync.sync import read_results
from mnist_batchnorm.parity import Check
from tests.support.finished import write_parity


@pytest.fixture
def folder(project: Path, results: Path) -> Path:
    """The working folder after every stage before sync."""
    shutil.copytree(results, project, dirs_exist_ok=True)
    return project


@pytest.mark.parametrize(
    ("about", "tags"),
    [
        ("plain.onnx", {"bn": "passed", "plain": "failed"}),
        ("bn-folded.onnx", {"bn": "failed", "plain": "passed"}),
    ],
)
def test_network_without_parity_is_not_the_other_ones_failure(
    folder: Path, about: str, tags: dict[str, str]
) -> None:
    write_parity(folder, [Check("weights", "failed", "a number differs")], about=about)
    networks, _ = read_all()
    assert {run.identity.variant: run.tags["parity"] for run in networks} == tags


def test_measurements_that_the_gate_lacks_are_no_metrics(folder: Path) -> None:
    write_parity(folder, [Check("file", "failed", "not an ONNX file")], summary={})
    bn, _ = read_all()[0]
    assert bn.tags == {"parity": "failed"}
    assert {name for name in bn.metrics if "parity" in name} == {
        "parity_max_relative_error/bn-folded.onnx",
        "parity_worst_sigmas/bn-folded.onnx",
    }


def test_results_from_before_plain_was_exported(folder: Path) -> None:
    path = folder / "reports/parity.json"
    content = json.loads(path.read_text())
    del content["graphs"]["plain.onnx"]
    path.write_text(json.dumps(content))
    (folder / "models/plain.onnx").unlink()
    bn, plain = read_all()[0]
    assert (bn.tags, plain.tags) == ({"parity": "passed"}, {})
    assert "test/accuracy" in plain.metrics
    assert [path.name for path in (*bn.models, *plain.models)] == ["bn.onnx", "bn-folded.onnx"]


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("reports/metrics/test-bn.json", "evaluate"),
        ("reports/parity.json", "verify"),
        ("models/bn.onnx", "export"),
        ("reports/index.html", "report"),
        ("reports/plots", "report"),
        ("reports/plots/seeds.svg", "report"),
        ("reports/curves/seeds.csv", "seeds"),
        ("reports/metrics/seeds.json", "seeds"),
    ],
)
def test_without_a_later_stage_there_are_the_trainings(
    folder: Path, missing: str, stage: str
) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    networks, seeds, error = read_results()
    assert str(error) == f"no {missing}; run `dvc repro {stage}` first"
    assert seeds is None
    for run in networks:
        assert len([point for point in run.curve if point.metric == "curves/valid_loss"]) == 3
        assert not run.metrics
