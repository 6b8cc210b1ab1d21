import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mnist_batchnorm.artifacts.seeds import (
    Difference,
    Moments,
    SeedDifferences,
    SeedMeasures,
    SeedMetrics,
    SeedRuns,
    read_seeds,
    write_seeds,
)
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS

FIGURE = Moments(mean=0.95, sd=0.01, values=[0.9, 1.0])
NETWORK = SeedMeasures(test_accuracy=FIGURE, test_loss=FIGURE)
GAIN = Difference(mean=0.0, sd=0.0, values=[0.0, 0.0], interval_95=(-1e-05, 1 / 3))
METRICS = SeedMetrics(
    seeds=2,
    device="cpu",
    bn=NETWORK,
    plain=NETWORK,
    bn_minus_plain=SeedDifferences(test_accuracy=GAIN),
)
CURVE = {
    "valid_loss": np.array([[0.1 + 0.2, 2e-7, 1 / 3], [1.0, 2.0, 3.0]]),
    "valid_accuracy": np.array([[0.5, 0.75, 1.0], [0.25, 0.5, 0.0]]),
}


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SeedRuns:
    """The files of two seeds, in the current folder."""
    monkeypatch.chdir(tmp_path)
    plain = {name: values / 2 for name, values in CURVE.items()}
    runs = SeedRuns(METRICS, np.array([1.0, 2.0, 3.0]), {"bn": CURVE, "plain": plain})
    write_seeds(runs)
    return runs


def test_runs_come_back_exactly(written: SeedRuns) -> None:
    found = read_seeds()
    assert found.metrics == written.metrics
    np.testing.assert_array_equal(found.epoch, written.epoch, strict=True)
    assert found.curves.keys() == written.curves.keys()
    for variant, curves in written.curves.items():
        for name, values in curves.items():
            np.testing.assert_array_equal(found.curves[variant][name], values, strict=True)


def test_files_have_one_row_per_run_and_epoch_and_exact_numbers() -> None:
    rows = list(csv.reader(SEED_CURVES.read_text().splitlines()))
    assert rows[:2] == [
        ["variant", "seed", "epoch", "valid_loss", "valid_accuracy"],
        ["bn", "0", "1", "0.30000000000000004", "0.5"],
    ]
    assert [tuple(row[:3]) for row in rows[1:]] == [
        (v, str(s), str(e)) for v in ("bn", "plain") for s in (0, 1) for e in (1, 2, 3)
    ]
    assert '"interval_95": [\n        -1e-05,\n        0.3333333333333333\n' in SEEDS.read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: lines[:1],
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        lambda lines: [lines[0], *lines[7:], *lines[1:7]],
        lambda lines: [line.replace("bn,1,", "bn,2,") for line in lines],
    ],
    ids=["cut short", "of one run", "other order", "plain first", "other seeds"],
)
def test_curves_of_other_seeds_are_refused(change: Callable[[list[str]], list[str]]) -> None:
    lines = SEED_CURVES.read_text().splitlines()
    assert len(lines) == 13
    kept = change(lines) if len(change(lines)) > 1 else lines[:2]
    SEED_CURVES.write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match=r"seeds\.csv is about other runs .*run `dvc repro seeds`"):
        read_seeds()


def test_curve_of_an_unknown_network_is_refused() -> None:
    SEED_CURVES.write_text(SEED_CURVES.read_text().replace("plain", "fancy"))
    with pytest.raises(UserError, match=r"seeds\.csv is not what .* writes: .*'fancy'"):
        read_seeds()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"seeds": 2', '"seeds": 3', "Value error, 3 seeds and 2 values do not fit"),
        ('"seeds": 2', '"seeds": 1', "seeds: Input should be greater than"),
        ('"mean": 0.9', '"mean": null, "x": 0.9', r"test_accuracy\.mean"),
        ('"sd": 0.0', '"sd": NaN, "x": 0.0', r"test_accuracy\.sd: Input should be a finite"),
        ('"interval_95"', '"interval"', r"bn_minus_plain\.test_accuracy\.interval_95"),
        ('"device"', '"machine"', "device: Field required"),
    ],
)
def test_malformed_figures_over_seeds_are_refused(old: str, new: str, problem: str) -> None:
    text = SEEDS.read_text()
    assert old in text
    SEEDS.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"seeds\.json is not .* writes: .*{problem}"):
        read_seeds()
