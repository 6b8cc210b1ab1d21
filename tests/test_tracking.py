"""Training never waits for its tracker and never hears of its troubles."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from mnist_batchnorm import tracking
from mnist_batchnorm.params import Params
from mnist_batchnorm.tracking import live_run
from mnist_batchnorm.train import DeviceSplit, Epoch, architecture, fit
from tests import store

INCOMPLETE = (
    "MLflow does not have all of this run; `mnist-bn track` (the last stage of `dvc repro`) "
    "completes bn from the files"
)


KEEP = """
with open("received", "w") as kept:
    for line in sys.stdin:
        kept.write(line)
        if "status" in line:
            break
"""  # until the status has come, as the real child


def epoch(number: int) -> Epoch:
    return Epoch(number, 1 / number, 0.5, 1.1 / number, 0.4)


# --- training's end of the pipe, with other programs in the place of the child --------------------


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Start this Python program instead of the child."""

    monkeypatch.chdir(tmp_path)

    def use(program: str) -> None:
        path = tmp_path / "child"
        source = tmp_path / "child.py"
        source.write_text(f"import os, sys, time\n{program}")
        # not "#!python": the path of the interpreter may hold a space
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{source}" "$@"\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


@pytest.fixture(autouse=True)
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOCAL_GRACE", 1.0)
    store.use_settings(monkeypatch)


def test_child_gets_every_row_and_the_status(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("open('arguments', 'w').write(' '.join(sys.argv[1:]))" + KEEP)
    with live_run("bn", "cuda:0") as run:
        for number in (1, 2, 3):
            run.log_epoch(epoch(number))
    lines = [json.loads(line) for line in Path("received").read_text().splitlines()]
    assert [line.get("epoch") for line in lines] == [1, 2, 3, None]
    assert lines[1].items() >= {"train_loss": 0.5, "valid_accuracy": 0.4}.items()
    assert abs(lines[0]["time"] / 1000 - time.time()) < 60
    assert lines[-1] == {"status": "FINISHED"}
    assert Path("arguments").read_text().endswith("-m mnist_batchnorm.runs bn cuda:0")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (ValueError("loss is nan"), "FAILED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_exception_in_training_goes_on_and_is_told(
    child: Callable[[str], None], error: BaseException, status: str
) -> None:
    child(KEEP)
    with pytest.raises(type(error)) as caught, live_run("bn", "cpu"):
        raise error
    assert caught.value is error
    assert json.loads(Path("received").read_text()) == {"status": status}


def test_child_that_never_reads_costs_the_grace_time_and_no_more(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("time.sleep(60)")
    start = time.monotonic()
    with live_run("bn", "cpu") as run:
        for number in range(1, 2001):  # three times what the pipe holds
            run.log_epoch(epoch(number))
        assert time.monotonic() - start < 1
    assert 1 <= time.monotonic() - start < 3
    assert capfd.readouterr().err.splitlines() == [INCOMPLETE]


def test_child_that_reads_late_gets_all_the_same(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("time.sleep(0.5)" + KEEP)
    with live_run("bn", "cpu") as run:
        for number in range(1, 2001):
            run.log_epoch(epoch(number))
    lines = [json.loads(line) for line in Path("received").read_text().splitlines()]
    assert [line["epoch"] for line in lines[:-1]] == list(range(1, 2001))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("program", ["sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_child_that_dies_is_no_trouble(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str], program: str
) -> None:
    child(program)
    with live_run("bn", "cpu") as run:
        time.sleep(0.3)
        run.log_epoch(epoch(1))
        run.log_epoch(epoch(2))
    assert capfd.readouterr().err.splitlines() == [INCOMPLETE]


def test_child_that_cannot_start_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with live_run("bn", "cpu") as run:
        run.log_epoch(epoch(1))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow will not show bn while it trains: ")


def test_no_child_outlives_training(child: Callable[[str], None]) -> None:
    child("open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    with live_run("bn", "cpu"):
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


# --- with the real child ------------------------------------------------------------------------


@pytest.fixture
def folder(project: Path) -> Path:
    store.make_trainable(project)
    return project


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOCAL_GRACE", 60.0)  # the machine may be busy


@pytest.mark.usefixtures("patient")
def test_training_is_in_the_store_when_it_ends(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "mlflow.db").write_bytes(store.empty_database())
    with live_run("bn", "cpu") as run:
        for number in (1, 2, 3):
            run.log_epoch(epoch(number))
    assert capfd.readouterr().err == ""
    (recorded,) = store.all_runs(folder)
    assert recorded.info.status == "FINISHED"
    curve = [(number, 1 / number) for number in (1, 2, 3)]
    assert store.history(folder, recorded, "curves/train_loss") == curve


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_two_trainings_at_once_create_the_store_and_are_one_run(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_run("bn", "cpu") as one, live_run("bn", "cpu") as other:
        for number in (1, 2, 3):
            one.log_epoch(epoch(number))
            other.log_epoch(epoch(number))
    assert capfd.readouterr().err == ""
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(folder, run, "curves/valid_loss")] == [1, 2, 3]


@pytest.mark.parametrize("server", [store.refusing, store.hanging])
def test_bad_server_changes_nothing_but_two_lines_and_seconds(
    folder: Path,
    prepared: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    server: Callable[[], AbstractContextManager[str]],
) -> None:
    cpu = torch.device("cpu")
    train, valid = (
        DeviceSplit.load(prepared / f"{name}.safetensors", cpu) for name in ("train", "valid")
    )
    train_params = params.train.model_copy(update={"epochs": 2})
    models = [architecture("bn", train_params).build(seed=0) for _ in range(2)]
    untracked = fit(models[0], train, valid, train_params)
    capfd.readouterr()
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with live_run("bn", "cpu") as run:
            warning = ""
            while server is store.refusing and not warning:
                warning = capfd.readouterr().err
            tracked = fit(models[1], train, valid, train_params, on_epoch=run.log_epoch)
            start = time.monotonic()
        assert time.monotonic() - start < tracking.SERVER_GRACE + 1
    if warning:
        assert warning == f"warning: MLflow at {uri}: [Errno 111] Connection refused\n"
    assert capfd.readouterr().err.splitlines()[-1] == INCOMPLETE
    assert tracked == untracked
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


@pytest.mark.slow
def test_killed_training_leaves_a_killed_run(folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(store.empty_database())
    program = """
        import time
        from mnist_batchnorm.tracking import live_run
        from mnist_batchnorm.train import Epoch
        with live_run("bn", "cpu") as run:
            run.log_epoch(Epoch(1, 0.5, 0.5, 0.5, 0.5))
            print("trains", flush=True)
            time.sleep(600)
    """
    training = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    with training:
        assert training.stdout is not None
        assert training.stdout.readline() == "trains\n"
        training.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if [run.info.status for run in store.all_runs(folder)] == ["KILLED"]:
            return
        time.sleep(0.5)
    pytest.fail(f"{[run.info.status for run in store.all_runs(folder)]} after a minute")


def test_training_does_not_import_mlflow() -> None:
    program = "import mnist_batchnorm.tracking, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
