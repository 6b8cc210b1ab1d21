"""What MLflow keeps as files: reports and pictures of a run, and ONNX files as its models."""

import contextlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_batchnorm.artifacts.splits import CLASSES, SIDE
from mnist_batchnorm.core.files import digest, fingerprint, hashes
from mnist_batchnorm.core.paths import REPORTS
from mnist_batchnorm.mlflow_sync.run_store import Runs, now

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import onnx

    Example = Callable[[], npt.NDArray[np.float32]]

REPORTS_TAG = "mnist_bn.reports"
SHA256_TAG = "sha256"
PLACE_TAG = "mnist_bn.place"
REQUIRED = ("mlflow", "numpy", "onnx", "onnxruntime")  # to run a model of MLflow's ONNX flavor
UPLOAD_TIME = 60_000  # ms after which a model that is not there yet will not come


def log_reports(runs: Runs, run_id: str, reports: Sequence[Path], logged: str | None) -> None:
    """Log files under their paths in ``reports/``, unless MLflow has these very files.

    Args:
        runs: where.
        run_id: the run that they are about.
        reports: the files.
        logged: the run's `REPORTS_TAG`, which says what files it should have.
    """
    state = fingerprint(hashes(reports))
    names = {path.relative_to(REPORTS).as_posix() for path in reports}
    if state == logged and names <= listed(runs, run_id):
        return
    for path in reports:
        folder = path.parent.relative_to(REPORTS).as_posix()
        runs.client.log_artifact(run_id, str(path), None if folder == "." else folder)
    runs.client.set_tag(run_id, REPORTS_TAG, state)


def listed(runs: Runs, run_id: str) -> set[str]:
    """Return the paths of a run's artefacts that are not in folders within folders."""
    found = set()
    for entry in runs.client.list_artifacts(run_id):
        inside = runs.client.list_artifacts(run_id, entry.path) if entry.is_dir else [entry]
        found |= {one.path for one in inside}
    return found


def log_onnx(runs: Runs, path: Path, name: str, example: "Example", run_id: str | None) -> str:
    """Log an ONNX file, byte for byte, as an MLflow model, unless MLflow has it.

    Args:
        runs: where.
        path: the file.
        name: of the model.
        example: gives float32 ``[n, 784]``, shown as the model's input example.
        run_id: the run that it belongs to, if that is known.

    Returns:
        The logged model's id.
    """
    sha256 = digest(path)
    if there := find_model(runs, name, sha256, run_id):
        return there

    import mlflow
    import mlflow.onnx
    import onnx

    mlflow.set_tracking_uri(runs.uri)
    graph = onnx.load(path)
    (opset,) = (entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    params: Mapping[str, str] = runs.client.get_run(run_id).data.params if run_id else {}
    model = mlflow.initialize_logged_model(
        name,
        source_run_id=run_id,
        tags={SHA256_TAG: sha256, PLACE_TAG: runs.place, "mlflow.source.name": "mnist-bn sync"},
        params={**params, "export.opset": str(opset)},
        experiment_id=runs.experiment_id,
    )
    try:
        mlflow.onnx.log_model(
            graph,
            name=name,
            model_id=model.model_id,
            run_id=run_id,
            **flavor_options(graph, example()),
        )
    except Exception:
        with contextlib.suppress(Exception):  # the store may be out of reach for this as well
            runs.client.delete_logged_model(model.model_id)
        raise
    return find_model(runs, name, sha256, run_id) or str(model.model_id)


def flavor_options(
    graph: "onnx.ModelProto", example: "npt.NDArray[np.float32]", **versions: str
) -> dict[str, Any]:
    """Return what MLflow's ONNX flavor is told of a model, to log it or to save it.

    Args:
        graph: the model.
        example: float32 ``[n, 784]``, shown as the model's input example.
        versions: of packages to require; by default those installed.
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
        # named, for MLflow would load the model and guess
        "pip_requirements": [f"{name}=={number}" for name, number in required.items()],
        "save_as_external_data": False,
    }


def find_model(runs: Runs, name: str, sha256: str, run_id: str | None) -> str | None:
    """Return the id of the model that was logged of a file; None if there is none.

    One that was logged before there was a run of its weights counts as any run's: a registered
    version may be of it. An upload that was cut short is deleted, and of doubles that two machines
    logged at the same time all but the first to be there.
    """
    query = f"name = '{name}' AND tags.{SHA256_TAG} = '{sha256}'"
    found = runs.client.search_logged_models([runs.experiment_id], query)
    if run_id:
        own = [model for model in found if model.source_run_id == run_id]
        found = own or [model for model in found if not model.source_run_id]
    kept: str | None = None
    for model in sorted(found, key=lambda model: (model.last_updated_timestamp, model.model_id)):
        ready = model.status == "READY"
        # of this place only who holds the lock uploads, and here that is done or was killed
        elsewhere = model.tags.get(PLACE_TAG) != runs.place
        if not ready and elsewhere and now() - model.last_updated_timestamp < UPLOAD_TIME:
            continue  # another machine is at it
        if ready and not kept and runs.client.list_logged_model_artifacts(model.model_id):
            kept = model.model_id
        else:
            runs.client.delete_logged_model(model.model_id)
    return kept
