"""The benchmark of the tracker's cost says what it measured."""

from pathlib import Path

import pytest
from benchmarks.tracking import ROWS, Measured, identical, table_row

from benchmarks import tracking
from mnist_batchnorm.core.paths import PREPARED
from tests.conftest import ROOT
from tests.support import store
from tests.support.training import set_params


def trained(*seconds: float, weights: str = "w", said: tuple[str, ...] = ()) -> list[Measured]:
    return [Measured(one, (weights, weights), said) for one in seconds]


def test_row_compares_medians_with_what_is_allowed() -> None:
    untracked = trained(9.0, 10.0, 30.0)
    assert table_row("untracked", untracked, untracked) == "| untracked | 10.00 |  |  |  |  |  |"
    within = trained(40.0, 12.5, 1.0, said=("warning", "pending"))
    assert table_row("server", within, untracked) == (
        "| server | 12.50 | +2.50 | 2.50 | yes | identical | 1 warning, 1 pending |"
    )
    beyond = [*trained(12.6, 12.6), *trained(12.6, said=("pending",))]
    assert table_row("server", beyond, untracked) == (
        "| server | 12.60 | +2.60 | 2.50 | **no** | identical | nothing or 1 pending |"
    )


def test_other_weights_in_one_round_are_seen() -> None:
    untracked = trained(1.0, 1.0)
    other = [*trained(1.0), *trained(1.0, weights="v")]
    assert identical(untracked, untracked)
    assert not identical(other, untracked)
    assert "| **other** |" in table_row("server", other, untracked)


@pytest.mark.slow
def test_whole_table(
    project: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store.use_settings(monkeypatch)
    (project / "data").mkdir()
    (project / PREPARED).symlink_to(prepared)
    for name in ("src", "dvc.yaml"):
        (project / name).symlink_to(ROOT / name)
    set_params(project, epochs=1)
    before = sorted(project.iterdir())
    monkeypatch.setattr("sys.argv", ["tracking", "--rounds", "1"])
    assert tracking.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {row.name}" for row in ROWS]
    assert all(row.split(" | ")[5] == "identical" for row in rows[2:])
    assert sorted(project.iterdir()) == before
