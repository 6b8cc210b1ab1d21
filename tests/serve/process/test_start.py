"""What the server imports."""

import subprocess
import sys


def loaded(*imports: str) -> set[str]:
    heavy = {"dvc", "mlflow", "onnxruntime", "torch"}
    script = f"import sys, {', '.join(imports)}; print(*{heavy} & sys.modules.keys())"
    command = [sys.executable, "-c", script]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_a_worker_imports_neither_torch_nor_mlflow() -> None:
    package = "mnist_batchnorm.serve"
    assert loaded(f"{package}.process.worker", f"{package}.grpc.service") <= {"onnxruntime"}


def test_the_process_that_forks_does_not_import_onnx_runtime() -> None:
    assert loaded("mnist_batchnorm.serve.process.start") == set()
