"""MLflow's model folders: proven bytes, in MLflow's format, that MLflow itself loads."""

import json
from pathlib import Path

import mlflow.onnx
import numpy as np
import onnx
import pytest
from mlflow.models import Model

from mnist_batchnorm.core.paths import MODELS, REGISTERED, SERVED
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.parity import runtime
from tests.conftest import MnistBn
from tests.package.conftest import Package, change_parity


@pytest.mark.parametrize("name", SERVED)
def test_mlflow_computes_what_onnx_runtime_does(shared_package: Package, name: str) -> None:
    folder = shared_package("mlflow") / name
    content = (MODELS / SERVED[name]).read_bytes()
    assert (folder / "model.onnx").read_bytes() == content
    images = read_proven().images
    predicted = mlflow.pyfunc.load_model(str(folder)).predict({"image": images})
    assert predicted["logits"].tobytes() == runtime.load(content).run(images).tobytes()


def test_description_tells_the_truth(shared_package: Package) -> None:
    folder = shared_package("mlflow") / "mnist-bn"
    model = Model.load(str(folder))
    (image,), (logits,) = model.signature.inputs.inputs, model.signature.outputs.inputs
    assert (image.name, image.type, image.shape) == ("image", np.dtype("float32"), (-1, 784))
    assert (logits.name, logits.type, logits.shape) == ("logits", np.dtype("float32"), (-1, 10))
    assert model.metadata["sha256"] == read_proven().models[0].sha256
    assert model.flavors["onnx"]["onnx_session_options"]["intra_op_num_threads"] == 1
    example = json.loads((folder / "serving_input_example.json").read_text())
    image = np.array(example["inputs"]["image"], np.float32)
    assert image.tobytes() == read_proven().images[:1].tobytes()


@pytest.mark.usefixtures("proven")
def test_requires_the_onnx_runtime_of_the_proof(mnist_bn: MnistBn) -> None:
    change_parity(lambda content: content["versions"].update(onnxruntime="1.23.0"))
    done = mnist_bn("package", "mlflow", "out")
    assert done.status == 0
    assert "required: onnxruntime==1.23.0" in done.err  # MLflow sees that another is installed
    required = Path("out/mnist-bn/requirements.txt").read_text().splitlines()
    assert "onnxruntime==1.23.0" in required
    assert [line.partition("==")[0] for line in required] == [
        "mlflow",
        "numpy",
        "onnx",
        "onnxruntime",
    ]


def test_mlserver_gives_the_names_and_versions_of_our_server(shared_package: Package) -> None:
    folder = shared_package("mlflow")
    for name in REGISTERED:
        assert json.loads((folder / name / "model-settings.json").read_text()) == {
            "name": name,
            "implementation": "mlserver_mlflow.MLflowRuntime",
            "parameters": {"uri": ".", "version": "1"},
        }


@pytest.mark.usefixtures("proven")
def test_other_bytes_than_the_proven_are_refused(
    mnist_bn: MnistBn, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = onnx.save_model

    def improve(graph: onnx.ModelProto, *arguments: object, **options: object) -> None:
        graph.producer_name = "improved"
        save(graph, *arguments, **options)

    monkeypatch.setattr(onnx, "save_model", improve)
    done = mnist_bn("package", "mlflow", "out")
    assert done.status == 1
    assert done.err == (
        "FAILED: models/bn.onnx is not packaged: MLflow wrote other bytes than the gate passed\n"
    )
    assert not Path("out").exists()


def test_leaves_no_store_behind(package: Package, proven: Path) -> None:
    before = {path.name for path in proven.iterdir()}
    package("mlflow")
    assert {path.name for path in proven.iterdir()} - before == {"out"}
