import json
from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.artifacts.data_summary import DATA_SUMMARY, DataSummary, read_data_summary
from mnist_batchnorm.artifacts.metrics import (
    TEST_METRICS,
    EvaluationMetrics,
    TrainMetrics,
    read_evaluation_metrics,
    read_train_metrics,
    write_train_metrics,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_training_metrics_end_with_the_last_row_of_the_curve() -> None:
    metrics = TrainMetrics(device="cpu", torch="2.15.0")
    write_train_metrics("bn", metrics, Epoch(2, 0.5, 0.75, 1 / 3, 1.0))
    path = Path("reports/metrics/train-bn.json")
    assert list(json.loads(path.read_text()).items()) == [
        ("device", "cpu"),
        ("torch", "2.15.0"),
        ("epoch", 2),
        ("train_loss", 0.5),
        ("train_accuracy", 0.75),
        ("valid_loss", 1 / 3),
        ("valid_accuracy", 1.0),
    ]
    assert read_train_metrics("bn") == metrics


def test_training_metrics_of_old_commits_lack_the_version_of_torch() -> None:
    path = Path("reports/metrics/train-bn.json")
    path.parent.mkdir(parents=True)
    path.write_text('{"device": "cuda", "epoch": 10}')
    assert read_train_metrics("bn") == TrainMetrics(device="cuda", torch=None)


def test_evaluation_metrics_come_back() -> None:
    metrics = EvaluationMetrics(accuracy=0.9, loss=1 / 3, calibration_error=0.01, errors=3)
    metrics.write(TEST_METRICS["plain"])
    assert list(json.loads(Path("reports/metrics/test-plain.json").read_text())) == [
        "accuracy",
        "loss",
        "calibration_error",
        "errors",
    ]
    assert read_evaluation_metrics("plain") == metrics


def test_data_summary_comes_back() -> None:
    summary = DataSummary(
        protocol="valid: 2 training images held out",
        images={"train": 3},
        per_class={"train": {0: 1, 1: 2}},
        train_pixel_mean=0.1,
        train_pixel_std=1 / 3,
        sha256={"raw": {"a": "0" * 64}},
    )
    summary.write(DATA_SUMMARY)
    assert read_data_summary() == summary
