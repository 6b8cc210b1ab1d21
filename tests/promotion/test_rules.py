"""McNemar's test; tests/stages/test_register.py has the rules, each on real files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mnist_batchnorm.artifacts.registry_file import Decision, Hashes, Measured, RuleResult, Version
from mnist_batchnorm.core.paths import REGISTERED
from mnist_batchnorm.promotion.rules import champion_rule, mcnemar


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


@pytest.mark.parametrize("worse", [*REGISTERED, None])
def test_one_file_worse_than_the_champions_is_refused(worse: str | None) -> None:
    proven = RuleResult(passed=True, says="computes what it should", numbers={})
    measured = Measured(
        weights_sha256="0" * 64,
        test_sha256="0" * 64,
        test_images=500,
        files={name: Hashes(sha256="0" * 64, md5="0" * 32) for name in REGISTERED},
        errors=dict.fromkeys(REGISTERED, (3, 14)),
    )
    champion = Version(
        **dict(measured), version=1, decision=Decision(outcome="promoted", rules={"parity": proven})
    )
    errors = measured.errors | ({worse: tuple(range(100))} if worse else {})
    candidate = measured.model_copy(update={"errors": errors})
    assert champion_rule(2, candidate, champion, alpha=0.05).passed == (worse is None)
