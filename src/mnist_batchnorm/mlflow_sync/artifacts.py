"""Files in MLflow: a run's reports and pictures, and ONNX files as logged models."""

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE, load_split, network_input
from mnist_batchnorm.core.arrays import Float32
from mnist_batchnorm.core.files import digest, fingerprint, hashes
from mnist_batchnorm.core.paths import REPORTS, TEST_SPLIT
from mnist_batchnorm.mlflow_sync.points import now
from mnist_batchnorm.mlflow_sync.run_store import RunStore

if TYPE_CHECKING:
    import onnx
    from mlflow.entities import Run

REPORTS_TAG = "mnist_bn.reports"
SHA256_TAG = "sha256"
LOCK_TAG = "mnist_bn.place"
REQUIRED = ("mlflow", "numpy", "onnx", "onnxruntime")  # to run a model of MLflow's ONNX flavor
EXAMPLES = 3  # test images in the models' input example
UPLOAD_TIMEOUT_MS = 60_000  # an upload that is not complete by then has failed


def log_reports(store: RunStore, run: "Run", reports: Sequence[Path]) -> None:
    """Log files under their paths in ``reports/``, unless the run has exactly these."""
    run_id, state = run.info.run_id, fingerprint(hashes(reports))
    names = {path.relative_to(REPORTS).as_posix() for path in reports}
    if run.data.tags.get(REPORTS_TAG) == state and names <= artifact_paths(store, run_id):
        return
    for path in reports:
        folder = path.parent.relative_to(REPORTS).as_posix()
        store.client.log_artifact(run_id, str(path), None if folder == "." else folder)
    store.client.set_tag(run_id, REPORTS_TAG, state)


def artifact_paths(store: RunStore, run_id: str) -> set[str]:
    found = set()
    for entry in store.client.list_artifacts(run_id):
        files = store.client.list_artifacts(run_id, entry.path) if entry.is_dir else [entry]
        found |= {file.path for file in files}
    return found


def log_onnx(store: RunStore, path: Path, name: str, run_id: str | None) -> str:
    """Log an ONNX file, byte for byte, as an MLflow model, unless it has been logged."""
    sha256 = digest(path)
    if existing := find_model(store, name, sha256, run_id):
        return existing

    import mlflow
    import mlflow.onnx
    import onnx

    mlflow.set_tracking_uri(store.uri)
    graph = onnx.load(path)
    example = network_input(load_split(TEST_SPLIT).images[:EXAMPLES])
    (opset,) = (entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    params: Mapping[str, str] = store.client.get_run(run_id).data.params if run_id else {}
    model = mlflow.initialize_logged_model(
        name,
        source_run_id=run_id,
        tags={SHA256_TAG: sha256, LOCK_TAG: store.lock_id, "mlflow.source.name": "mnist-bn sync"},
        params={**params, "export.opset": str(opset)},
        experiment_id=store.experiment_id,
    )
    try:
        mlflow.onnx.log_model(
            graph,
            name=name,
            model_id=model.model_id,
            run_id=run_id,
            **flavor_options(graph, example),
        )
    except Exception:
        with contextlib.suppress(Exception):  # the store may be unreachable for this as well
            store.client.delete_logged_model(model.model_id)
        raise
    return find_model(store, name, sha256, run_id) or str(model.model_id)


def flavor_options(graph: "onnx.ModelProto", example: Float32, **versions: str) -> dict[str, Any]:
    """Return the options with which MLflow's ONNX flavor logs or saves a model.

    Args:
        graph: the model.
        example: float32 ``[n, 784]``, shown as the model's input example.
        versions: versions of packages to require; by default those installed.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    (image,), (logits,) = graph.graph.input, graph.graph.output
    float32 = np.dtype(np.float32)
    required = {name: versions.get(name) or version(name) for name in REQUIRED}
    return {
        "signature": ModelSignature(
            inputs=Schema([TensorSpec(float32, (-1, SIDE * SIDE), image.name)]),
            outputs=Schema([TensorSpec(float32, (-1, CLASSES), logits.name)]),
        ),
        "input_example": {image.name: example},
        "onnx_execution_providers": ["CPUExecutionProvider"],
        # otherwise MLflow would load the model and guess
        "pip_requirements": [f"{name}=={number}" for name, number in required.items()],
        "save_as_external_data": False,
    }


def find_model(store: RunStore, name: str, sha256: str, run_id: str | None) -> str | None:
    """Return the id of the model logged from a file; None if there is none.

    A model logged before its weights had a run counts as any run's: a registered version may refer
    to it. Deletes uploads that were interrupted, and of duplicates that two machines logged at the
    same time all but the first complete one.
    """
    query = f"name = '{name}' AND tags.{SHA256_TAG} = '{sha256}'"
    found = store.client.search_logged_models([store.experiment_id], query)
    if run_id:
        own = [model for model in found if model.source_run_id == run_id]
        found = own or [model for model in found if not model.source_run_id]
    kept: str | None = None
    for model in sorted(found, key=lambda model: (model.last_updated_timestamp, model.model_id)):
        ready = model.status == "READY"
        # this process holds the lock, so no other process with the same lock is uploading
        elsewhere = model.tags.get(LOCK_TAG) != store.lock_id
        age = now() - model.last_updated_timestamp
        if not ready and elsewhere and age < UPLOAD_TIMEOUT_MS:
            continue  # another machine is uploading it
        if ready and not kept and store.client.list_logged_model_artifacts(model.model_id):
            kept = model.model_id
        else:
            store.client.delete_logged_model(model.model_id)
    return kept
