"""A KServe ``InferenceService`` of this project's own server, and the image that it runs.

The folder is the image's whole build context, so that nothing else can get into it.
"""

import re
import shutil
import sys
from importlib.metadata import metadata
from pathlib import Path
from types import MappingProxyType

import mnist_batchnorm
from mnist_batchnorm.core.errors import CheckFailedError, UserError
from mnist_batchnorm.core.files import write_bytes, write_text
from mnist_batchnorm.package.proven import Proven
from mnist_batchnorm.package.requirements import Pin, locked
from mnist_batchnorm.package.templating import fill

LOCK = Path("requirements.lock")
# What `mnist-bn serve` imports, all that the image installs; a test watches what it really imports.
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
    "ruamel-yaml",
    "safetensors",
    "starlette",
    "uvicorn",
    "uvloop",
)
BUILDING = ("hatchling",)  # makes a wheel of the code, in a stage that the image is not made of
PORT = 8080  # what KServe expects of a container unless told otherwise
USER = 10001  # of the image; any that is not 0 and not the host's

# registry.example.com:5000/team/name:tag@sha256:..., as Docker and Kubernetes read it:
# https://github.com/distribution/reference/blob/main/reference.go
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:\d))(?::\d{1,5})?"
IMAGE = re.compile(
    rf"(?=.{{1,400}}\Z)(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?\Z"
)

# Of a replica. Measured resident memory: 90 MiB at rest, at most 750 MiB while 30 clients at once
# sent 240 bodies of 16 to 24 MiB of JSON; `--max-bodies` bounds it.
MEMORY = MappingProxyType({"request": "256Mi", "limit": "1536Mi"})
CPU = "1"  # one worker computes on one core
REPLICAS = MappingProxyType({"minimum": 1, "maximum": 4})
CONCURRENCY = 8  # requests at once for which one replica is enough: a core is busy at 8
READINESS = MappingProxyType({"period": 5, "timeout": 2, "failures": 2})  # the probe's; seconds
# Seconds. Knative's proxy holds SIGTERM back for 30 (drainSleepDuration in
# https://github.com/knative/serving/blob/main/pkg/queue/sharedmain/main.go), then the server drains
# for `delay` and `drain`; after `timeout` in all the pod is killed.
STOP = MappingProxyType({"queue_proxy": 30, "delay": 15, "drain": 20, "timeout": 90})


def default_image(proven: Proven) -> str:
    """Name the image after the first model's version and hash, so that no two share a name."""
    model = proven.models[0]
    return f"mnist-bn:{model.version}-{model.sha256[:12]}"


def require_image(image: str) -> str:
    """Return a container image's reference as it is.

    Raises:
        UserError: It is none.
    """
    if not IMAGE.match(image):
        raise UserError(
            f"{image!r} is no reference of a container image; expected one such as "
            "registry.example.com/team/mnist-bn:1"
        )
    return image


def write_kserve(proven: Proven, directory: Path, image: str, canary: int) -> None:
    """Fill a folder with an image's build context and the manifests that run it.

    Args:
        proven: the models.
        directory: an empty folder.
        image: what the image will be called, as `require_image` allows.
        canary: percentage of the requests that a new revision gets at first.

    Raises:
        UserError: ``requirements.lock`` is missing or lacks a package.
        CheckFailedError: It has another ONNX Runtime than the one the models were proved with.
    """
    serving, building = locked(LOCK, SERVING), locked(LOCK, BUILDING)
    require_proved_runtime(serving["onnxruntime"], proven.versions["onnxruntime"])
    for file, pins in {"requirements.txt": serving, "requirements-build.txt": building}.items():
        write_text(directory / file, "".join(pin.text for group in pins.values() for pin in group))
    for model in proven.models:
        write_bytes(directory / "rootfs" / model.path, model.content)
    for path, content in proven.evidence.items():
        write_bytes(directory / "rootfs" / path, content)
    write_code(directory / "package")
    values = {
        "image": image,
        "sources": [f"{model.name}={model.path.as_posix()}" for model in proven.models],
        "models": proven.models,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "port": PORT,
        "user": USER,
        "memory": MEMORY,
        "cpu": CPU,
        "replicas": REPLICAS,
        "concurrency": CONCURRENCY,
        "readiness": READINESS,
        "stop": STOP,
        "canary": canary,
    }
    for file in ("Dockerfile", ".dockerignore", "inferenceservice.yaml"):
        write_text(directory / file, fill(f"{file.removeprefix('.')}.j2", **values))


def require_proved_runtime(locked_versions: list[Pin], proved: str) -> None:
    """Make sure that the image runs the ONNX Runtime that the gate ran.

    Raises:
        CheckFailedError: It would run another.
    """
    if [pin.version for pin in locked_versions] != [proved]:
        named = ", ".join(pin.version for pin in locked_versions)
        raise CheckFailedError(
            f"nothing is packaged: the models were proved with ONNX Runtime {proved}, but {LOCK} "
            f"has {named}; run `make setup` and `dvc repro verify`"
        )


def write_code(directory: Path) -> None:
    """Write this package's source and what makes a wheel of it, without its dependencies."""
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
