"""Packages in the engines that they are for: each really started, and asked by the same client.

Triton and MLServer are not among this project's packages. Where they are at hand, two variables
name their programs: MNIST_BN_TRITONSERVER, the one in the wheel nvidia-pytriton, installed beside
ONNX Runtime, and MNIST_BN_MLSERVER.
"""

import http.client
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as oip_grpc
import tritonclient.http as oip_http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto
from tritonclient.utils import InferenceServerException

from mnist_batchnorm.core.paths import MODELS, SERVED
from mnist_batchnorm.package.proven import read_proven
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.settings import Settings
from tests.package.conftest import Package
from tests.package.test_kserve import SHELL, instruction
from tests.support import commands
from tests.support.services import free_port
from tests.support.serving import Server

Float32 = npt.NDArray[np.float32]

HOST = "127.0.0.1"
ROWS = (1, 7, 64)
TRITON, MLSERVER = "MNIST_BN_TRITONSERVER", "MNIST_BN_MLSERVER"
TOKEN = "0123456789abcdef"


def program(variable: str) -> Path:
    """The program that a variable names; without one, skip the test."""
    if not (named := os.environ.get(variable)):
        pytest.skip(f"{variable} names no program; docs/packaging.md says which")
    path = Path(named)
    assert os.access(path, os.X_OK), f"{variable}: {path} is no program"
    return path


@contextmanager
def started(
    folder: Path, *words: str, port: int, ready: str, env: dict[str, str]
) -> Iterator[commands.Command]:
    """Start an engine and wait until it says that it is ready."""

    def is_ready(_: commands.Command) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return ask_http(port, "GET", ready)[0] == 200
        return False

    with commands.running(folder, *words, env=commands.environment(**env)) as command:
        command.until(is_ready)
        yield command


def ask_http(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Send a request as curl does."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def expected(name: str, images: Float32) -> Float32:
    """What ONNX Runtime computes in this process."""
    return runtime.load((MODELS / SERVED[name]).read_bytes()).run(images)


def ask(
    url: str,
    name: str,
    version: str,
    images: Float32,
    *,
    binary: bool,
    headers: dict[str, str] | None = None,
) -> Float32:
    """Ask a model over HTTP: the one client for every engine."""
    with oip_http.InferenceServerClient(url, network_timeout=60.0) as client:
        tensor = oip_http.InferInput("image", images.shape, "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        output = oip_http.InferRequestedOutput("logits", binary_data=binary)
        # a copy: the client keeps a header of its own in it
        answer = client.infer(name, [tensor], version, [output], headers=dict(headers or {}))
        described = answer.get_response()
        assert (described["model_name"], described["model_version"]) == (name, version)
        logits: Float32 = answer.as_numpy("logits")
        return logits


def require_same(
    url: str,
    *,
    binary: bool,
    versions: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Hold every model's answers to ONNX Runtime's in this process, bit for bit.

    The versions are those of ``mnist-bn serve`` unless others are given.
    """
    proven = read_proven()
    images, known = proven.images, {model.name: model.version for model in proven.models}
    for name, version in (versions or known).items():
        for rows in ROWS:
            logits = ask(url, name, version, images[:rows], binary=binary, headers=headers)
            assert logits.tobytes() == expected(name, images[:rows]).tobytes()


def require_example(folder: Path, answer: Callable[[str, bytes], tuple[int, bytes]]) -> None:
    """Hold the answers to the package's own request to the package's own answers."""
    request = (folder / "request.json").read_bytes()
    for name, logits in json.loads((folder / "answers.json").read_text()).items():
        status, body = answer(f"/v2/models/{name}/infer", request)
        assert status == 200
        (output,) = json.loads(body)["outputs"]
        assert output["shape"] == logits["shape"]
        assert np.array_equal(np.float32(output["data"]), np.float32(logits["data"]))


# --- MLflow -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_mlflow_models_serve(package: Package, proven: Path, name: str) -> None:
    folder, port = package("mlflow"), free_port()
    words = ["mlflow", "models", "serve", "-m", f"{folder / name}", "--env-manager", "local"]
    images = read_proven().images
    everything = json.dumps({"inputs": {"image": images.tolist()}}).encode()
    example = (folder / name / "serving_input_example.json").read_bytes()
    place = ["--host", HOST, "--port", str(port)]
    with started(proven, *words, *place, port=port, ready="/health", env={}):
        for body, asked in ((example, images[:1]), (everything, images)):
            status, answer = ask_http(port, "POST", "/invocations", body)
            assert status == 200
            logits = np.array(json.loads(answer)["predictions"]["logits"], np.float32)
            assert logits.tobytes() == expected(name, asked).tobytes()


@pytest.mark.slow
def test_mlserver(package: Package, proven: Path) -> None:
    mlserver = program(MLSERVER)
    folder, port = package("mlflow"), free_port()
    env = {
        "PATH": f"{mlserver.parent}{os.pathsep}{os.environ['PATH']}",
        "MLSERVER_HOST": HOST,
        "MLSERVER_HTTP_PORT": str(port),
        "MLSERVER_GRPC_PORT": str(free_port()),
        "MLSERVER_METRICS_PORT": str(free_port()),
        "MLSERVER_PARALLEL_WORKERS": "0",
    }
    words = (str(mlserver), "start", str(folder))
    with started(proven, *words, port=port, ready="/v2/health/ready", env=env):
        require_same(f"{HOST}:{port}", binary=False)
        require_example(folder, lambda path, body: ask_http(port, "POST", path, body))


# --- Triton -------------------------------------------------------------------------------------

PYTHON_MODEL = '''
"""Runs the version folder's model.onnx in place of Triton's ONNX Runtime backend."""

from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        file = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(file, options)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        images = triton.get_input_tensor_by_name(request, "image").as_numpy()
        (logits,) = self.session.run(["logits"], {"image": images})
        return triton.InferenceResponse([triton.Tensor("logits", logits)])
'''


def run_by_python(repository: Path) -> None:
    """Have the Python backend run a repository's models; the rest of it stays as packaged."""
    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), proto.ModelConfig())
        assert config.platform == "onnxruntime_onnx"
        config.platform, config.backend = "", "python"
        path.write_text(text_format.MessageToString(config))
        for number in config.version_policy.specific.versions:
            (path.parent / str(number) / "model.py").write_text(PYTHON_MODEL)


@contextmanager
def triton(repository: Path, folder: Path) -> Iterator[tuple[commands.Command, int, int]]:
    """Start Triton on a repository; its ports for HTTP and gRPC."""
    server = program(TRITON)
    home, python = server.parent.parent, f"{sys.version_info.major}.{sys.version_info.minor}"
    packages, backends = home.parent.parent, folder / "backends"
    wanted = f"onnxruntime-{metadata.version('onnxruntime')}.dist-info"
    assert (packages / wanted).is_dir(), f"{packages} lacks {wanted}, whose bits are compared"
    shutil.copytree(home / "backends", backends)
    stub = "triton_python_backend_stub"
    shutil.copy(home / "python_backend_stubs" / python / stub, backends / "python" / stub)
    port, grpc_port = free_port(), free_port()
    words = [
        str(server),
        *("--model-repository", str(repository), "--backend-directory", str(backends)),
        *("--http-address", HOST, "--http-port", str(port)),
        *("--grpc-address", HOST, "--grpc-port", str(grpc_port)),
        *("--allow-metrics", "false", "--disable-auto-complete-config", "--log-verbose", "1"),
    ]
    env = {
        # the Python whose packages these are: this Triton's backend was made for NumPy 1
        "PATH": f"{packages.parents[2] / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(packages),
        # the wheel's own libraries, which the stub seeks from where it lay
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, packages.glob("*.libs"))),
    }
    with started(folder, *words, port=port, ready="/v2/health/ready", env=env) as command:
        yield command, port, grpc_port


@pytest.mark.slow
def test_triton(package: Package, tmp_path: Path) -> None:
    folder = package("triton")
    repository = tmp_path / "repository"
    shutil.copytree(folder, repository)
    run_by_python(repository)
    work = tmp_path / "work"
    work.mkdir()
    with triton(repository, work) as (command, port, grpc_port):
        url = f"{HOST}:{port}"
        require_same(url, binary=True, versions=dict.fromkeys(SERVED, "1"))
        require_same(url, binary=False, versions=dict.fromkeys(SERVED, "1"))
        require_example(folder, lambda path, body: ask_http(port, "POST", path, body))
        require_warm(folder, command.err)
        require_described(folder, url)
        images = read_proven().images
        too_many = np.zeros((Settings().limits.rows + 1, 784), np.float32)
        with pytest.raises(InferenceServerException, match="batch-size must be <= 10000"):
            ask(url, "mnist-bn", "1", too_many, binary=True)
        with oip_grpc.InferenceServerClient(f"{HOST}:{grpc_port}") as client:
            tensor = oip_grpc.InferInput("image", images.shape, "FP32")
            tensor.set_data_from_numpy(images)
            for name in SERVED:
                logits = client.infer(name, [tensor], "1").as_numpy("logits")
                assert logits.tobytes() == expected(name, images).tobytes()


def require_warm(folder: Path, log: str) -> None:
    """Make sure that every warm-up ran before anybody asked."""
    for name in SERVED:
        text = (folder / name / "config.pbtxt").read_text()
        samples = text_format.Parse(text, proto.ModelConfig()).model_warmup
        assert len(samples) == 11
        for sample in samples:
            ran = f"instance {name}_0_0 is running warmup sample '{sample.name}'"
            assert ran in log
    assert "failed to run warmup" not in log


def require_described(folder: Path, url: str) -> None:
    """Make sure that Triton shows clients what the packaged configuration says."""
    with oip_http.InferenceServerClient(url) as client:
        index = client.get_model_repository_index()
        assert index == [{"name": n, "version": "1", "state": "READY"} for n in SERVED]
        for name in SERVED:
            text = (folder / name / "config.pbtxt").read_text()
            packaged = text_format.Parse(text, proto.ModelConfig()).parameters
            shown = client.get_model_config(name)["parameters"]
            assert {key: value["string_value"] for key, value in shown.items()} == {
                key: value.string_value for key, value in packaged.items()
            }
            metadata = client.get_model_metadata(name)
            assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 784]}]
            assert metadata["outputs"] == [
                {"name": "logits", "datatype": "FP32", "shape": [-1, 10]}
            ]


# --- the image ----------------------------------------------------------------------------------


@pytest.mark.network
def test_image_built_by_hand_serves(package: Package, tmp_path: Path) -> None:
    """Without Docker: the Dockerfile's own commands, its paths moved into a folder."""
    folder = package("kserve")
    root = tmp_path / "root"
    (root / "build").mkdir(parents=True)
    for source in ("requirements.txt", "requirements-build.txt"):
        shutil.copy(folder / source, root / "build")
    shutil.copytree(folder / "package", root / "build/package")
    moved = {"/opt/mnist-bn": f"{root}/opt/mnist-bn", "/build": f"{root}/build"}
    for line in SHELL.findall((folder / "Dockerfile").read_text()):
        words = shlex.split(line)
        for old, new in moved.items():
            words = [new + w.removeprefix(old) if w.startswith(old) else w for w in words]
        subprocess.run(words, check=True, cwd=tmp_path, env=commands.environment())
    shutil.copytree(folder / "rootfs", root / "srv")
    start = json.loads(instruction(folder, "ENTRYPOINT")) + json.loads(instruction(folder, "CMD"))
    start[0] = f"{root}/opt/mnist-bn/bin/{start[0]}"
    start[start.index("--port") + 1] = "0"
    env = commands.environment(MNIST_BN_TOKEN=TOKEN, ORT_DISABLE_TELEMETRY="1")
    with commands.running(root / "srv", *start, env=env) as command:
        server = Server(command)
        url = server.url.removeprefix("http://")
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        require_same(url, binary=True, headers=bearer)
        require_same(url, binary=False, headers=bearer)
        with pytest.raises(InferenceServerException, match="token"):
            ask(url, "mnist-bn", "1", read_proven().images[:1], binary=True)
        assert server.stop() == 0
