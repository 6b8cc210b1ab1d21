"""The process of one network, run here in this one: its events, its files, its errors."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mnist_batchnorm.core.files import digest
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.network.model import load_checkpoint
from mnist_batchnorm.training import worker
from mnist_batchnorm.training.fused import FusedTrainer
from tests.conftest import fill
from tests.support.training import (
    OUTPUTS,
    STEPS,
    files,
    make_workspace,
    set_params,
)

Events = list[dict[str, Any]]
Work = Callable[..., tuple[int, Events, str]]


@pytest.fixture
def work(
    tmp_path: Path,
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    deterministic: None,
) -> Work:
    """Run `main` for two epochs; return its status, events, and standard error."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(make_workspace(tmp_path / "workspace", prepared, epochs=2))

    def work(variant: str = "bn", **changed: object) -> tuple[int, Events, str]:
        set_params(Path.cwd(), **changed)
        stdout = os.dup(1)
        capfd.readouterr()
        try:
            status = worker.main(variant)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        out, err = capfd.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return work


@pytest.mark.parametrize("variant", VARIANTS)
def test_worker_sends_its_progress_and_writes_its_files(variant: str, work: Work) -> None:
    status, (begun, *events), err = work(variant)
    assert (status, err) == (0, "")
    (checkpoint,) = Path.cwd().glob(f".checkpoints/{variant}-*.safetensors")
    assert begun == {
        "device": "cpu",
        "described": "cpu",
        "steps": STEPS,
        "epochs": 2,
        "checkpoint": str(checkpoint),
    }
    assert sum(event.get("taken", 0) for event in events) == 2 * STEPS
    rows = [event["row"] for event in events if "row" in event]
    assert [event["kept"] for event in events if "row" in event] == [1, 2]

    written = files(Path.cwd())
    assert written.keys() == OUTPUTS[variant]
    with Path(f"reports/curves/{variant}.csv").open() as stream:
        curve = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    assert curve == rows
    metrics = json.loads(written[f"reports/metrics/train-{variant}.json"])
    assert metrics == {"device": "cpu", "torch": version("torch"), **rows[-1]}


def test_weights_say_what_made_them(work: Work) -> None:
    work("bn", hidden=[8, 7], bn_momentum=0.3)
    checkpoint = load_checkpoint(Path("models/bn.safetensors"))
    assert checkpoint.architecture.widths == (784, 8, 7, 10)
    assert checkpoint.architecture.bn_momentum == 0.3
    asked = checkpoint.provenance.pop("params")
    assert checkpoint.provenance == {
        "variant": "bn",
        "train_sha256": digest(Path("data/prepared/train.safetensors")),
        "device": "cpu",
    }
    assert (asked["hidden"], asked["lr"]) == ([8, 7], 0.01)
    assert "device" not in asked  # auto and cpu make the same file


def test_resumed_process_writes_the_same_files(work: Work) -> None:
    work("bn", epochs=3)
    written = files(Path.cwd())
    (checkpoint,) = Path.cwd().glob(".checkpoints/*")
    set_params(Path.cwd(), device="auto")
    status, events, err = work("bn")  # as after a kill while the files were being written
    assert status == 0
    assert err == f"going on after epoch 3, from {checkpoint}\n"
    assert [event.get("kept") for event in events[1:]] == [None, 3] * 3
    assert files(Path.cwd()) == written


def test_non_finite_loss_is_reported_with_its_step(work: Work) -> None:
    for variant in VARIANTS:
        status, events, err = work(variant, lr=1e38)
        assert (status, err) == (1, "")
        assert events[-1] == {
            "error": "CheckFailedError",
            "message": "the loss is no longer finite in epoch 1, step 2 of 56 (lr 1e+38): "
            "lower train.lr in params.yaml",
        }
    assert files(Path.cwd()) == {}


def test_non_finite_loss_leaves_the_checkpoint_before_it(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_steps = FusedTrainer.run
    losses = iter([1.0, 1.0, float("nan")])

    def diverging(trainer: FusedTrainer, order: Tensor, progress: Callable[[int], None]) -> Tensor:
        return run_steps(trainer, order, progress) * next(losses)

    monkeypatch.setattr(FusedTrainer, "run", diverging)
    status, events, _ = work("plain", epochs=4)
    assert status == 1
    assert "in epoch 3, step 1 of 56 (lr 0.01)" in events[-1]["message"]
    assert [event["kept"] for event in events if "kept" in event] == [1, 2]
    with safe_open(events[0]["checkpoint"], framework="pt") as stored:
        assert len(json.loads(stored.metadata()["mnist_batchnorm"])["rows"]) == 2


def spoil(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no {path}; run `dvc repro prepare` first"),
        (spoil(b""), "{path} is not a prepared split: "),
        (spoil(b"\x80\x04K\x01."), "{path} is not a prepared split: "),
        (lambda path: os.truncate(path, 100_000), "{path} is not a prepared split: "),
    ],
    ids=["missing", "empty", "a pickle", "truncated"],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_damaged_data_is_the_users_mistake(
    split: str, damage: Callable[[Path], object], message: str, work: Work
) -> None:
    path = Path(f"data/prepared/{split}.safetensors")
    damage(path)
    status, events, err = work()
    assert (status, err) == (1, "")
    (event,) = events
    assert event["error"] == "UserError"
    assert event["message"].startswith(message.format(path=path))
    assert files(Path.cwd()) == {}


def test_batch_larger_than_the_data_is_the_users_mistake(work: Work) -> None:
    status, events, _ = work(batch_size=1801)
    assert status == 1
    assert events == [
        {
            "error": "UserError",
            "message": "params.yaml: train.batch_size: 1801 is more than the 1800 training images",
        }
    ]


def test_gpu_that_is_not_there_is_the_users_mistake(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, (event,), _ = work(device="cuda")
    assert (status, event["error"]) == (1, "UserError")
    assert "train.device: cuda: this PyTorch" in event["message"]


def test_memory_that_runs_out_is_the_users_mistake(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_batchnorm.training.loop.fit", lambda *_, **__: torch.empty(2**45))
    status, events, err = work()
    assert (status, err) == (1, "")
    assert events[-1]["error"] == "UserError"
    assert events[-1]["message"].startswith("not enough memory to train: lower train.batch_size")


@pytest.mark.parametrize("bug", [RuntimeError("shapes do not fit"), KeyError("x"), ValueError()])
def test_bug_keeps_its_traceback(
    bug: Exception, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise bug

    monkeypatch.setattr("mnist_batchnorm.training.loop.fit", fit)
    with pytest.raises(type(bug)):
        work()


def test_output_of_a_library_is_not_an_event(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> None:
        os.write(1, b"from C\n")

    monkeypatch.setattr("mnist_batchnorm.training.devices.make_deterministic", chatty)
    status, events, err = work()
    assert status == 0
    assert events[0]["epochs"] == 2
    assert err == "from C\n"


def test_worker_whose_parent_has_ended_ends_quietly(
    work: Work, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    stdout = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    try:
        assert worker.main("bn") == 1
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert capfd.readouterr().err == ""
    assert files(Path.cwd()) == {}


def test_full_disk_for_the_outputs_leaves_no_half_file(
    work: Work, mount: Callable[[Path, str], None]
) -> None:
    work("bn")
    expected = files(Path.cwd())
    shutil.rmtree("models")
    mount(Path.cwd() / "models", "64k")  # the weights take 107
    status, events, err = work("bn")
    assert status == 1
    assert "going on after epoch 2" in err
    assert events[-1] == {"error": "UserError", "message": "[Errno 28] No space left on device"}
    assert list(Path("models").iterdir()) == []
    shutil.rmtree("reports")
    fill(Path("models"))
    assert work("bn")[0] == 1
    assert [path.name for path in Path("models").iterdir()] == ["filler"]
    assert not Path("reports").exists()
    os.system(f"mount -o remount,size=1m {Path.cwd() / 'models'}")
    Path("models/filler").unlink()
    assert work("bn")[0] == 0
    assert files(Path.cwd()) == expected
