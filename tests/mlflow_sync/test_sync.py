"""The last stage makes MLflow hold what the files hold, however often it runs."""

import csv
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pytest

from mnist_batchnorm.artifacts.predictions import read_confusion
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS
from mnist_batchnorm.mlflow_sync import artifacts
from mnist_batchnorm.mlflow_sync.points import curve_points
from mnist_batchnorm.mlflow_sync.run_identity import RunIdentity
from mnist_batchnorm.mlflow_sync.run_store import PARENT_TAG, RunStore
from mnist_batchnorm.mlflow_sync.uri import tracking_uri
from tests.conftest import ROOT, MnistBn
from tests.support import recorded, store

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run


@pytest.fixture
def folder(project: Path, results: Path, backend: str) -> Path:
    """The working folder, with all of that and an empty store."""
    assert backend
    shutil.copytree(results, project, dirs_exist_ok=True)
    return project


@pytest.fixture(scope="module")
def synced_results(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a sync with its database."""
    folder = tmp_path_factory.mktemp("synced") / "project"
    shutil.copytree(results, folder)
    shutil.copy(ROOT / "params.yaml", folder)
    recorded.sync(folder)
    return folder


@pytest.fixture
def synced(
    project: Path, results: Path, backend: str, request: pytest.FixtureRequest, mnist_bn: MnistBn
) -> Path:
    """The working folder after a sync."""
    if backend == "sqlite":
        store.copy_project(request.getfixturevalue("synced_results"), project)
    else:
        shutil.copytree(results, project, dirs_exist_ok=True)
        assert mnist_bn("sync").status == 0
    return project


def runs_by_variant(folder: Path) -> "dict[str, Run]":
    """The training runs."""
    found = [run for run in store.all_runs(folder) if store.stage_of(run) == "train"]
    by_variant = {run.data.tags["mnist_bn.variant"]: run for run in found}
    assert len(by_variant) == len(found), "more than one run of a network"
    return by_variant


def runs_of_seeds(folder: Path) -> "dict[str, Run]":
    """The runs of stage seeds by name."""
    found = [run for run in store.all_runs(folder) if store.stage_of(run) == "seeds"]
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def models(folder: Path) -> "list[LoggedModel]":
    client = store.client(folder)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return sorted(client.search_logged_models(ids), key=lambda model: str(model.name))


def everything(folder: Path) -> Any:
    """All that the store holds, with the times, and artefacts with the time they were written."""
    files = {
        path: path.stat().st_mtime_ns
        for path in (folder / "mlartifacts").rglob("*")
        if path.is_file()
    }
    runs = [run.to_dictionary() for run in store.all_runs(folder)]
    points = [
        store.history(folder, run, name)
        for run in store.all_runs(folder)
        for name in run.data.metrics
    ]
    return files, runs, points, [model.to_dictionary() for model in models(folder)]


def test_runs_match_the_files(folder: Path, mnist_bn: MnistBn) -> None:
    done = mnist_bn("sync")
    assert (done.status, done.err) == (0, "")
    runs = runs_by_variant(folder)
    assert runs.keys() == {"bn", "plain"}
    seeds = runs_of_seeds(folder)["workspace/seeds"]
    for variant, run in (runs | {"seeds": seeds}).items():
        assert f"{variant}: MLflow run {run.info.run_id}" in done.out
    for variant, run in runs.items():
        assert run.info.status == "FINISHED"
        test = json.loads((folder / f"reports/metrics/test-{variant}.json").read_text())
        assert run.data.metrics["test/accuracy"] == test["accuracy"]
        assert run.data.metrics["test/loss"] == test["loss"]
        assert run.data.metrics["test/calibration_error"] == test["calibration_error"]
        _, per_class = read_confusion(variant)
        assert per_class.keys() == set(range(10))
        for digit, accuracy in per_class.items():
            assert run.data.metrics[f"test_class_accuracy/{digit}"] == accuracy
        rows = (folder / f"reports/curves/{variant}.csv").read_text().splitlines()[1:]
        curve = [(int(row.split(",")[0]), float(row.split(",")[1])) for row in rows]
        assert store.history(folder, run, "curves/train_loss") == curve
        common = ["index.html", "model_card.md", "plots/curves.svg"]
        own = [f"confusion/{variant}.csv", f"plots/confusion-{variant}.svg"]
        files = [Path(name).stem for name, of in GRAPHS.items() if of.variant == variant]
        parity = ["parity.json", *(f"plots/parity-{file}.svg" for file in files)]
        assert store.artifacts(folder, run) == {
            name: (folder / "reports" / name).read_bytes() for name in [*common, *own, *parity]
        }


def test_parity_and_models_are_those_of_the_network(synced: Path) -> None:
    for variant, run in runs_by_variant(synced).items():
        own = {name for name, of in GRAPHS.items() if of.variant == variant}
        assert run.data.tags["parity"] == "passed"
        assert {name: value for name, value in run.data.metrics.items() if "parity" in name} == {
            **{f"parity_max_relative_error/{name}": 7.5e-7 for name in own},
            **{f"parity_worst_sigmas/{name}": 3.04 for name in own},
        }
        of_run = [model for model in models(synced) if model.source_run_id == run.info.run_id]
        assert {f"{model.name}.onnx" for model in of_run} == own


def test_runs_of_seeds_match_the_files(synced: Path) -> None:
    found = runs_of_seeds(synced)
    parent = found.pop("workspace/seeds")
    summary = json.loads((synced / "reports/metrics/seeds.json").read_text())
    gain = summary["bn_minus_plain"]["test_accuracy"]
    assert parent.data.metrics == {
        **{
            f"seeds/{variant}_{measure}_{figure}": summary[variant][measure][figure]
            for variant in VARIANTS
            for measure in ("test_accuracy", "test_loss")
            for figure in ("mean", "sd")
        },
        "seeds/bn_minus_plain_test_accuracy_mean": gain["mean"],
        "seeds/bn_minus_plain_test_accuracy_sd": gain["sd"],
        "seeds/bn_minus_plain_test_accuracy_low": gain["interval_95"][0],
        "seeds/bn_minus_plain_test_accuracy_high": gain["interval_95"][1],
    }
    assert parent.info.status == "FINISHED"
    assert store.artifacts(synced, parent) == {
        name: (synced / "reports" / name).read_bytes()
        for name in ("plots/seeds.svg", "metrics/seeds.json", "curves/seeds.csv")
    }
    with (synced / "reports/curves/seeds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert found.keys() == {f"workspace/seeds/{row['variant']}-{row['seed']}" for row in rows}
    for name, run in found.items():
        variant, _, seed = name.removeprefix("workspace/seeds/").partition("-")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (run.data.params["variant"], run.data.params["train.seed"]) == (variant, seed)
        own = [row for row in rows if (row["variant"], row["seed"]) == (variant, seed)]
        for measure in ("valid_loss", "valid_accuracy"):
            expected = [(int(row["epoch"]), float(row[measure])) for row in own]
            assert store.history(synced, run, f"seed_curves/{measure}") == expected
        for measure in ("accuracy", "loss"):
            values = summary[variant][f"test_{measure}"]["values"]
            assert run.data.metrics[f"seed_test/{measure}"] == values[int(seed)]
    # so that the charts of the training runs do not show these
    trained = {name for run in runs_by_variant(synced).values() for name in run.data.metrics}
    metrics = {name for run in (parent, *found.values()) for name in run.data.metrics}
    assert not {m.partition("/")[0] for m in metrics} & {m.partition("/")[0] for m in trained}


def test_onnx_models_are_the_files_and_can_be_served(synced: Path) -> None:
    import mlflow

    found = models(synced)
    assert [(model.name, model.status) for model in found] == [
        ("bn", "READY"),
        ("bn-folded", "READY"),
        ("plain", "READY"),
    ]
    images = np.random.default_rng(0).random((5, 784), dtype=np.float32)
    for model in found:
        uri = f"models:/{model.model_id}"
        (logged,) = Path(mlflow.artifacts.download_artifacts(uri)).glob("*.onnx")
        assert logged.read_bytes() == (synced / f"models/{model.name}.onnx").read_bytes()
        assert model.params["train.lr"] == "0.01"
        assert model.params["export.opset"] == "20"
        assert {metric.key for metric in model.metrics} >= {"test/accuracy", "test/loss"}
        loaded = mlflow.pyfunc.load_model(f"models:/{model.model_id}")
        assert loaded.predict({"image": images})["logits"] == pytest.approx(images[:, :10])
        schema = loaded.metadata.signature.to_dict()
        assert json.loads(schema["inputs"])[0]["tensor-spec"] == {
            "dtype": "float32",
            "shape": [-1, 784],
        }
        assert json.loads(schema["outputs"])[0]["tensor-spec"] == {
            "dtype": "float32",
            "shape": [-1, 10],
        }
        assert loaded.metadata.flavors["onnx"]["providers"] == ["CPUExecutionProvider"]
        assert loaded.input_example["image"].shape == (3, 784)


def test_sync_is_idempotent(folder: Path, mnist_bn: MnistBn) -> None:
    first = mnist_bn("sync")
    before = everything(folder)
    again = mnist_bn("sync")
    assert (again.status, again.out, again.err) == (0, "MLflow has all of it\n", "")
    (folder / "mlflow.db.synced").unlink()  # so that it looks at all of it again
    assert mnist_bn("sync") == first
    assert everything(folder) == before


def test_changed_report_is_logged_again_and_the_model_is_not(
    synced: Path, mnist_bn: MnistBn
) -> None:
    before = [model.model_id for model in models(synced)]
    (synced / "reports/index.html").write_text("a better page")
    mnist_bn("sync")
    for run in runs_by_variant(synced).values():
        assert store.artifacts(synced, run)["index.html"] == b"a better page"
    assert [model.model_id for model in models(synced)] == before


def test_live_run_that_was_cut_off_is_completed(folder: Path, mnist_bn: MnistBn) -> None:
    header, first, *_ = (folder / "reports/curves/bn.csv").read_text().splitlines()
    row = {k: float(v) for k, v in zip(header.split(","), first.split(","), strict=True)}
    opened = RunStore.open("mnist-batchnorm", folder)
    run_id = opened.record(RunIdentity.of_workspace("bn", "cpu"), curve_points(row), "KILLED")
    mnist_bn("sync")
    run = runs_by_variant(folder)["bn"]
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert [step for step, _ in store.history(folder, run, "curves/train_loss")] == [1, 2, 3]


def test_model_whose_upload_failed_is_not_left_behind(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.onnx

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.onnx, "log_model", full)
        done = mnist_bn("sync")
    assert done.status == 0
    assert "No space left on device" in done.err.splitlines()[0]
    assert models(folder) == []


def test_model_whose_upload_was_killed_is_replaced(
    synced: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, (model, *_) = store.client(synced), models(synced)
    experiment, run_id, sha256 = model.experiment_id, model.source_run_id, model.tags["sha256"]
    client.delete_logged_model(model.model_id)
    client.create_logged_model(experiment, "bn", run_id, tags={"sha256": sha256})
    assert "PENDING" in [model.status for model in models(synced)]
    monkeypatch.setattr(artifacts, "UPLOAD_TIMEOUT_MS", -1)  # ms
    assert mnist_bn("sync").err == ""
    assert [(model.name, model.status) for model in models(synced)] == [
        ("bn", "READY"),
        ("bn-folded", "READY"),
        ("plain", "READY"),
    ]


def test_model_whose_upload_was_killed_on_this_machine_is_replaced_at_once(
    synced: Path, mnist_bn: MnistBn
) -> None:
    client, (model, *_) = store.client(synced), models(synced)
    opened = RunStore.open("mnist-batchnorm", synced)
    tags = model.tags | {artifacts.LOCK_TAG: opened.lock_id}
    client.delete_logged_model(model.model_id)
    client.create_logged_model(model.experiment_id, "bn", model.source_run_id, tags=tags)
    assert "PENDING" in [model.status for model in models(synced)]
    assert mnist_bn("sync").err == ""
    assert [(model.name, model.status) for model in models(synced)] == [
        ("bn", "READY"),
        ("bn-folded", "READY"),
        ("plain", "READY"),
    ]


def test_model_that_was_there_before_its_run_is_kept(folder: Path, mnist_bn: MnistBn) -> None:
    opened = RunStore.open("mnist-batchnorm", folder)
    path = folder / "models/bn.onnx"
    before = artifacts.log_onnx(opened, path, "bn", None)
    assert mnist_bn("sync").err == ""
    assert [model.name for model in models(folder)] == ["bn", "bn-folded", "plain"]
    assert models(folder)[0].model_id == before


def test_hiccup_of_the_server_is_no_trouble(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    create, outcomes = MlflowClient.create_run, iter([ConnectionResetError(), *[None] * 6])

    def answer_lost(*arguments: Any, **keywords: Any) -> "Run":
        run = create(*arguments, **keywords)
        if error := next(outcomes):
            raise error
        return run

    monkeypatch.setattr(MlflowClient, "create_run", answer_lost)
    assert mnist_bn("sync").err == ""
    assert runs_by_variant(folder).keys() == {"bn", "plain"}


def test_experiment_gives_its_name_to_the_runs(
    folder: Path, mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "slower")
    mnist_bn("sync")
    runs = store.all_runs(folder)
    assert {run.info.run_name for run in runs if PARENT_TAG not in run.data.tags} == {
        "slower/bn",
        "slower/plain",
        "slower/seeds",
    }
    assert {run.data.tags["dvc.exp_name"] for run in runs} == {"slower"}


def test_last_line_is_the_address_of_the_charts(synced: Path, mnist_bn: MnistBn) -> None:
    last = mnist_bn("sync").out.splitlines()[-1]
    experiment = store.all_runs(synced)[0].info.experiment_id
    uri = tracking_uri(synced)
    if uri.startswith("sqlite:"):
        uri = "make ui (port 5000 unless PORT= says otherwise), http://127.0.0.1:5000"
    assert last == (
        f"compare them: {uri}/#/experiments/{experiment}/runs"
        "?workflowType=machine_learning&compareRunsMode=CHART"
        "&searchFilter=tags.dvc.stage%20%3D%20%27train%27"
    )
    query = unquote(last.rpartition("searchFilter=")[2])
    found = store.client(synced).search_runs([experiment], query)
    assert {run.info.run_id for run in found} == {
        run.info.run_id for run in runs_by_variant(synced).values()
    }


def record(folder: Path) -> Any:
    return json.loads((folder / "reports/synced.json").read_text())


def test_record_is_about_the_content_only(synced: Path, mnist_bn: MnistBn) -> None:
    first = record(synced)["files"]
    assert first.keys() >= {"reports/index.html", "models/plain.safetensors"}
    (synced / "mlflow.db").unlink()
    (synced / "mlflow.db").write_bytes(store.empty_database())
    (synced / "reports/index.html").write_text("another page")
    mnist_bn("sync")
    after = record(synced)["files"]
    assert after.keys() == first.keys()
    assert {p for p in after if after[p] != first[p]} == {"reports/index.html"}


@pytest.mark.parametrize("server", store.BAD_SERVERS)
def test_bad_server_is_a_warning(
    synced: Path,
    mnist_bn: MnistBn,
    monkeypatch: pytest.MonkeyPatch,
    server: Callable[[], AbstractContextManager[str]],
) -> None:
    expected = record(synced)
    (synced / "reports/synced.json").unlink()
    start = time.monotonic()
    with server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        done = mnist_bn("sync")
        if server is store.refusing:
            required = mnist_bn("sync", "--require")
            assert required.status == 1
            assert required.err.endswith("FAILED: MLflow does not have all of it\n")
    assert time.monotonic() - start < 12
    assert (done.status, done.out) == (0, "")
    assert record(synced) == expected
    warning, advice = done.err.splitlines()
    assert warning.startswith(f"warning: MLflow at {uri}: ")
    assert advice == "MLflow does not have all of it; `mnist-bn sync` goes on from here"


@pytest.mark.parametrize("missing", ["reports/curves/plain.csv", "models/plain.safetensors"])
def test_sync_needs_trainings(folder: Path, mnist_bn: MnistBn, missing: str) -> None:
    (folder / missing).unlink()
    done = mnist_bn("sync")
    assert (done.status, done.out) == (2, "")
    assert f"no {missing}; run `dvc repro train` first" in done.err
    assert not (folder / "reports/synced.json").exists()


def test_without_a_later_stage_the_trainings_are_logged(folder: Path, mnist_bn: MnistBn) -> None:
    missing = "reports/parity.json"
    (folder / missing).unlink()
    done = mnist_bn("sync")
    assert done.status == 0
    assert done.err == f"the trainings alone: no {missing}; run `dvc repro verify` first\n"
    for run in runs_by_variant(folder).values():
        assert run.info.status == "FINISHED"
        assert len(store.history(folder, run, "curves/valid_loss")) == 3
        assert "test/accuracy" not in run.data.metrics
