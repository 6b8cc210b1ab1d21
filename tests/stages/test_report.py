"""Stage report writes the pictures, the page and the model card, the same bytes every time."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_batchnorm.core.params import Params
from mnist_batchnorm.parity import Check
from mnist_batchnorm.stages import report
from tests.conftest import MnistBn
from tests.support.finished import finish, write_parity


@pytest.fixture
def finished(project: Path, prepared: Path, params: Params) -> Path:
    """Every stage before report has run."""
    finish(project, prepared, params)
    return project


def outputs(folder: Path) -> dict[str, bytes]:
    reports = folder / "reports"
    paths = [*(reports / "plots").iterdir(), reports / "index.html", reports / "model_card.md"]
    return {path.name: path.read_bytes() for path in paths}


def test_command_writes_the_same_bytes_again_and_states_what_it_found(
    finished: Path, mnist_bn: MnistBn
) -> None:
    outcome = mnist_bn("report")
    assert outcome.status == 0
    assert "parity: proven" in outcome.out
    before = outputs(finished)
    assert {"curves.svg", "parity-bn.svg", "index.html", "model_card.md"} <= before.keys()
    shutil.rmtree(finished / "reports/plots")
    assert mnist_bn("report") == outcome
    assert outputs(finished) == before


def test_missing_input_is_a_user_error(finished: Path, mnist_bn: MnistBn) -> None:
    (finished / "reports/parity.json").unlink()
    (finished / "reports/index.html").write_text("the previous page")
    outcome = mnist_bn("report")
    assert outcome.status == 2
    assert "no reports/parity.json; run `dvc repro verify` first" in outcome.err
    assert (finished / "reports/index.html").read_text() == "the previous page"


def test_failed_parity_is_reported_and_does_not_fail_the_stage(
    finished: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parity(finished, [Check("file", "failed", "truncated")])
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    outcome = mnist_bn("report")
    assert outcome.status == 0
    assert "parity: NOT PROVEN" in outcome.out


def test_report_needs_no_torch() -> None:
    code = "import sys, mnist_batchnorm.stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
