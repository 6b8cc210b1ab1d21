"""An S3-compatible store behind MLflow's artefacts and DVC's cache."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import services
from tests.support.services import S3

BLOB = bytes(range(256)) * 40_000  # 10 MB: MLflow and DVC upload it in parts


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    """A bucket for all of these tests."""
    with services.s3("mnist") as store:
        yield store


def test_mlflow_server_keeps_artefacts_in_a_bucket(
    store: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    (tmp_path / "bn.onnx").write_bytes(BLOB)
    with services.mlflow_server(
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        f"s3://{store.bucket}/mlflow",
        folder=tmp_path,
        env=store.environment,
    ) as server:
        client = MlflowClient(server.uri)
        experiment = client.create_experiment("in a bucket")
        run_id = client.create_run(experiment).info.run_id
        # this process has no keys: only the server talks to the store
        client.log_artifact(run_id, str(tmp_path / "bn.onnx"), "models")
        key = f"mlflow/{experiment}/{run_id}/artifacts/models/bn.onnx"
        assert store.objects()[key] == BLOB
        (tmp_path / "down").mkdir()
        client.download_artifacts(run_id, "models", str(tmp_path / "down"))
    assert (tmp_path / "down/models/bn.onnx").read_bytes() == BLOB


@dataclass(frozen=True)
class Shell:
    """Runs commands that must succeed, with nothing of this user's settings."""

    home: Path
    credentials: dict[str, str]

    def run(self, folder: Path, *command: str) -> str:
        """Return what a command printed."""
        settings = {
            "HOME": str(self.home),
            "DVC_NO_ANALYTICS": "true",
            "DVC_SITE_CACHE_DIR": str(self.home),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
        }
        done = subprocess.run(
            command,
            cwd=folder,
            env=services.isolated(**settings, **self.credentials),
            capture_output=True,
            text=True,
            check=False,
            timeout=services.PATIENCE,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def test_dvc_pushes_to_a_bucket_and_a_clone_pulls(store: S3, tmp_path: Path) -> None:
    source, clone = tmp_path / "source", tmp_path / "clone"
    source.mkdir()
    (source / "model.bin").write_bytes(BLOB)
    # the endpoint is what DVC's configuration says, which the clone gets
    run = Shell(tmp_path / "home", store.credentials).run
    run(source, "git", "init", "-q")
    run(source, "dvc", "init", "-q")
    run(source, "dvc", "remote", "add", "-d", "shared", f"s3://{store.bucket}/dvc")
    run(source, "dvc", "remote", "modify", "shared", "endpointurl", store.endpoint)
    run(source, "dvc", "add", "model.bin")
    run(source, "git", "add", "-A")
    run(source, "git", "commit", "-qm", "model")
    assert "1 file pushed" in run(source, "dvc", "push")

    md5 = hashlib.md5(BLOB, usedforsecurity=False).hexdigest()
    assert store.objects()[f"dvc/files/md5/{md5[:2]}/{md5[2:]}"] == BLOB

    run(tmp_path, "git", "clone", "-q", str(source), str(clone))
    assert not (clone / "model.bin").exists()
    run(clone, "dvc", "pull")
    assert (clone / "model.bin").read_bytes() == BLOB
