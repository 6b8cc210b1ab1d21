"""A model file is known by its bytes wherever it lies: run, parameters, data and commit."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from mnist_batchnorm.artifacts.registry_file import (
    Decision,
    Hashes,
    Ledger,
    Measured,
    PromotedByRules,
    RuleResult,
)
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import MODELS, REGISTERED, REGISTRY
from mnist_batchnorm.mlflow_sync.run_store import RunStore
from tests.conftest import MnistBn
from tests.support import recorded, store


@pytest.fixture(scope="module")
def known(prepared: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results git and MLflow have."""
    folder = tmp_path_factory.mktemp("known") / "project"
    recorded.record(folder, prepared, params)
    recorded.sync(folder)
    return folder


@pytest.fixture
def folder(known: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as working folder."""
    store.use_settings(monkeypatch)
    monkeypatch.chdir(known)
    return known


@pytest.fixture
def changed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; its MLflow is the original's."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.chdir(copy)
    return copy


def run_id(folder: Path, variant: str) -> str:
    (run,) = [
        run
        for run in store.all_runs(folder)
        if store.stage_of(run) == "train" and run.data.params["variant"] == variant
    ]
    return str(run.info.run_id)


def found(mnist_bn: MnistBn, file: Path) -> Any:
    done = mnist_bn("which", str(file), "--json")
    assert (done.status, done.err) == (0, "")
    return json.loads(done.out)


def test_plain_onnx_is_known_and_not_registered(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn
) -> None:
    shutil.copy(MODELS / "plain.onnx", tmp_path / "digits.onnx")
    told = found(mnist_bn, tmp_path / "digits.onnx")
    assert told["weights_sha256"] == digest(MODELS / "plain.safetensors")
    assert told["run_id"] == told["run"]["run_id"] == run_id(folder, "plain")
    assert told["source"]["path"] == "models/plain.onnx"
    assert told["registered"] == []


@pytest.mark.parametrize("name", ["bn.onnx", "bn-folded.onnx"])
@pytest.mark.parametrize("called", ["bn.onnx", "model-v3", "notes.txt"])
def test_copied_onnx_file_is_known(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn, name: str, called: str
) -> None:
    shutil.copy(MODELS / name, tmp_path / called)
    told = found(mnist_bn, tmp_path / called)
    assert told["sha256"] == digest(MODELS / name)
    assert told["weights_sha256"] == digest(MODELS / "bn.safetensors")
    assert told["run_id"] == told["run"]["run_id"] == run_id(folder, "bn")
    source = told["source"]
    assert (source["stage"], source["path"]) == ("export", f"models/{name}")
    assert source["commit"] == recorded.git(folder, "rev-parse", "HEAD")
    assert source["subject"].endswith(" results")
    assert source["params"].keys() == {"prepare", "train", "export"}
    assert source["params"]["train"]["lr"] == 0.01
    assert source["data"] == {
        f"data/prepared/{split}.safetensors": digest(
            folder / f"data/prepared/{split}.safetensors", "md5"
        )
        for split in ("train", "valid", "test")
    }


@pytest.mark.parametrize("variant", ["bn", "plain"])
def test_copied_checkpoint_is_known(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn, variant: str
) -> None:
    shutil.copy(MODELS / f"{variant}.safetensors", tmp_path / "weights")
    told = found(mnist_bn, tmp_path / "weights")
    assert told["run_id"] == run_id(folder, variant)
    assert told["source"]["stage"] == "train"
    assert told["source"]["params"].keys() == {"prepare", "train"}


def test_other_outs_are_known_too(folder: Path, mnist_bn: MnistBn) -> None:
    told = found(mnist_bn, folder / "reports/curves/bn.csv")
    assert told["source"]["stage"] == "train"
    assert told["weights_sha256"] is told["run"] is None


def test_text_says_all_of_it(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("which", "models/bn.onnx")
    assert (done.status, done.err) == (0, "")
    head = recorded.git(folder, "rev-parse", "HEAD")
    first, *lines = done.out.splitlines()
    told = dict(line.strip().split(None, 1) for line in lines)
    assert first == "models/bn.onnx"
    assert told["sha256"] == digest(folder / "models/bn.onnx")
    assert told["weights"] == digest(folder / "models/bn.safetensors")
    assert told["made"] == "by      stage export, as models/bn.onnx"
    assert told["commit"] == f"{head[:7]} results"
    assert told["experiments"] == "none"
    assert "lr 0.01" in told["train"]
    assert told["export"] == "opset 20"
    assert told["MLflow"] == f"run   {run_id(folder, 'bn')}, {head[:7]}/bn"


def test_experiments_that_made_it_are_named(changed: Path, mnist_bn: MnistBn) -> None:
    head = recorded.git(changed, "rev-parse", "HEAD")
    for name in ("wide", "narrow"):
        recorded.git(changed, "update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", head)
    assert "  experiments  narrow, wide\n" in mnist_bn("which", "models/plain.safetensors").out


def test_result_that_is_not_committed_is_known(changed: Path, mnist_bn: MnistBn) -> None:
    recorded.sign(changed / "models/bn.onnx", "another", digest(changed / "models/bn.safetensors"))
    recorded.write_lock()
    done = mnist_bn("which", "models/bn.onnx")
    assert done.status == 0
    assert "commit       none yet: the results are not committed" in done.out


def test_registered_version_is_named(changed: Path, mnist_bn: MnistBn) -> None:
    files = {
        name: Hashes(sha256=digest(MODELS / file), md5=digest(MODELS / file, "md5"))
        for name, file in REGISTERED.items()
    }
    measured = Measured(
        weights_sha256=digest(MODELS / "bn.safetensors"),
        test_sha256="1" * 64,
        test_images=500,
        files=files,
        errors=dict.fromkeys(files, ()),
    )
    proven = {"parity": RuleResult(passed=True, says="computes what it should", numbers={})}
    ledger = Ledger().with_version(measured, Decision(outcome="promoted", rules=proven))
    ledger.with_event(PromotedByRules(version=1)).save(REGISTRY)
    assert (
        "  registered   mnist-bn-folded version 1, champion\n"
        in mnist_bn("which", "models/bn-folded.onnx").out
    )
    (changed / "dvc.lock").unlink()
    recorded.git(changed, "checkout", "-q", "--orphan", "new")
    recorded.git(changed, "branch", "-q", "-D", "main")
    recorded.commit(changed, "nothing but the ledger")
    told = found(mnist_bn, changed / "models/bn.onnx")
    assert told["source"] is None
    assert told["run_id"]
    assert told["registered"] == [
        {"model": "mnist-bn", "version": 1, "champion": True, "decision": "promoted"}
    ]


def test_checkpoint_that_only_mlflow_knows(changed: Path, mnist_bn: MnistBn) -> None:
    shutil.rmtree(changed / ".git")
    (changed / "dvc.lock").unlink()
    told = found(mnist_bn, changed / "models/bn.safetensors")
    assert told["source"] is None
    assert told["run"]["name"].endswith("/bn")
    assert told["run"]["commit"]


def test_onnx_file_of_known_weights_is_unknown_but_tells_its_run(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn
) -> None:
    other, weights = tmp_path / "quantized.onnx", digest(folder / "models/bn.safetensors")
    shutil.copy(folder / "models/bn.onnx", other)
    recorded.sign(other, "quantized", weights)
    done = mnist_bn("which", str(other))
    run, head = run_id(folder, "bn"), recorded.git(folder, "rev-parse", "HEAD")
    assert done.status == 1
    assert done.err == (
        f"FAILED: no commit, experiment or version here made {other}; it says it was made from "
        f"the weights {weights} of MLflow run {run}, {head[:7]}/bn\n"
    )
    recorded.sign(other, "quantized", "f" * 64)
    assert mnist_bn("which", str(other)).err.endswith(f"from the weights {'f' * 64}\n")


def write_onnx_without_origin(path: Path) -> None:
    model = onnx.load("models/bn.onnx")
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())


UNKNOWN: dict[str, Callable[[Path], Any]] = {
    "other.onnx": write_onnx_without_origin,
    "noise.onnx": lambda path: path.write_bytes(np.random.default_rng(0).bytes(1000)),
    "empty.onnx": lambda path: path.write_bytes(b""),
    "other.safetensors": lambda path: save_file({}, path),
    "notes.txt": lambda path: path.write_text("notes"),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.usefixtures("folder")
def test_unknown_file_is_exit_1(tmp_path: Path, mnist_bn: MnistBn, name: str) -> None:
    UNKNOWN[name](tmp_path / name)
    done = mnist_bn("which", str(tmp_path / name), "--json")
    assert done.status == 1
    assert done.err == f"FAILED: no commit, experiment or version here made {tmp_path / name}\n"
    told = json.loads(done.out)
    assert (told["source"], told["run"], told["registered"]) == (None, None, [])


@pytest.mark.usefixtures("folder")
def test_file_that_cannot_be_read_is_exit_2(tmp_path: Path, mnist_bn: MnistBn) -> None:
    for path, reason in {
        tmp_path / "none.onnx": "No such file or directory",
        tmp_path: "Is a directory",
    }.items():
        done = mnist_bn("which", str(path))
        assert (done.status, done.out) == (2, "")
        assert done.err == f"error: {path} cannot be read: {reason}\n"


def test_it_runs_where_dvc_yaml_is(
    folder: Path, tmp_path: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mnist_bn("which", str(folder / "models/bn.onnx"))
    assert done.status == 2
    assert done.err.startswith("error: no dvc.yaml in ")


@pytest.mark.parametrize("text", [b"stages: [", b"\xff\xfe\0", b"stages: {train: {outs: [1]}}"])
def test_garbage_in_dvc_lock_does_not_hide_what_is_committed(
    changed: Path, mnist_bn: MnistBn, text: bytes
) -> None:
    (changed / "dvc.lock").write_bytes(text)
    assert found(mnist_bn, changed / "models/bn.onnx")["source"]["commit"]
    (changed / "notes.txt").write_text("notes")
    assert mnist_bn("which", "notes.txt").status == 1


@pytest.mark.parametrize("server", store.BAD_SERVERS)
@pytest.mark.usefixtures("folder")
def test_without_mlflow_git_answers(
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    server: Callable[[], AbstractContextManager[str]],
) -> None:
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        done = mnist_bn("which", "models/bn.onnx")
    assert done.status == 0
    assert "made by      stage export, as models/bn.onnx" in done.out
    assert "MLflow run   none" in done.out
    (warning,) = done.err.splitlines()
    assert warning.startswith(f"warning: MLflow at {uri}: ")


def test_before_the_first_sync_git_answers(
    changed: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    done = mnist_bn("which", "models/bn.onnx")
    assert done.status == 0
    assert done.err == (
        f"warning: no run has been tracked yet: no sqlite:///{changed}/mlflow.db; "
        "run `dvc repro sync` first\n"
    )


def test_another_experiments_runs_are_not_asked(changed: Path, mnist_bn: MnistBn) -> None:
    store.edit(changed / "params.yaml", "experiment: mnist-batchnorm", "experiment: other")
    RunStore.open("other", changed)
    told = found(mnist_bn, changed / "models/bn.onnx")
    assert told["run"] is None
    assert told["source"]["commit"]
