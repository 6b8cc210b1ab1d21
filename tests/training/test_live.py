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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_batchnorm.artifacts.curves import Epoch
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import VARIANTS
from mnist_batchnorm.training import live
from mnist_batchnorm.training.devices import DeviceSplit
from mnist_batchnorm.training.live import live_runs
from mnist_batchnorm.training.loop import architecture, fit
from tests.support import store

INCOMPLETE = (
    "MLflow does not have all of this yet; `mnist-bn sync` (the last stage of `dvc repro`) "
    "completes it from the files"
)


KEEP = """
with open("received", "w") as kept:
    for line in sys.stdin:
        kept.write(line)
"""  # until the pipe closes, as the real child


def epoch(number: int) -> dict[str, float]:
    return asdict(Epoch(number, 1 / number, 0.5, 1.1 / number, 0.4))


def received() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("received").read_text().splitlines()]


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
    monkeypatch.setattr(live, "DELIVERY_GRACE_S", 1.0)
    store.use_settings(monkeypatch)


def test_child_gets_every_row_and_the_status(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("open('arguments', 'w').write(' '.join(sys.argv[1:]))" + KEEP)
    with live_runs() as tracker:
        tracker.begin("bn", "cuda:0")
        for number in (1, 2, 3):
            tracker.log_epoch("bn", epoch(number))
        tracker.end("bn", "FINISHED")
    begun, *rows, ended = received()
    assert begun.items() >= {"variant": "bn", "device": "cuda:0"}.items()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    told = {"variant": "bn", "train_loss": 0.5, "valid_accuracy": 0.4}
    assert rows[1].items() >= told.items()
    for message in (begun, *rows):
        assert abs(message["time"] / 1000 - time.time()) < 60
    assert ended == {"variant": "bn", "status": "FINISHED"}
    assert Path("arguments").read_text().endswith("-m mnist_batchnorm.mlflow_sync.live_child")
    assert capfd.readouterr().err == ""


def test_one_child_gets_both_trainings(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("open('starts', 'a').write('x')" + KEEP)
    with live_runs() as tracker:
        tracker.begin("plain", "cpu")
        tracker.begin("bn", "cpu")
        tracker.log_epoch("plain", epoch(1))
        tracker.log_epoch("bn", epoch(1))
        tracker.end("plain", "FAILED")
        tracker.log_epoch("bn", epoch(2))
        tracker.end("bn", "FINISHED")
    assert Path("starts").read_text() == "x"
    order = [(message["variant"], message.get("status")) for message in received()]
    assert order == [
        ("plain", None),
        ("bn", None),
        ("plain", None),
        ("bn", None),
        ("plain", "FAILED"),
        ("bn", None),
        ("bn", "FINISHED"),
    ]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (ValueError("loss is nan"), "FAILED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_exception_in_training_goes_on_and_is_told_of_what_had_not_ended(
    child: Callable[[str], None], error: BaseException, status: str
) -> None:
    def run() -> None:
        with live_runs() as tracker:
            for variant in ("bn", "plain"):
                tracker.begin(variant, "cpu")
            tracker.end("plain", "FINISHED")
            raise error

    child(KEEP)
    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert received()[2:] == [
        {"variant": "plain", "status": "FINISHED"},
        {"variant": "bn", "status": status},
    ]


def test_end_is_told_once_and_only_of_what_began(child: Callable[[str], None]) -> None:
    child(KEEP)
    with live_runs() as tracker:
        tracker.end("plain", "FAILED")  # its process ended before it could begin
        tracker.begin("bn", "cpu")
        tracker.end("bn", "FAILED")
        tracker.end("bn", "FINISHED")
    (_, ended) = received()
    assert ended == {"variant": "bn", "status": "FAILED"}


def test_child_that_never_reads_costs_the_grace_time_and_no_more(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("time.sleep(60)")
    start = time.monotonic()
    with live_runs() as tracker:
        for number in range(1, 2001):  # three times what the pipe holds
            tracker.log_epoch("bn", epoch(number))
        assert time.monotonic() - start < 1
    assert 1 <= time.monotonic() - start < 3
    assert capfd.readouterr().err.splitlines() == [INCOMPLETE]


def test_child_that_reads_late_gets_all_the_same(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    child("time.sleep(0.5)" + KEEP)
    with live_runs() as tracker:
        for number in range(1, 2001):
            tracker.log_epoch("bn", epoch(number))
    assert [row["epoch"] for row in received()] == list(range(1, 2001))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("program", ["sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_child_that_dies_is_no_trouble(
    child: Callable[[str], None], capfd: pytest.CaptureFixture[str], program: str
) -> None:
    child(program)
    with live_runs() as tracker:
        tracker.begin("bn", "cpu")
        time.sleep(0.3)
        tracker.log_epoch("bn", epoch(1))
        tracker.log_epoch("bn", epoch(2))
    assert capfd.readouterr().err.splitlines() == [INCOMPLETE]


def test_child_that_cannot_start_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with live_runs() as tracker:
        tracker.begin("bn", "cpu")
        tracker.log_epoch("bn", epoch(1))
        tracker.end("bn", "FINISHED")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow will not show this while it trains: ")


def test_no_child_outlives_training(child: Callable[[str], None]) -> None:
    child("open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    with live_runs():
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
    monkeypatch.setattr(live, "DELIVERY_GRACE_S", 60.0)  # the machine may be busy


@pytest.mark.usefixtures("patient")
def test_training_is_in_the_store_when_it_ends(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "mlflow.db").write_bytes(store.empty_database())
    with live_runs() as tracker:
        for variant in VARIANTS:
            tracker.begin(variant, "cpu")
        for number in (1, 2, 3):
            tracker.log_epoch("bn", epoch(number))
        tracker.log_epoch("plain", epoch(1))
        tracker.end("plain", "FAILED")
    assert capfd.readouterr().err == ""
    found = {run.data.params["variant"]: run for run in store.all_runs(folder)}
    assert {variant: run.info.status for variant, run in found.items()} == {
        "bn": "FINISHED",
        "plain": "FAILED",
    }
    curve = [(number, 1 / number) for number in (1, 2, 3)]
    assert store.history(folder, found["bn"], "curves/train_loss") == curve
    assert store.history(folder, found["plain"], "curves/train_loss") == curve[:1]


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_two_trainings_at_once_create_the_store_and_are_one_run(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_runs() as one, live_runs() as other:
        for tracker in (one, other):
            tracker.begin("bn", "cpu")
        for number in (1, 2, 3):
            for tracker in (one, other):
                tracker.log_epoch("bn", epoch(number))
    assert capfd.readouterr().err == ""
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(folder, run, "curves/valid_loss")] == [1, 2, 3]


@pytest.mark.parametrize(
    "server",
    # one that hangs is in end_to_end/test_faults.py too
    [store.refusing, pytest.param(store.hanging, marks=pytest.mark.slow)],
)
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
        with live_runs() as tracker:
            tracker.begin("bn", "cpu")
            warning = ""
            while server is store.refusing and not warning:
                warning = capfd.readouterr().err
            tracked = fit(
                models[1],
                train,
                valid,
                train_params,
                on_epoch=lambda epoch: tracker.log_epoch("bn", asdict(epoch)),
            )
            start = time.monotonic()
        assert time.monotonic() - start < live.DELIVERY_GRACE_S + 1
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
        from dataclasses import asdict
        from mnist_batchnorm.training.loop import Epoch
        from mnist_batchnorm.training.live import live_runs
        with live_runs() as tracker:
            tracker.begin("bn", "cpu")
            tracker.log_epoch("bn", asdict(Epoch(1, 0.5, 0.5, 0.5, 0.5)))
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
    program = "import mnist_batchnorm.training.live, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
