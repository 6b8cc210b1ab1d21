"""The whole pipeline: real `dvc repro` on a slice of real MNIST, in a copy, offline."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from ruamel.yaml import YAML

from mnist_batchnorm.artifacts.splits import load_split, network_input
from mnist_batchnorm.core.paths import GRAPHS
from mnist_batchnorm.mlflow_sync.uri import TRAINING_RUNS
from tests.support.pipeline import ROOT, Project, make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after one `dvc repro`."""
    project = make_project(tmp_path_factory.mktemp("pipeline") / "project")
    project.check("dvc", "repro")
    return project


def test_everything_is_made(project: Project) -> None:
    made = project.hashes("models/*", "reports/**/*.json", "reports/**/*.csv", "reports/*.html")
    assert {
        "models/bn.safetensors",
        "models/plain.safetensors",
        "models/bn.onnx",
        "models/bn-folded.onnx",
        "models/plain.onnx",
        "reports/parity.json",
        "reports/index.html",
        "reports/metrics/data.json",
        "reports/metrics/test-bn.json",
        "reports/curves/plain.csv",
        "reports/confusion/bn.csv",
    } <= made.keys()


def test_outputs_that_dvc_keeps_stay_out_of_git(project: Project) -> None:
    untracked = project.check("git", "status", "--porcelain", "--untracked-files=all").split()
    changed = {name for name in untracked if name not in {"??", "M"}}
    assert "dvc.lock" in changed
    assert {name.split("/")[0] for name in changed} == {"dvc.lock", "models", "reports"}
    assert {name for name in changed if name.startswith("models/")} == {"models/registry.json"}


def test_curve_has_a_row_an_epoch(project: Project) -> None:
    with (project.folder / "reports/curves/bn.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_both_networks_learn(project: Project) -> None:
    for variant in ("bn", "plain"):
        metrics = json.loads((project.folder / f"reports/metrics/test-{variant}.json").read_text())
        assert metrics["accuracy"] > 0.6  # of 500 images after 168 steps; chance is 0.1


def test_onnx_file_reaches_the_measured_accuracy(project: Project) -> None:
    split = load_split(project.folder / "data/prepared/test.safetensors")
    for name, exported in GRAPHS.items():
        path = project.folder / f"reports/metrics/test-{exported.variant}.json"
        metrics = json.loads(path.read_text())
        session = ort.InferenceSession(project.folder / "models" / name)
        (logits,) = session.run(["logits"], {"image": network_input(split.images)})
        assert np.mean(logits.argmax(axis=1) == split.labels) == metrics["accuracy"]


def test_parity_report_is_about_these_files(project: Project) -> None:
    report = json.loads((project.folder / "reports/parity.json").read_text())
    assert report["parity"] is True
    assert list(report["graphs"]) == list(GRAPHS)
    hashes = project.hashes("models/*.onnx", "models/*.safetensors")
    for name, graph in report["graphs"].items():
        assert graph["onnx"]["sha256"] == hashes[f"models/{name}"]
        weights = f"models/{GRAPHS[name].variant}.safetensors"
        assert graph["weights"] == {"path": weights, "sha256": hashes[weights]}
        assert graph["summary"]["argmax_differences"] == 0


def test_mlflow_has_one_finished_run_per_network(project: Project) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist-batchnorm'")
    runs = {
        run.data.tags["mnist_bn.variant"]: run
        for run in client.search_runs([experiment.experiment_id], TRAINING_RUNS)
    }
    assert runs.keys() == {"bn", "plain"}
    for variant, run in runs.items():
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "curves/valid_accuracy")
        assert sorted(point.step for point in history) == [1, 2, 3]
        metrics = json.loads((project.folder / f"reports/metrics/test-{variant}.json").read_text())
        assert run.data.metrics["test/accuracy"] == metrics["accuracy"]
    seeds = client.search_runs([experiment.experiment_id], "tags.dvc.stage = 'seeds'")
    assert [run.info.status for run in seeds] == ["FINISHED"] * 11  # 5 of each, and over all


def test_readme_snippet_runs(project: Project) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert project.check("python", "-c", snippet + "print(logits.shape)").strip() == "(1, 10)"


def test_second_repro_does_nothing(project: Project) -> None:
    before = project.hashes("dvc.lock", "models/*", "reports/**/*.*")
    assert "Running stage" not in project.check("dvc", "repro")
    assert project.hashes("dvc.lock", "models/*", "reports/**/*.*") == before


def test_dvc_has_something_to_show(project: Project) -> None:
    table = project.check("dvc", "metrics", "show", "--md")
    assert "accuracy" in table
    assert max(map(len, table.splitlines())) < 250  # a line that a wide terminal shows
    project.check("dvc", "plots", "show")
    assert (project.folder / "dvc_plots/index.html").stat().st_size > 0


@pytest.mark.slow
def test_fresh_clone_runs_the_gate_and_tells_its_own_mlflow(
    tmp_path: Path, project: Project
) -> None:
    from mlflow.tracking import MlflowClient

    source, clone = Project(tmp_path / "project"), Project(tmp_path / "clone")
    shutil.copytree(project.folder, source.folder, symlinks=True)
    source.check("git", "add", "-A")
    source.check("git", "commit", "-qm", "results")
    source.check("git", "clone", "-q", ".", str(clone.folder))
    output = clone.check("dvc", "repro")
    assert "Running stage 'verify'" in output
    assert clone.check("git", "status", "--porcelain") == ""
    client = MlflowClient(f"sqlite:///{clone.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist-batchnorm'")
    runs = client.search_runs([experiment.experiment_id], TRAINING_RUNS)
    assert all("test/accuracy" in run.data.metrics for run in runs)
    assert len(client.search_logged_models([experiment.experiment_id])) == 2


@pytest.mark.slow
def test_reverted_parameter_takes_training_from_the_cache(tmp_path: Path, project: Project) -> None:
    copy = Project(tmp_path / "project")
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    before = (copy.folder / "params.yaml").read_text()
    (copy.folder / "params.yaml").write_text(before.replace("epochs: 3", "epochs: 1"))
    copy.check("dvc", "repro", "train")
    (copy.folder / "params.yaml").write_text(before)
    output = copy.check("dvc", "repro", "train")
    assert "Stage 'train' is cached - skipping run" in output


@pytest.mark.slow
def test_forced_repro_makes_the_same_bytes(project: Project) -> None:
    lock = YAML(typ="safe").load(project.folder / "dvc.lock")
    reports = project.hashes("reports/**/*.*")
    project.check("dvc", "repro", "--force")
    assert YAML(typ="safe").load(project.folder / "dvc.lock") == lock
    assert project.hashes("reports/**/*.*") == reports


@pytest.mark.slow
def test_export_parameter_reruns_export_and_what_follows(tmp_path: Path, project: Project) -> None:
    copy = Project(tmp_path / "project")
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    params = (copy.folder / "params.yaml").read_text()
    assert "opset: 20" in params
    (copy.folder / "params.yaml").write_text(params.replace("opset: 20", "opset: 19"))
    output = copy.check("dvc", "repro")
    ran = {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}
    assert ran == {"export", "verify", "register", "report", "sync"}


@pytest.mark.slow
def test_experiment_logs_to_the_same_store_under_its_name(tmp_path: Path, project: Project) -> None:
    from mlflow.tracking import MlflowClient

    copy = Project(tmp_path / "project")
    shutil.copytree(project.folder, copy.folder, symlinks=True)
    copy.check("git", "add", "-A")
    copy.check("git", "commit", "-qm", "results")
    copy.check("dvc", "exp", "run", "--temp", "-n", "slower", "-S", "train.lr=0.003")
    client = MlflowClient(f"sqlite:///{copy.folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mnist-batchnorm'")
    runs = client.search_runs([experiment.experiment_id], TRAINING_RUNS)
    experiments = [run for run in runs if run.data.tags.get("dvc.exp_name") == "slower"]
    assert {run.data.tags["mnist_bn.variant"] for run in experiments} == {"bn", "plain"}
    assert {run.data.params["train.lr"] for run in experiments} == {"0.003"}
