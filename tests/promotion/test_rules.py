"""McNemar's test; tests/stages/test_register.py has the rules, each on real files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mnist_batchnorm.promotion.rules import mcnemar


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    n = only_first + only_second
    expected = binomtest(only_first, n, alternative="greater").pvalue if n else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (0, 9, 1.0), (5, 0, 1 / 32), (4, 0, 1 / 16), (1, 1, 0.75), (10_000, 0, 0.0)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == p


def test_mcnemar_keeps_its_level() -> None:
    rng = np.random.default_rng(0)
    first = rng.binomial(100, 0.5, size=2000)
    refused = np.mean([mcnemar(int(b), 100 - int(b)) <= 0.05 for b in first])
    assert 0.03 < refused <= 0.05
