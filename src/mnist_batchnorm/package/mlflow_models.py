"""Folders in MLflow's own format, for ``mlflow models serve`` and for MLServer."""

from pathlib import Path

import onnx

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.mlflow_sync.artifacts import flavor_options
from mnist_batchnorm.package.proven import Proven, ProvenModel

EPOCH = "1970-01-01 00:00:00"  # instead of now: the same model gives the same files
# as the gate ran it: one thread, in order, all graph optimizations
SESSION = {
    "intra_op_num_threads": 1,
    "inter_op_num_threads": 1,
    "execution_mode": "sequential",
    "graph_optimization_level": 99,
}


def write_mlflow(proven: Proven, directory: Path) -> None:
    """Fill a folder with one MLflow model for each model, in a folder of its name.

    Beside each ``MLmodel`` lies MLServer's ``model-settings.json``, by which that server gives the
    same folder the name and version that this project's own server gives it.

    Args:
        proven: the models.
        directory: an empty folder.

    Raises:
        CheckFailedError: What MLflow wrote is not the file that the gate passed.
    """
    import mlflow.onnx
    from mlflow.models import Model

    for model in proven.models:
        graph = onnx.load_model_from_string(model.content)
        folder = directory / model.name
        mlflow.onnx.save_model(
            graph,
            folder,
            mlflow_model=Model(utc_time_created=EPOCH, model_uuid=model.sha256[:32]),
            onnx_session_options=SESSION,
            metadata={"sha256": model.sha256, **model.metadata},
            **flavor_options(graph, proven.images[:1], onnxruntime=proven.versions["onnxruntime"]),
        )
        if (folder / "model.onnx").read_bytes() != model.content:
            raise CheckFailedError(
                f"{model.path} is not packaged: MLflow wrote other bytes than the gate passed"
            )
        write_json(folder / "model-settings.json", mlserver_settings(model))


def mlserver_settings(model: ProvenModel) -> dict[str, object]:
    """Return what MLServer is told of an MLflow model in the same folder."""
    return {
        "name": model.name,
        "implementation": "mlserver_mlflow.MLflowRuntime",
        "parameters": {"uri": ".", "version": model.version},
    }
