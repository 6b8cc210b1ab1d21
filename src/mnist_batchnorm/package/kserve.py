"""A KServe ``InferenceService`` of this project's server, and the build context of its image."""

import re
import shutil
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import mnist_batchnorm
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes, write_text
from mnist_batchnorm.package.proven import Proven
from mnist_batchnorm.package.requirements import locked
from mnist_batchnorm.package.templating import fill

LOCK = Path("requirements.lock")
# What `mnist-bn serve` imports and the image installs; a test compares with the real imports.
SERVING = (
    "click",
    "filelock",
    "httptools",
    "numpy",
    "onnxruntime",
    "orjson",
    "prometheus-client",
    "pydantic",
    "pysimdjson",
    "safetensors",
    "starlette",
    "uvicorn",
    "uvloop",
)

# registry.example.com:5000/team/name:tag@sha256:..., as Docker and Kubernetes read it:
# https://github.com/distribution/reference/blob/main/reference.go
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:\d))(?::\d{1,5})?"
IMAGE = re.compile(
    rf"(?=.{{1,400}}\Z)(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?\Z"
)

DEPLOYMENT: dict[str, Any] = {  # values of the templates
    "port": 8080,  # KServe's default
    "user": 10001,  # of the image; any that is not 0 and not the host's
    # Per replica. Measured resident memory: 90 MiB at rest, at most 750 MiB while 30 clients at
    # once sent 240 bodies of 16 to 24 MiB of JSON; `--max-bodies` bounds it.
    "memory": {"request": "256Mi", "limit": "1536Mi"},
    "cpu": "1",  # one worker computes on one core
    "replicas": {"minimum": 1, "maximum": 4},
    "concurrency": 8,  # simultaneous requests per replica: 8 keep a core busy
    "readiness": {"period": 5, "timeout": 2, "failures": 2},  # of the probe, in seconds
    # Seconds. Knative's proxy holds SIGTERM back for 30 (drainSleepDuration in
    # https://github.com/knative/serving/blob/main/pkg/queue/sharedmain/main.go), then the server
    # drains for `delay` and `drain`; after `timeout` in all the pod is killed.
    "stop": {"queue_proxy": 30, "delay": 15, "drain": 20, "timeout": 90},
}


def default_image(proven: Proven) -> str:
    """Return an image name from the first model's version and hash."""
    model = proven.models[0]
    return f"mnist-bn:{model.version}-{model.sha256[:12]}"


def require_image(image: str) -> str:
    """Return `image` if it is a valid reference of a container image; else raise UserError."""
    if not IMAGE.match(image):
        raise UserError(
            f"{image!r} is no reference of a container image; expected one such as "
            "registry.example.com/team/mnist-bn:1"
        )
    return image


def write_kserve(proven: Proven, directory: Path, image: str, canary: int) -> None:
    """Write an image's build context and the manifest that runs it into an empty folder.

    Raises:
        UserError: ``requirements.lock`` is missing or lacks a package.
        CheckFailedError: It pins another ONNX Runtime than the one the models were proved with.
    """
    serving = locked(LOCK, SERVING)
    building = locked(LOCK, ["hatchling"])  # the wheel, in a separate stage of the Dockerfile
    proved = proven.versions["onnxruntime"]
    pinned = [pin.version for pin in serving["onnxruntime"]]
    if pinned != [proved]:
        raise CheckFailedError(
            f"nothing is packaged: the models were proved with ONNX Runtime {proved}, but {LOCK} "
            f"has {', '.join(pinned)}; run `make setup` and `dvc repro verify`"
        )
    for file, pins in {"requirements.txt": serving, "requirements-build.txt": building}.items():
        write_text(directory / file, "".join(pin.text for group in pins.values() for pin in group))
    for path, content in proven.files.items():
        write_bytes(directory / "rootfs" / path, content)
    write_code(directory / "package")
    values = {
        **DEPLOYMENT,
        "image": image,
        "sources": [f"{model.name}={model.path.as_posix()}" for model in proven.models],
        "models": proven.models,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "canary": canary,
    }
    for file in ("Dockerfile", ".dockerignore", "inferenceservice.yaml"):
        write_text(directory / file, fill(f"{file.removeprefix('.')}.j2", **values))


def write_code(directory: Path) -> None:
    # this package's source, and a pyproject.toml without its dependencies
    shutil.copytree(
        Path(mnist_batchnorm.__file__).parent,
        directory / "mnist_batchnorm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    about = metadata("mnist-batchnorm")
    write_text(
        directory / "pyproject.toml",
        fill(
            "pyproject.toml.j2",
            version=about["Version"],
            license=about["License-Expression"],
            requires_python=about["Requires-Python"],
        ),
    )
