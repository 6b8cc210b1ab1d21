import contextlib
import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mnist_batchnorm.artifacts.splits import Split, load_split, network_input
from mnist_batchnorm.network.model import Checkpoint, save_checkpoint
from mnist_batchnorm.stages.evaluate import (
    calibration_error,
    confusion_matrix,
    evaluate,
    log_softmax,
    network_logits,
)
from tests.conftest import MnistBn


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def uint8(*values: int) -> npt.NDArray[np.uint8]:
    return np.array(values, np.uint8)


def a_split(labels: npt.NDArray[np.uint8]) -> Split:
    n = len(labels)
    return Split(np.zeros((n, 28, 28), np.uint8), labels, np.arange(100, 100 + n, dtype=np.int32))


# --- formulas -----------------------------------------------------------------------------------


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-80, 80, width=32),
    )
)
def test_log_softmax_is_its_definition(logits: npt.NDArray[np.float32]) -> None:
    expected = [
        [float(x) - math.log(math.fsum(math.exp(float(y)) for y in row)) for x in row]
        for row in logits
    ]
    result = log_softmax(logits)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_log_softmax_of_extreme_logits_is_finite() -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([[largest, 0, -largest], [1e4, 1e4, -1e4], [0, 0, 0]], np.float32)
    expected = [
        [0, -float(largest), -2 * float(largest)],
        [-math.log(2)] * 2 + [-2e4 - math.log(2)],
    ]
    np.testing.assert_allclose(log_softmax(logits)[:2], expected, rtol=1e-15)
    np.testing.assert_allclose(log_softmax(logits)[2], -math.log(3), rtol=1e-15)


def test_calibration_error_by_hand() -> None:
    # (0.5, 0.75] : accuracy 1/2, confidence 0.65; (0.75, 1]: accuracy 1, confidence 0.9
    confidence = np.array([0.6, 0.7, 0.9])
    correct = np.array([True, False, True])
    expected = (2 * abs(0.5 - 0.65) + 1 * abs(1 - 0.9)) / 3
    assert calibration_error(confidence, correct, bins=4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        ([0.5, 0.5], [True, False], 0.0),
        ([0.0, 1.0], [False, True], 0.0),
        ([0.5, 0.6], [True, False], 0.55),  # 0.5 belongs to the bin it ends
    ],
)
def test_calibration_error_at_the_edges(
    confidence: list[float], correct: list[bool], expected: float
) -> None:
    result = calibration_error(np.array(confidence), np.array(correct), bins=2)
    assert result == pytest.approx(expected, abs=1e-12)


@given(st.data(), st.integers(1, 30), st.integers(1, 100))
def test_calibration_error_is_its_definition(data: st.DataObject, bins: int, n: int) -> None:
    confidence = data.draw(arrays(np.float64, n, elements=st.floats(0, 1)))
    correct = data.draw(arrays(np.bool_, n))
    expected = 0.0
    for m in range(bins):
        chosen = [
            i
            for i in range(n)
            if m < confidence[i] * bins <= m + 1 or (m == 0 and confidence[i] == 0)
        ]
        if chosen:
            accuracy = sum(correct[i] for i in chosen) / len(chosen)
            mean = math.fsum(confidence[i] for i in chosen) / len(chosen)
            expected += len(chosen) / n * abs(accuracy - mean)
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=200))
def test_confusion_matrix_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    labels, predicted = (uint8(*(pair[i] for pair in pairs)) for i in range(2))
    matrix = confusion_matrix(labels, predicted)
    assert matrix.shape == (10, 10)
    for actual in range(10):
        for guess in range(10):
            assert matrix[actual, guess] == pairs.count((actual, guess))


# --- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 500, 10**6])
def test_logits_are_the_networks_at_any_batch_size(
    batch_size: int, trained: Checkpoint, prepared: Path
) -> None:
    images = load_split(prepared / "test.safetensors").images
    model = trained.model()
    logits = network_logits(model, images, batch_size)
    assert logits.shape == (500, 10)
    assert logits.dtype == np.float32
    with torch.no_grad():
        expected = model(torch.from_numpy(network_input(images))).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_logits_are_computed_in_one_thread_and_the_setting_is_put_back(fails: bool) -> None:
    class Spy(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            if fails:
                raise RuntimeError
            return batch[:, :10]

    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            network_logits(Spy(), np.zeros((2, 28, 28), np.uint8), 2)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


# --- metrics and files --------------------------------------------------------------------------


def logits_for(probabilities: list[dict[int, float]]) -> npt.NDArray[np.float32]:
    """Logits whose softmax gives each row's digits so much, and the others the rest alike."""
    result = np.empty((len(probabilities), 10), np.float32)
    for row, given_ in zip(result, probabilities, strict=True):
        rest = (1 - sum(given_.values())) / (10 - len(given_))
        row[:] = [math.log(given_.get(digit, rest)) for digit in range(10)]
    return result


def test_metrics_by_hand() -> None:
    labels = uint8(3, 3, 7, 0)
    logits = logits_for([{3: 0.9}, {5: 0.8, 3: 0.1}, {7: 0.7}, {0: 0.55}])
    metrics, confusion, predictions = evaluate(logits, a_split(labels), bins=10)
    assert metrics.pop("loss") == pytest.approx(
        -(math.log(0.9) + math.log(0.1) + math.log(0.7) + math.log(0.55)) / 4, rel=1e-6
    )
    assert metrics.pop("calibration_error") == pytest.approx(
        (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.7) + abs(1 - 0.55)) / 4, rel=1e-6
    )
    assert metrics == {"accuracy": 0.75, "errors": 1}
    assert type(metrics["errors"]) is int
    table = rows(confusion)
    assert list(table[0]) == ["actual", *map(str, range(10)), "accuracy"]
    accuracy = {int(row["actual"]): row.pop("accuracy") for row in table}
    expected = dict.fromkeys(range(10), "") | {0: "1.0", 3: "0.5", 7: "1.0"}  # no other has images
    assert accuracy == expected
    counted = {int(row.pop("actual")): {int(k): int(n) for k, n in row.items()} for row in table}
    assert list(counted) == list(range(10))
    assert {(a, p): n for a, row in counted.items() for p, n in row.items() if n} == {
        (3, 3): 1,
        (3, 5): 1,
        (7, 7): 1,
        (0, 0): 1,
    }
    assert rows(predictions) == [
        {"index": "100", "actual": "3", "predicted": "3", "probability": "0.900000"},
        {"index": "101", "actual": "3", "predicted": "5", "probability": "0.800000"},
        {"index": "102", "actual": "7", "predicted": "7", "probability": "0.700000"},
        {"index": "103", "actual": "0", "predicted": "0", "probability": "0.550000"},
    ]


def test_extreme_logits_give_metrics_that_json_can_hold() -> None:
    largest = np.finfo(np.float32).max
    logits = np.full((2, 10), -largest)
    logits[:, 4] = largest
    metrics, _, _ = evaluate(logits, a_split(uint8(4, 5)), bins=15)
    json.dumps(metrics, allow_nan=False)
    assert metrics["accuracy"] == 0.5
    assert metrics["calibration_error"] == 0.5
    assert metrics["loss"] == pytest.approx(float(largest), rel=1e-6)


OUTPUTS = ("reports/metrics/test-{}.json", "reports/confusion/{}.csv", "reports/predictions/{}.csv")


def save_two(folder: Path, trained: Checkpoint) -> None:
    """Save networks whose answers differ; what is in them does not matter here."""
    save_checkpoint(folder / "bn.safetensors", trained)
    state = trained.state | {"linear3.weight": -trained.state["linear3.weight"]}
    save_checkpoint(folder / "plain.safetensors", replace(trained, state=state))


def run(project: Path, mnist_bn: MnistBn) -> tuple[dict[str, Any], dict[Path, bytes]]:
    done = mnist_bn("evaluate", "bn")
    assert done.status == 0, done.err
    metrics = json.loads((project / "reports/metrics/test-bn.json").read_text())
    assert done.out == (
        f"bn: test accuracy {metrics['accuracy']:.4f}, loss {metrics['loss']:.4f}, "
        f"calibration error {metrics['calibration_error']:.4f}\n"
    )
    return metrics, {path: path.read_bytes() for path in project.glob("reports/**/*.*")}


def test_command_measures_the_test_images(
    project: Path, prepared: Path, weights: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    shutil.copytree(weights.parent, project / "models")
    metrics, files = run(project, mnist_bn)
    made = {path.relative_to(project).as_posix() for path in files}
    assert made == {output.format("bn") for output in OUTPUTS}
    test = load_split(prepared / "test.safetensors")
    with torch.no_grad():
        predicted = trained.model()(torch.from_numpy(network_input(test.images))).argmax(dim=1)
    assert metrics["accuracy"] == (predicted.numpy() == test.labels).mean()
    assert metrics["accuracy"] > 0.5  # one epoch on 1,800 images; chance is 0.1
    assert run(project, mnist_bn) == (metrics, files)


def test_command_measures_both_as_it_measures_each(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_two(project / "models", trained)
    both = mnist_bn("evaluate")
    assert both.status == 0, both.err
    files = {path: path.read_bytes() for path in project.glob("reports/**/*.*")}
    assert {path.relative_to(project).as_posix() for path in files} == {
        output.format(variant) for output in OUTPUTS for variant in ("bn", "plain")
    }
    assert len(set(files.values())) == len(files)
    shutil.rmtree(project / "reports")
    each = [mnist_bn("evaluate", variant) for variant in ("bn", "plain")]
    assert both.out == "".join(done.out for done in each)
    assert {path: path.read_bytes() for path in project.glob("reports/**/*.*")} == files


@pytest.mark.parametrize("variants", [["plain"], []])
def test_command_refuses_a_network_that_gives_nan(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn, variants: list[str]
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_checkpoint(project / "models/bn.safetensors", trained)
    state = trained.state | {"linear3.bias": torch.full((10,), torch.nan)}
    save_checkpoint(project / "models/plain.safetensors", replace(trained, state=state))
    done = mnist_bn("evaluate", *variants)
    assert done.status == 1
    assert "models/plain.safetensors gives logits that are not finite" in done.err
    assert not (project / "reports").exists()


@pytest.mark.parametrize(
    ("missing", "stage"),
    [("data/prepared/test", "prepare"), ("models/bn", "train"), ("models/plain", "train")],
)
def test_command_without_its_inputs_says_what_to_run(
    project: Path, prepared: Path, trained: Checkpoint, mnist_bn: MnistBn, missing: str, stage: str
) -> None:
    shutil.copytree(prepared, project / "data/prepared")
    save_two(project / "models", trained)
    (project / f"{missing}.safetensors").unlink()
    done = mnist_bn("evaluate")
    assert done.status == 2
    assert done.err == f"error: no {missing}.safetensors; run `dvc repro {stage}` first\n"
    assert not (project / "reports").exists()
