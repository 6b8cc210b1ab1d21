"""The report's numbers: intervals, paired difference, reliability, confident mistakes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_batchnorm.network.evaluation import calibration_error
from mnist_batchnorm.reporting.figures import (
    MAX_MISTAKES,
    confident_mistakes,
    paired_difference,
    reliability,
    wilson_interval,
)
from mnist_batchnorm.reporting.results import read_results


def test_mistakes_are_the_most_confident_ones(finished: Path) -> None:
    found = read_results()
    mistakes = confident_mistakes(found)
    bn = found.networks["bn"]
    wrong = sorted(bn.probability[bn.predicted != found.test.labels], reverse=True)
    assert len(wrong) > MAX_MISTAKES
    assert [m.probability for m in mistakes] == wrong[:MAX_MISTAKES]
    for mistake in mistakes:
        assert mistake.actual == found.test.labels[mistake.index] != mistake.predicted


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx([low, high], abs=5e-5)


def test_paired_difference_counts_discordant_images() -> None:
    bn = np.array([True] * 90 + [False] * 10)
    plain = np.array([True] * 70 + [False] * 20 + [True] * 5 + [False] * 5)
    found = paired_difference(bn, plain)
    assert (found.only_bn, found.only_plain) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    # variance of a mean of +1, 0 and -1: (25/100 - 0.15**2) / 100
    half = 1.959964 * ((0.25 - 0.0225) / 100) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.15 - half, 0.15 + half))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50),
    st.integers(1, 20),
)
def test_reliability_is_the_picture_of_the_calibration_error(
    images: list[tuple[float, bool]], bins: int
) -> None:
    probability, correct = np.array([p for p, _ in images]), np.array([c for _, c in images])
    found = reliability(probability, correct, bins)
    assert found.images.sum() == len(images)
    assert (found.interval[0] <= found.accuracy + 1e-12).all()
    assert (found.accuracy <= found.interval[1] + 1e-12).all()
    gaps = np.abs(found.confidence - found.accuracy) * found.images / len(images)
    assert gaps.sum() == pytest.approx(calibration_error(probability, correct, bins), abs=1e-12)
