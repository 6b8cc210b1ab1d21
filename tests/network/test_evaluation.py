import contextlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.network.evaluation import (
    calibration_error,
    compute_logits,
    confusion_matrix,
    evaluate,
)
from mnist_batchnorm.network.model import Checkpoint


def uint8(*values: int) -> npt.NDArray[np.uint8]:
    return np.array(values, np.uint8)


def logits_for(probabilities: list[dict[int, float]]) -> npt.NDArray[np.float32]:
    """Logits whose softmax gives each row's digits so much, and the others the rest alike."""
    result = np.empty((len(probabilities), 10), np.float32)
    for row, given_ in zip(result, probabilities, strict=True):
        rest = (1 - sum(given_.values())) / (10 - len(given_))
        row[:] = [math.log(given_.get(digit, rest)) for digit in range(10)]
    return result


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-80, 80, width=32),
    )
)
def test_loss_and_probability_are_those_of_the_softmax(logits: npt.NDArray[np.float32]) -> None:
    labels = np.arange(len(logits), dtype=np.uint8) % logits.shape[1]
    log_probability = [
        [float(x) - math.log(math.fsum(math.exp(float(y)) for y in row)) for x in row]
        for row in logits
    ]
    result = evaluate(logits, labels, bins=15)
    loss = -math.fsum(row[y] for row, y in zip(log_probability, labels, strict=True)) / len(labels)
    assert result.loss == pytest.approx(loss, rel=1e-12, abs=1e-12)
    expected = [math.exp(max(row)) for row in log_probability]
    np.testing.assert_allclose(result.probability, expected, rtol=1e-12)
    assert result.probability.dtype == np.float64


def test_metrics_by_hand() -> None:
    logits = logits_for([{3: 0.9}, {5: 0.8, 3: 0.1}, {7: 0.7}, {0: 0.55}])
    result = evaluate(logits, uint8(3, 3, 7, 0), bins=10)
    assert result.loss == pytest.approx(
        -(math.log(0.9) + math.log(0.1) + math.log(0.7) + math.log(0.55)) / 4, rel=1e-6
    )
    assert result.calibration_error == pytest.approx(
        (abs(1 - 0.9) + abs(0 - 0.8) + abs(1 - 0.7) + abs(1 - 0.55)) / 4, rel=1e-6
    )
    assert (result.accuracy, result.errors) == (0.75, 1)
    assert type(result.errors) is int
    assert result.predicted.tolist() == [3, 5, 7, 0]
    assert result.probability == pytest.approx([0.9, 0.8, 0.7, 0.55])
    counts = {(a, p): n for (a, p), n in np.ndenumerate(result.confusion) if n}
    assert counts == {(3, 3): 1, (3, 5): 1, (7, 7): 1, (0, 0): 1}


def test_extreme_logits_give_finite_metrics() -> None:
    largest = np.finfo(np.float32).max
    logits = np.full((2, 10), -largest)
    logits[:, 4] = largest
    result = evaluate(logits, uint8(4, 5), bins=15)
    assert result.accuracy == 0.5
    assert result.calibration_error == 0.5
    assert result.loss == pytest.approx(float(largest), rel=1e-6)
    even = evaluate(np.array([[1e4, 1e4, -1e4]], np.float32), uint8(0), bins=15)
    assert even.loss == pytest.approx(math.log(2), rel=1e-15)


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
    matrix = confusion_matrix(labels, predicted, 10)
    assert matrix.shape == (10, 10)
    for actual in range(10):
        for guess in range(10):
            assert matrix[actual, guess] == pairs.count((actual, guess))


@pytest.mark.parametrize("batch_size", [1, 7, 500, 10**6])
def test_logits_are_the_networks_at_any_batch_size(
    batch_size: int, trained: Checkpoint, prepared: Path
) -> None:
    inputs = network_input(load_split(prepared / "test.safetensors").images)
    model = trained.model()
    logits = compute_logits(model, inputs, batch_size)
    assert logits.shape == (500, 10)
    assert logits.dtype == np.float32
    with torch.no_grad():
        expected = model(torch.from_numpy(inputs)).numpy()
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
            compute_logits(Spy(), np.zeros((2, 784), np.float32), 2)
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)
