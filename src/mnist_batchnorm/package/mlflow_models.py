"""Folders in MLflow's own format, for ``mlflow models serve`` and for MLServer."""

from pathlib import Path

import onnx

from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.files import write_json
from mnist_batchnorm.mlflow_sync.artifacts import flavor_options
from mnist_batchnorm.package.proven import Proven

EPOCH = "1970-01-01 00:00:00"  # fixed: the same model gives the same files
# as the gate ran it: one thread, in order, all graph optimizations
SESSION = {
    "intra_op_num_threads": 1,
    "inter_op_num_threads": 1,
    "execution_mode": "sequential",
    "graph_optimization_level": 99,
}


def write_mlflow(proven: Proven, directory: Path) -> None:
    """Write each model as an MLflow model into a folder of its name.

    MLServer's ``model-settings.json`` gives it the name and version of this project's own server.

    Raises:
        CheckFailedError: MLflow wrote another file than the gate passed.
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
        settings = {
            "name": model.name,
            "implementation": "mlserver_mlflow.MLflowRuntime",
            "parameters": {"uri": ".", "version": model.version},
        }
        write_json(folder / "model-settings.json", settings)
