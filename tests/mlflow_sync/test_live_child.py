"""The child process beside training: what it is told is in MLflow, whatever the store does."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mnist_batchnorm.mlflow_sync.live_child import record_live
from mnist_batchnorm.mlflow_sync.points import CURVE
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity
from mnist_batchnorm.mlflow_sync.run_store import RunStore
from tests.support import store


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, ready to be trained in, with an empty store."""
    store.use_settings(monkeypatch)
    store.make_trainable(project)
    (project / "mlflow.db").write_bytes(store.empty_database())
    return project


@pytest.fixture
def sent() -> Callable[[bytes], int]:
    """The reading end of a pipe whose writer has said this and gone."""

    def write(content: bytes) -> int:
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        return reader

    return write


START = 1700000000000  # as `now` counts


def begun(variant: str = "bn") -> bytes:
    return message({"variant": variant, "device": "cpu", "params": "", "time": START})


def ended(variant: str = "bn", status: str = "FINISHED") -> bytes:
    return message({"variant": variant, "status": status})


def epoch(number: int, variant: str = "bn", loss: float = 0.5, late: int = 0) -> bytes:
    time = START + 1000 * number + late
    return message({"variant": variant, **store.row(number, loss), "time": time})


def message(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


MESSAGES = begun() + epoch(1)


def test_following_records_when_an_epoch_ended(folder: Path, sent: Callable[[bytes], int]) -> None:
    assert record_live(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    (point,) = store.client(folder).get_metric_history(run.info.run_id, "curves/train_loss")
    assert (point.step, point.value, point.timestamp) == (1, 0.5, START + 1000)


def test_run_starts_with_training_and_not_with_mlflow(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    assert record_live(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.info.start_time == START


@pytest.mark.parametrize("content", [begun(), MESSAGES, MESSAGES + epoch(2)[:20]])
def test_training_that_was_killed_leaves_a_killed_run(
    folder: Path, sent: Callable[[bytes], int], content: bytes
) -> None:
    record_live(sent(content))
    (run,) = store.all_runs(folder)
    assert run.info.status == "KILLED"
    epochs = len(store.history(folder, run, "curves/train_loss"))
    assert epochs == (1 if MESSAGES in content else 0)


def test_machine_is_measured_when_the_user_asks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")  # seconds
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    reader, writer = os.pipe()
    os.write(writer, MESSAGES)
    result: list[bool] = []
    thread = threading.Thread(target=lambda: result.append(record_live(reader)))
    thread.start()

    def measured() -> bool:
        return any(
            name.startswith("system/") for r in store.all_runs(folder) for name in r.data.metrics
        )

    deadline = time.monotonic() + 60
    while not measured() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.write(writer, ended())
    os.close(writer)
    thread.join(60)
    assert result == [True]
    assert measured()
    (run,) = store.all_runs(folder)
    assert run.info.status == "FINISHED"
    assert "SystemMetricsMonitor" not in {t.name for t in threading.enumerate()}


def test_nothing_to_follow_makes_no_store(
    folder: Path, sent: Callable[[bytes], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mlflow.db").unlink()
    assert record_live(sent(b""))
    assert not list(folder.glob("*mlflow*"))
    assert capsys.readouterr().err == ""


def test_two_trainings_are_two_runs_that_end_each_in_its_way(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    content = [
        begun("plain"),
        begun("bn"),
        epoch(1, "bn", loss=0.5),
        epoch(1, "plain", loss=0.6),
        ended("plain", "FAILED"),
        epoch(2, "bn", loss=0.5),
        ended("bn"),
    ]
    assert record_live(sent(b"".join(content)))
    found = {run.data.params["variant"]: run for run in store.all_runs(folder)}
    assert {variant: run.info.status for variant, run in found.items()} == {
        "bn": "FINISHED",
        "plain": "FAILED",
    }
    assert store.history(folder, found["bn"], "curves/train_loss") == [(1, 0.5), (2, 0.25)]
    assert store.history(folder, found["plain"], "curves/train_loss") == [(1, 0.6)]


def test_training_that_was_killed_beside_one_that_ended_is_killed(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    record_live(sent(begun("bn") + begun("plain") + ended("bn") + epoch(1, "plain")))
    statuses = {run.data.params["variant"]: run.info.status for run in store.all_runs(folder)}
    assert statuses == {"bn": "FINISHED", "plain": "KILLED"}


def test_rows_that_a_resumed_training_tells_again_make_no_doubles(
    folder: Path, sent: Callable[[bytes], int]
) -> None:
    record_live(sent(begun() + epoch(1) + epoch(2)))
    again = begun() + epoch(1, late=60_000) + epoch(2, late=60_000) + epoch(3, late=60_000)
    assert record_live(sent(again + ended()))
    (run,) = store.all_runs(folder)
    assert (run.info.status, run.info.start_time) == ("FINISHED", START)
    for metric in CURVE.values():
        points = store.client(folder).get_metric_history(run.info.run_id, metric)
        assert sorted((p.step, p.timestamp - START) for p in points) == [
            (1, 1000),
            (2, 2000),
            (3, 63_000),
        ]


def test_outage_that_ends_leaves_only_a_warning(
    folder: Path,
    sent: Callable[[bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = RunStore.record
    outcomes = iter([ConnectionResetError("server restarts"), None])

    def restarting(*arguments: Any) -> str:
        if error := next(outcomes):
            raise error
        return record(*arguments)

    monkeypatch.setattr(RunStore, "record", restarting)
    assert record_live(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert (run.info.status, run.data.metrics["curves/valid_loss"]) == ("FINISHED", 0.55)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: MLflow at sqlite:///{folder}/mlflow.db: server restarts"


def test_outage_to_the_end_is_reported_with_one_warning(
    folder: Path,
    sent: Callable[[bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with store.refusing() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert not record_live(sent(MESSAGES + ended()))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: MLflow at {uri}: [Errno 111] Connection refused"


def test_what_is_wrong_with_the_folder_is_said(
    folder: Path, sent: Callable[[bytes], int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.py").unlink()
    assert not record_live(sent(begun() + ended()))
    assert "stage train depends on train.py" in capsys.readouterr().err


def test_params_are_those_that_training_read(folder: Path, sent: Callable[[bytes], int]) -> None:
    text = (folder / "params.yaml").read_text()
    store.edit(folder / "params.yaml", "lr: 0.01", "lr: 0.77")  # while MLflow was imported
    begin = {"variant": "bn", "device": "cpu", "params": text, "time": START}
    assert record_live(sent(message(begin) + epoch(1) + ended()))
    (run,) = store.all_runs(folder)
    assert run.data.params["train.lr"] == "0.01"


def test_origin_is_that_of_the_start(
    folder: Path, sent: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = RunIdentity.of_workspace("bn", "cpu").key
    opening = RunStore.open

    def edited_meanwhile(experiment: str, root: Path) -> RunStore:
        store.edit(folder / "params.yaml", "lr: 0.01", "lr: 0.003")
        return opening(experiment, root)

    monkeypatch.setattr(RunStore, "open", edited_meanwhile)
    assert record_live(sent(MESSAGES + ended()))
    (run,) = store.all_runs(folder)
    assert run.data.tags["mnist_bn.key"] == key
