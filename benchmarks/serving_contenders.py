"""The servers that benchmarks/serving.py compares: how each is installed, started and asked.

All serve the same ONNX file with ONNX Runtime on one thread, in one process where they can be told
so, and write no line per request. Those whose packages would hold this project's back are in
environments of their own, made from benchmarks/serving_rivals/NAME.txt. They could be resolved
together with this project, but MLServer holds FastAPI at 0.115 and both hold protobuf at 6, and
requirements.lock would then hold everything else there.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from benchmarks.serving_processes import Launch, free_port
from benchmarks.serving_wire import (
    JSON,
    Dialect,
    MlflowScoring,
    OpenInference,
    OwnModels,
    SameSize,
)
from mnist_batchnorm.core.files import write_text

RIVALS = Path(__file__).resolve().parent / "serving_rivals"
PROJECT = "mnist-batchnorm"
MODEL = "mnist-bn"  # the name that all serve it by
TRITON = "MNIST_BN_TRITONSERVER"
STAMP = "made-from.sha256"
INSTALL_LIMIT = 900.0  # seconds

OURS, NULL, KSERVE, MLFLOW = "this server", "null uvicorn", "KServe SDK", "mlflow"
LOOP = "uvloop"  # what `mnist-bn serve` gives uvicorn as its event loop

# As mnist_batchnorm/mlflow_sync/artifacts.py logs it. In a process of its own: MLflow takes seconds
# to import.
SAVE_MLFLOW = """\
import sys
import mlflow.onnx, numpy as np, onnx
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
float32 = np.dtype(np.float32)
mlflow.onnx.save_model(
    onnx.load(sys.argv[1]),
    sys.argv[2],
    signature=ModelSignature(
        inputs=Schema([TensorSpec(float32, (-1, 784), "image")]),
        outputs=Schema([TensorSpec(float32, (-1, 10), "logits")]),
    ),
    onnx_execution_providers=["CPUExecutionProvider"],
    onnx_session_options={"intra_op_num_threads": 1},
    pip_requirements=["mlflow", "numpy", "onnx", "onnxruntime"],
    save_as_external_data=False,
)
"""

TRITON_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
input {{ name: "image" data_type: TYPE_FP32 dims: [ -1, 784 ] }}
output {{ name: "logits" data_type: TYPE_FP32 dims: [ -1, 10 ] }}
instance_group {{ count: 1 kind: KIND_CPU }}
parameters {{ key: "onnx" value: {{ string_value: {path} }} }}
"""


class UnavailableError(Exception):
    """A server that cannot be measured here: why, in a few words for the table."""


@dataclass(frozen=True)
class Place:
    """Where servers are started from.

    Attributes:
        root: of the project.
        model: the ONNX file, an absolute path.
        cache: folder of the environments.
        scratch: a temporary folder.
    """

    root: Path
    model: Path
    cache: Path
    scratch: Path

    def folder(self, name: str) -> Path:
        """Make a folder of a server's own."""
        folder = self.scratch / re.sub(r"\W+", "-", name)
        folder.mkdir(exist_ok=True)
        return folder


@dataclass(frozen=True)
class Contender:
    """A server.

    Attributes:
        name: as the tables show it.
        what: the package and its version.
        dialect: how it is asked.
        launch: returns how it is started on a port.
        packages: how many it needs that the project does not need without it; None: not Python's.
    """

    name: str
    what: str
    dialect: Dialect
    launch: Callable[[int], Launch]
    packages: int | None


# --- packages -------------------------------------------------------------------------------------


def normal(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: Iterable[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Return installed packages with all that they require here, without their extras.

    Args:
        names: of the packages to start from.
        extras: to ask those for.
    """
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [(normal(name), extras) for name in names]
    while todo:
        name, asked = todo.pop()
        if name in found and not asked:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # a marker of another platform's that only its extra knows
        found.add(name)
        for text in requirements:
            one = Requirement(text)
            wanted = ({"extra": extra} for extra in asked or {""})
            if one.marker is None or any(map(one.marker.evaluate, wanted)):
                todo.append((normal(one.name), frozenset(one.extras)))
    return found


def core() -> set[str]:
    """Return what the project needs to be installed at all."""
    return closure([PROJECT])


def pinned(name: str) -> dict[str, str]:
    """Read an environment's packages, name -> version."""
    lines = (RIVALS / f"{name}.txt").read_text().split()
    return {normal(package): number for package, _, number in (x.partition("==") for x in lines)}


def environment(name: str, cache: Path) -> Path:
    """Make a rival's environment, unless it is there, and return its folder of programs.

    Raises:
        UnavailableError: It cannot be made.
    """
    requirements = RIVALS / f"{name}.txt"
    folder = cache.resolve() / name
    made_from = hashlib.sha256(
        requirements.read_bytes() + platform.python_version().encode()
    ).hexdigest()
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == made_from:
        return folder / "bin"
    uv = shutil.which("uv", path=os.pathsep.join([str(programs()), os.environ.get("PATH", "")]))
    if not uv:
        raise UnavailableError("no `uv` to make its environment with")
    sys.stderr.write(f"making {folder}\n")
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--compile-bytecode",
            "--python",
            python,
            "-r",
            str(requirements),
        ],
    ):
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=INSTALL_LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError("its packages did not arrive in time") from None
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise UnavailableError(f"{requirements.name} could not be installed")
    write_text(stamp, made_from)
    return folder / "bin"


def programs() -> Path:
    """Return the folder of this environment's programs."""
    return Path(sys.executable).parent


# --- each of them ---------------------------------------------------------------------------------


def ours(place: Place) -> Contender:
    """`mnist-bn serve`, as it comes."""
    command = [str(programs() / "mnist-bn"), "serve", f"{MODEL}={place.model}", "--port"]
    return Contender(
        OURS,
        f"`mnist-bn serve`, uvicorn {version('uvicorn')}",
        OpenInference(MODEL),
        lambda port: Launch([*command, str(port)], {}, place.root),
        len(closure([PROJECT], frozenset({"serve"})) - core()),
    )


def null(place: Place) -> Contender:
    """A handler that only reads, on this server's uvicorn with this server's settings."""
    script = str(RIVALS / "null.py")
    return Contender(
        NULL,
        f"uvicorn {version('uvicorn')}, {LOOP}",
        SameSize(OpenInference(MODEL)),
        lambda port: Launch(
            [sys.executable, "-P", script, str(port), LOOP], {}, place.folder(NULL)
        ),
        len(closure(["httptools", "uvicorn", LOOP]) - core()),
    )


def kserve(place: Place) -> Contender:
    """A model of KServe's SDK."""
    python = environment("kserve", place.cache) / "python"
    versions = pinned("kserve")
    command = [str(python), str(RIVALS / "kserve_app.py"), "--enable_latency_logging", "false"]
    command += ["--model_name", MODEL, "--model_dir", str(place.model), "--http_port"]
    return Contender(
        KSERVE,
        f"kserve {versions['kserve']}",
        OpenInference(MODEL),
        lambda port: Launch([*command, str(port)], {}, place.folder(KSERVE)),
        len(versions.keys() - core()),
    )


def mlserver(place: Place) -> Contender:
    """A runtime of MLServer's, in the server's own process.

    Its default is a worker beside it, which every request would cross to on the same core.
    """
    name = "MLServer"
    program = environment("mlserver", place.cache) / "mlserver"
    versions = pinned("mlserver")

    def launch(port: int) -> Launch:
        folder = place.folder(name)
        shutil.copy(RIVALS / "mlserver_model.py", folder)
        settings: dict[str, object] = {"debug": False, "parallel_workers": 0, "host": "127.0.0.1"}
        settings |= {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
        model = {"name": MODEL, "implementation": "mlserver_model.Network"}
        parameters = {"parameters": {"uri": str(place.model)}}
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model | parameters))
        return Launch([str(program), "start", str(folder)], {}, folder)

    return Contender(
        name,
        f"mlserver {versions['mlserver']}",
        OpenInference(MODEL, (JSON,)),  # its REST server has no binary extension
        launch,
        len(versions.keys() - core()),
    )


def mlflow(place: Place) -> Contender:
    """`mlflow models serve` on the model as `mnist-bn sync` logs it, without its access log."""
    saved = place.folder(MLFLOW) / "model"
    if not saved.exists():
        arguments = [str(place.model), str(saved)]
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-P", "-W", "ignore", "-c", SAVE_MLFLOW, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise UnavailableError("MLflow could not save the model")
    command = [str(programs() / "mlflow"), "models", "serve", "--model-uri", str(saved)]
    command += ["--env-manager", "local", "--workers", "1", "--host", "127.0.0.1", "--port"]
    quiet = {
        "PATH": os.pathsep.join([str(programs()), os.environ.get("PATH", "")]),  # its uvicorn
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "UVICORN_ACCESS_LOG": "false",
    }
    return Contender(
        MLFLOW,
        f"`mlflow models serve`, {version('mlflow')}",
        MlflowScoring(),
        lambda port: Launch([*command, str(port)], quiet, place.folder(MLFLOW)),
        0,
    )


def fastapi(place: Place, kind: str) -> Contender:
    """FastAPI with pydantic models."""
    python = environment("fastapi", place.cache) / "python"
    versions = pinned("fastapi")
    name = {"async": "FastAPI, `async def`", "sync": "FastAPI, `def`"}[kind]
    command = [str(python), str(RIVALS / "fastapi_app.py")]
    return Contender(
        name,
        f"fastapi {versions['fastapi']}, pydantic {versions['pydantic']}",
        OwnModels(),
        lambda port: Launch([*command, str(port), str(place.model), kind], {}, place.folder(name)),
        len(versions.keys() - core()),
    )


def triton(place: Place) -> Contender:
    """A `tritonserver` that the caller names, with the file in its Python backend.

    The backend of the wheel `nvidia-pytriton` 0.7 was compiled for NumPy 1: NumPy 2 it gives wrong
    pixels, and takes no bytes from.
    The program lies in ``bin`` beside ``backends``, as NVIDIA's containers and wheels have it.
    """
    named = os.environ.get(TRITON)
    if not named:
        raise UnavailableError(f"no `tritonserver` named in {TRITON}")
    program = Path(named).resolve()
    if not program.is_file():
        raise UnavailableError(f"{TRITON} does not name a file")
    python = environment("triton", place.cache)
    folder = place.folder("triton")
    backends, libraries = python_backend(program, folder)
    version_folder = folder / "models" / MODEL / "1"
    version_folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(RIVALS / "triton_model.py", version_folder / "model.py")
    config = TRITON_CONFIG.format(name=MODEL, path=json.dumps(str(place.model)))
    (version_folder.parent / "config.pbtxt").write_text(config)
    wheel = list(program.parents[3].glob("*triton*.dist-info"))
    command = [str(program), "--model-repository", str(folder / "models"), "--allow-grpc=false"]
    command += [f"--backend-directory={backends}", "--allow-metrics=false"]
    command += ["--http-address=127.0.0.1", "--http-port"]
    variables = {
        # the Python in it is of the environment of the first `python3` here
        "PATH": os.pathsep.join([str(python), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    return Contender(
        "Triton",
        f"`tritonserver`{f' of {wheel[0].stem}' if wheel else ''}, Python backend",
        OpenInference(MODEL),
        lambda port: Launch([*command, str(port)], variables, folder),
        None,
    )


def python_backend(program: Path, folder: Path) -> tuple[Path, list[Path]]:
    """Return the folder of Triton's backends, and of the libraries that it needs.

    A wheel ships the backend's helper for several versions of Python, none of them in the place
    where the backend looks; then it is put there, in a copy.

    Raises:
        UnavailableError: There is none for this Python.
    """
    name = "triton_python_backend_stub"
    backends = program.parent.parent / "backends"
    libraries = [Path(sysconfig.get_config_var("LIBDIR"))]
    if (backends / "python" / name).is_file():
        return backends, libraries
    stub = program.parent.parent / "python_backend_stubs" / "{}.{}".format(*sys.version_info) / name
    if not stub.is_file():
        raise UnavailableError(f"its Python backend has no part for Python {sys.version[:4]}")
    libraries += sorted(program.parents[3].glob("*.libs"))
    copy = folder / "backends" / "python"
    shutil.copytree(backends / "python", copy, dirs_exist_ok=True)
    (copy / name).unlink(missing_ok=True)
    shutil.copy(stub, copy / name)
    (copy / name).chmod(0o755)
    return copy.parent, libraries


CONTENDERS: Mapping[str, Callable[[Place], Contender]] = {
    OURS: ours,
    NULL: null,
    KSERVE: kserve,
    "MLServer": mlserver,
    MLFLOW: mlflow,
    "FastAPI, `async def`": partial(fastapi, kind="async"),
    "FastAPI, `def`": partial(fastapi, kind="sync"),
    "Triton": triton,
}
