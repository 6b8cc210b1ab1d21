"""What made a run: equal keys are the same training, and tags say where its result is on record."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mnist_batchnorm.artifacts.metrics import TrainMetrics
from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.core.paths import SEED_CURVES, SEEDS, VARIANTS, repository
from mnist_batchnorm.lineage.git import GitHistory
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity, SeedsIdentity
from tests.support import store
from tests.support.store import edit

PAIRS = [(variant, seed) for variant in VARIANTS for seed in (0, 1)]
ON_CPU = TrainMetrics(device="cpu", torch="2.15.0")


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, ready to be trained in."""
    store.use_settings(monkeypatch)
    store.make_trainable(project)
    return project


# --- the key ------------------------------------------------------------------------------------


def test_key_is_the_same_for_the_same_training(folder: Path) -> None:
    key = RunIdentity.of_workspace("bn", "cpu").key
    edit(folder / "params.yaml", "device: auto", "device: cpu")
    edit(folder / "params.yaml", "opset: 20", "opset: 19")
    edit(folder / "params.yaml", "lr: 0.01", "lr: 1.0e-2")
    edit(folder / "train.py", "train", "tidied")
    assert RunIdentity.of_workspace("bn", "cpu").key == key
    assert (
        RunIdentity.of_workspace("bn", "cuda:1").key == RunIdentity.of_workspace("bn", "cuda").key
    )


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("params.yaml", "lr: 0.01", "lr: 0.003"),
        ("params.yaml", "batch_size: 32", "batch_size: 64"),
        ("data/prepared/valid.safetensors", "valid", "other images"),
    ],
)
def test_key_changes_with_all_that_decides_the_result(
    folder: Path, file: str, old: str, new: str
) -> None:
    key = RunIdentity.of_workspace("bn", "cpu").key
    edit(folder / file, old, new)
    assert RunIdentity.of_workspace("bn", "cpu").key != key


def test_variant_and_kind_of_device_have_keys_of_their_own(folder: Path) -> None:
    trainings = [("bn", "cpu"), ("plain", "cpu"), ("bn", "cuda")]
    assert len({RunIdentity.of_workspace(*training).key for training in trainings}) == 3


def without_result(identity: RunIdentity) -> RunIdentity:
    """The same without what came of it, as while it trains."""
    assert identity.result is not None
    return replace(identity, result=None)


@pytest.fixture
def repro(folder: Path) -> Callable[[], None]:
    """Run a real `dvc repro` of a stage train that only writes its curves."""
    curves = [f"reports/curves/{variant}.csv" for variant in VARIANTS]
    models = [f"models/{variant}.safetensors" for variant in VARIANTS]
    for variant in VARIANTS:
        store.write_checkpoint(folder / f"made/{variant}.safetensors", variant)
    made = f"tee {' '.join(curves)} < train.py && mkdir -p models && cp made/* models/"
    edit(folder / "dvc.yaml", "mnist-bn train", made)
    prepare = "stages:\n  prepare:\n    cmd: 'true'\n    params: [prepare]\n"
    edit(folder / "dvc.yaml", "stages:\n", prepare)
    over_seeds = [SEEDS.as_posix(), SEED_CURVES.as_posix()]
    made = "".join(f"      - {out}:\n          cache: false\n" for out in over_seeds)
    tee = f"tee {' '.join(over_seeds)} < train.py\n    outs:\n{made}"
    edit(folder / "dvc.yaml", "mnist-bn seeds\n", tee)
    with (folder / "dvc.yaml").open("a") as stream:
        outs = (f"      - {out}:\n          cache: false\n" for out in [*curves, *models])
        stream.write("".join(["    outs:\n", *outs]))
    for name in ("curves", "metrics"):
        (folder / f"reports/{name}").mkdir(parents=True)
    env = os.environ | {"DVC_SITE_CACHE_DIR": str(folder.parent), "DVC_NO_ANALYTICS": "1"}

    def dvc(*arguments: str) -> None:
        command = [sys.executable, "-m", "dvc", *arguments, "-q"]
        subprocess.run(command, cwd=folder, env=env, check=True)

    dvc("init", "--no-scm")
    return lambda: dvc("repro")


def test_key_from_dvc_lock_is_that_of_the_workspace_at_the_time(
    folder: Path, repro: Callable[[], None]
) -> None:
    at_the_time = RunIdentity.of_workspace("bn", "cpu")
    plain = RunIdentity.of_workspace("plain", "cpu")
    repro()
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    edit(folder / "train.py", "train", "train harder")
    assert without_result(RunIdentity.of_files("bn", ON_CPU)) == at_the_time
    assert without_result(RunIdentity.of_files("plain", ON_CPU)) == plain
    assert RunIdentity.of_workspace("bn", "cpu").key != at_the_time.key
    # trained by hand since, so dvc.lock is about another curve
    (folder / "reports/curves/bn.csv").write_text("another curve")
    assert without_result(RunIdentity.of_files("bn", ON_CPU)) == RunIdentity.of_workspace(
        "bn", "cpu"
    )
    assert without_result(RunIdentity.of_files("plain", ON_CPU)) == plain


def test_key_over_seeds_from_dvc_lock_is_that_of_the_workspace_at_the_time(
    folder: Path, repro: Callable[[], None]
) -> None:
    repro()
    at_the_time = SeedsIdentity.of_summary("cpu", 5)
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    assert SeedsIdentity.of_summary("cpu", 5) == at_the_time
    for path in (SEEDS, SEED_CURVES):  # other numbers, made without DVC
        usual = path.read_bytes()
        path.write_text("other seeds")
        other = SeedsIdentity.of_summary("cpu", 5)
        assert (other.train.lr, at_the_time.train.lr) == (0.003, 0.01)
        assert other.key != at_the_time.key
        path.write_bytes(usual)


def test_without_dvc_lock_the_workspace_counts(folder: Path) -> None:
    store.write_checkpoint(folder / "models/plain.safetensors")
    assert without_result(RunIdentity.of_files("plain", ON_CPU)) == RunIdentity.of_workspace(
        "plain", "cpu"
    )


def test_dvc_lock_with_conflict_markers_is_an_error(folder: Path) -> None:
    (folder / "dvc.lock").write_text("<<<<<<< HEAD\nstages:\n=======\n")
    store.write_checkpoint(folder / "models/bn.safetensors")
    with pytest.raises(UserError, match=r"dvc\.lock cannot be used, run `dvc repro`"):
        RunIdentity.of_files("bn", ON_CPU)


def test_missing_dependency_is_named(folder: Path) -> None:
    (folder / "data/prepared/valid.safetensors").unlink()
    with pytest.raises(UserError, match=r"data/prepared/valid\.safetensors.*run `dvc repro train`"):
        RunIdentity.of_workspace("bn", "cpu")


@pytest.mark.parametrize("text", ["stages: {}", "stages: [", "just text"])
def test_unusable_dvc_yaml_is_an_error(folder: Path, text: str) -> None:
    (folder / "dvc.yaml").write_text(text)
    with pytest.raises(UserError, match=r"dvc\.yaml: no deps of stage train can be read"):
        RunIdentity.of_workspace("bn", "cpu")


def test_folder_without_dvc_yaml_is_an_error(folder: Path) -> None:
    (folder / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"no dvc\.yaml in"):
        RunIdentity.of_workspace("bn", "cpu")


@pytest.fixture
def over_seeds(folder: Path) -> SeedsIdentity:
    for path in (SEEDS, SEED_CURVES):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text("figures")
    return SeedsIdentity.of_summary("cpu", 2)


def test_keys_of_seeds_are_their_own(folder: Path, over_seeds: SeedsIdentity) -> None:
    keys = {over_seeds.key, *(over_seeds.of_seed(*pair).key for pair in PAIRS)}
    assert len(keys) == 5
    edit(folder / "params.yaml", "seed: 2 ", "seed: 3 ")  # of the run that ships
    assert SeedsIdentity.of_summary("cpu", 2).key == over_seeds.key
    edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
    assert SeedsIdentity.of_summary("cpu", 2).key != over_seeds.key


# --- git ----------------------------------------------------------------------------------------


@pytest.fixture
def git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "test")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "test@localhost")

    def run(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    return run


def tags_of_workspace() -> dict[str, str]:
    identity = RunIdentity.of_workspace("bn", "cpu")
    return identity.tags(identity.provenance(GitHistory(repository())))


def test_run_without_git_has_no_commit(folder: Path, git: Callable[..., str]) -> None:
    assert "mlflow.source.git.commit" not in tags_of_workspace()
    git("init", "-q")  # a repository without a commit
    assert "mlflow.source.git.commit" not in tags_of_workspace()


def test_run_is_tied_to_its_commit_and_dirty_when_what_made_it_differs(
    folder: Path, git: Callable[..., str]
) -> None:
    git("init", "-q")
    git("add", "dvc.yaml", "params.yaml", "train.py")
    git("commit", "-qm", "start")
    (folder / "reports").mkdir()
    (folder / "reports/index.html").write_text("outputs do not make a run dirty")
    (folder / ".gitignore").write_text("data/\n")
    tags = tags_of_workspace()
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert tags["mlflow.source.git.dirty"] == "false"
    edit(folder / "train.py", "train", "train harder")
    assert tags_of_workspace()["mlflow.source.git.dirty"] == "true"


def test_archive_unpacked_in_another_repository_has_no_commit(
    folder: Path, git: Callable[..., str]
) -> None:
    (folder / "other.txt").write_text("something else")
    git("init", "-q")
    git("add", "other.txt")
    git("commit", "-qm", "another project")
    assert "mlflow.source.git.commit" not in tags_of_workspace()


def test_experiment_names_its_run_and_the_commit_it_started_from(
    folder: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    git("init", "-q")
    git("add", "dvc.yaml")
    git("commit", "-qm", "start")
    monkeypatch.setenv("DVC_EXP_NAME", "slower")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "f" * 40)
    identity = RunIdentity.of_workspace("bn", "cpu")
    provenance = identity.provenance(GitHistory(repository()))
    assert identity.run_name(provenance) == "slower/bn"
    assert identity.tags(provenance)["dvc.exp_name"] == "slower"
    assert identity.tags(provenance)["mlflow.source.git.commit"] == "f" * 40
