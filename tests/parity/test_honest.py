"""No correct export is rejected, for any exporter and any conditioning of the weights."""

from pathlib import Path

import pytest

from tests.parity.conftest import FEW, GetCase, judge_file
from tests.support.honest_exports import HONEST, make_honest

# initial weights x 4 saturate layers and lose digits: a customary tolerance would reject these
GRID = [("mlp", seed, gain) for seed in range(10) for gain in (1.0, 4.0)] + [
    ("cnn", seed, gain) for seed in range(3) for gain in (1.0, 4.0)
]
FAST = {("mlp", 0, 1.0): HONEST.keys(), ("cnn", 0, 1.0): {"kept", "folded", "onnxsim_legacy"}}


@pytest.mark.parametrize(
    ("name", "seed", "gain", "export"),
    [
        pytest.param(*case, export, marks=[] if export in FAST.get(case, ()) else pytest.mark.slow)
        for case in GRID
        for export in HONEST
    ],
)
def test_correct_export_passes(
    name: str, seed: int, gain: float, export: str, get_case: GetCase, tmp_path: Path
) -> None:
    case = get_case(name, seed, gain)
    # in the fast suite as many images as for the mutants, so that their gate is reused
    images = FEW if (name, seed, gain) in FAST else len(case.inputs)
    report = judge_file(make_honest(export, case, tmp_path), case, images)
    assert report.verdict == "parity", report.table()
    assert report.diagnoses == []
