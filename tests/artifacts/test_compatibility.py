"""Files that commit 1098850 wrote are read, and written again, as before."""

import shutil
from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.promotion_report import write_promotion
from mnist_batchnorm.artifacts.registry_file import Ledger
from mnist_batchnorm.core.paths import PROMOTION, REGISTRY
from tests.conftest import ROOT, MnistBn

FIXTURES = ROOT / "tests/fixtures/compat"
# from that commit's code; MLflow stores have the last one as a tag of each registered model
HASHES = {
    "registry.json": ["38308599a7b425cb6949a215f39275d9519aa7090850f78643f079a8deb620f8"],
    "registry-with-history.json": [
        "38308599a7b425cb6949a215f39275d9519aa7090850f78643f079a8deb620f8",
        "a7c24aa3d75f72cb31212fa03dc0f5b082864bfea22dfa7a97dc60e63c53f1e5",
        "22d2e24e41b7dace653a37e730f24a6ade52d3a53b6150317855cf9384a362dd",
    ],
}


@pytest.mark.parametrize("name", HASHES)
def test_ledger_keeps_its_bytes_its_champion_and_its_hashes(tmp_path: Path, name: str) -> None:
    ledger = Ledger.load(FIXTURES / name)
    assert ledger.champion == ledger.versions[0]
    assert ledger.history_hashes() == HASHES[name]
    ledger.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (FIXTURES / name).read_bytes()


def test_promotion_report_keeps_its_bytes(project: Path) -> None:
    write_promotion(Ledger.load(FIXTURES / "registry.json").versions[0])
    assert (project / PROMOTION).read_bytes() == (FIXTURES / "promotion.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "command", "status", "message"),
    [
        ("registry.json", ["promote", "1"], 0, "champion: version 1\n"),
        (
            "registry.json",
            ["promote", "9"],
            2,
            "error: no version 9 in models/registry.json; there are: 1\n",
        ),
        (
            "registry.json",
            ["rollback"],
            2,
            "error: champion: version 1, and there was none before: nothing to roll back to\n",
        ),
        (
            "registry-with-history.json",
            ["promote", "2"],
            1,
            "rollback: version 2 was rolled back: only `mnist-bn promote 2 --override "
            '"reason"` promotes it again\n',
        ),
    ],
)
def test_commands_answer_as_before(
    project: Path,
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    command: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.setattr("mnist_batchnorm.mlflow_sync.sync.show_registry", lambda: None)
    path = project / REGISTRY
    path.parent.mkdir()
    shutil.copy(FIXTURES / name, path)
    done = mnist_bn(*command)
    assert done.status == status
    assert (done.out if status == 0 else done.err).endswith(message)
    assert path.read_bytes() == (FIXTURES / name).read_bytes()
