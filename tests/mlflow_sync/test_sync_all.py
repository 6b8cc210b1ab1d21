"""`mnist-bn sync --all` brings the results of every commit, each as far as it can be had."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.mlflow_sync.run_identity import WEIGHTS_TAG
from mnist_batchnorm.mlflow_sync.sync import without_experiment
from tests.conftest import MnistBn
from tests.support import recorded, store

if TYPE_CHECKING:
    from mlflow.entities import Run


def keep(folder: Path) -> None:
    """Put what git ignores into DVC's cache, as `dvc commit` does."""
    for path in [*folder.glob("models/*"), *folder.glob("data/prepared/*"), *reports(folder)]:
        md5 = digest(path, "md5")
        cached = folder / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cached)


def reports(folder: Path) -> list[Path]:
    return [*folder.glob("reports/confusion/*"), *folder.glob("reports/predictions/*")]


@pytest.fixture(scope="module")
def known(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: of all results, and of others after `dvc repro train`; the first checked out."""
    folder = tmp_path_factory.mktemp("known") / "project"
    recorded.record(folder, prepared, params)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").touch()
    (folder / ".dvc/.gitignore").write_text("*\n")
    keep(folder)
    checkpoints = {path: path.read_bytes() for path in folder.glob("models/*.safetensors")}
    for path in checkpoints:
        store.write_checkpoint(path, f"harder {path.stem}")
    store.edit(folder / "params.yaml", "lr: 0.01", "lr: 0.02")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recorded.write_lock()
    keep(folder)
    recorded.commit(folder, "train harder")
    recorded.git(folder, "checkout", "-q", "--detach", "HEAD^")
    for path, content in checkpoints.items():
        path.write_bytes(content)
    return folder


@pytest.fixture
def folder(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy with an empty store as working folder."""
    store.use_settings(monkeypatch)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    copy = shutil.copytree(known, tmp_path / "project")
    (copy / "mlflow.db").write_bytes(store.empty_database())
    monkeypatch.chdir(copy)
    return copy


def trainings(folder: Path) -> "dict[tuple[str, str], Run]":
    return {
        (run.data.params["variant"], run.data.params["train.lr"]): run
        for run in store.all_runs(folder)
        if store.stage_of(run) == "train"
    }


BOTH = {(variant, lr) for variant in ("bn", "plain") for lr in ("0.01", "0.02")}


def test_commit_of_trainings_alone_has_their_runs(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("sync", "--all")
    assert done.status == 0
    head = recorded.git(folder, "rev-parse", "main")
    said = f"the trainings alone of {head[:7]} train harder: reports/parity.json is about"
    assert said in done.err
    runs = trainings(folder)
    assert runs.keys() == BOTH
    for (_, lr), run in runs.items():
        assert run.info.status == "FINISHED"
        assert len(store.history(folder, run, "curves/valid_loss")) == 3
        assert ("test/accuracy" in run.data.metrics) == (lr == "0.01")
    assert runs["plain", "0.02"].data.tags["mlflow.source.git.commit"] == head
    assert mnist_bn("sync", "--all").out == "MLflow has all of it\n"


def test_running_experiment_gives_its_name_to_its_own_result_only(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "slower")
    assert mnist_bn("sync", "--all").status == 0
    names = {of: run.data.tags.get("dvc.exp_name") for of, run in trainings(folder).items()}
    assert names == {
        ("bn", "0.01"): "slower",
        ("plain", "0.01"): "slower",
        ("bn", "0.02"): None,
        ("plain", "0.02"): None,
    }
    with without_experiment():
        assert "DVC_EXP_NAME" not in os.environ
    assert os.environ["DVC_EXP_NAME"] == "slower"


def test_garbage_in_a_commit_does_not_stop_the_others(folder: Path, mnist_bn: MnistBn) -> None:
    recorded.git(folder, "checkout", "-q", "-b", "garbage", "main")
    for text in (
        "stages: [",
        "stages: {train: {outs: [{path: models/bn.safetensors}]}}",
        f"stages:\n- path: models/bn.safetensors\n  hash: md5\n  md5: {'0' * 32}\n",
        (folder / "dvc.lock").read_text().replace("md5: ", "md5: 0"),
    ):
        (folder / "dvc.lock").write_text(text)
        recorded.git(folder, "commit", "-qam", "garbage")
    recorded.git(folder, "checkout", "-q", "--detach", "main^")
    done = mnist_bn("sync", "--all")
    assert done.status == 0
    assert "warning" not in done.err
    assert trainings(folder).keys() == BOTH


def test_results_that_git_has_no_commit_of_are_the_workspaces(
    folder: Path, mnist_bn: MnistBn
) -> None:
    shutil.rmtree(folder / ".git")
    done = mnist_bn("sync", "--all")
    assert (done.status, done.err) == (0, "")
    weights = digest(folder / "models/bn.safetensors")
    assert trainings(folder)["bn", "0.01"].data.tags[WEIGHTS_TAG] == weights
    assert len(trainings(folder)) == 2
