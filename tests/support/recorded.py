"""A folder in which every stage has run, its results in git and MLflow, without DVC's help."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper
from ruamel.yaml import YAML

from mnist_batchnorm import cli
from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.params import Params, load_params
from mnist_batchnorm.core.paths import (
    CHECKPOINTS,
    GRAPHS,
    LOCK_FILE,
    MODELS,
    PREPARED,
    SEED_CURVES,
    SEEDS,
    VARIANTS,
    WEIGHTS_KEY,
)
from tests.conftest import ROOT
from tests.support import store
from tests.support.finished import PASSED, finish, write_pages, write_parity

GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{role}_NAME": "test" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "test@localhost" for role in ("AUTHOR", "COMMITTER")},
}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=os.environ | GIT,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def commit(folder: Path, message: str) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)
    return git(folder, "rev-parse", "HEAD")


def record(folder: Path, prepared: Path, params: Params) -> None:
    """Fill a new folder and commit it."""
    folder.mkdir()
    for name in ("params.yaml", ".gitignore"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    finish(folder, prepared, params)
    for name, exported in GRAPHS.items():
        weights = CHECKPOINTS[exported.variant]
        sign(folder / "models" / name, Path(name).stem, digest(folder / weights))
    write_pages(folder)
    store.make_trainable(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_parity(Path(), PASSED)
        write_lock()
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "results")


def sign(path: Path, name: str, weights_sha256: str) -> None:
    """Make an ONNX file say, as stage export does, what it was made from."""
    model = onnx.load(path)
    model.graph.name = name
    helper.set_model_props(model, {WEIGHTS_KEY: weights_sha256})
    path.write_bytes(model.SerializeToString())


def write_lock() -> None:
    """Write dvc.lock about the files in the current folder."""

    def entries(*paths: Path) -> list[dict[str, str]]:
        return [{"path": p.as_posix(), "hash": "md5", "md5": digest(p, "md5")} for p in paths]

    def of(section: str) -> dict[str, object]:
        return {"params.yaml": {section: getattr(load_params(), section).model_dump(mode="json")}}

    splits = [PREPARED / f"{name}.safetensors" for name in ("train", "valid")]
    test = PREPARED / "test.safetensors"
    tables = [
        Path(f"reports/{of}/{v}.csv") for of in ("confusion", "predictions") for v in VARIANTS
    ]
    checkpoints = list(CHECKPOINTS.values())
    curves = [Path(f"reports/curves/{variant}.csv") for variant in VARIANTS]
    graphs = [MODELS / name for name in GRAPHS]
    deps = entries(Path("train.py"), *splits)
    stages = {
        "prepare": {
            "cmd": "mnist-bn prepare",
            "params": of("prepare"),
            "outs": entries(*splits, test),
        },
        "train": {
            "cmd": "mnist-bn train",
            "deps": deps,
            "params": of("train"),
            "outs": entries(*checkpoints, *curves),
        },
        "seeds": {
            "cmd": "mnist-bn seeds",
            "deps": deps,
            "params": of("train"),
            "outs": entries(SEEDS, SEED_CURVES),
        },
        "evaluate": {"cmd": "mnist-bn evaluate", "deps": entries(test), "outs": entries(*tables)},
        "export": {
            "cmd": "mnist-bn export",
            "deps": entries(*checkpoints),
            "params": of("export"),
            "outs": entries(*graphs),
        },
    }
    YAML().dump({"schema": "2.0", "stages": stages}, LOCK_FILE)


def sync(folder: Path) -> None:
    """Bring a new MLflow database beside it to the state of the files."""
    (folder / "mlflow.db").write_bytes(store.empty_database())
    with pytest.MonkeyPatch.context() as patch:
        store.use_settings(patch)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mnist-bn", "sync"])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
