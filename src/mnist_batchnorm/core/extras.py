"""Which extra installs a module that the core install lacks.

The table is kept by hand, as a package that is not installed has no metadata; a test compares it
with ``pyproject.toml``.
"""

import importlib.util

from mnist_batchnorm.core.errors import UserError

CLIENT = {"PIL", "requests", "safetensors"}
SERVE = {
    "fastapi_offline",
    "filelock",
    "httptools",
    "onnxruntime",
    "orjson",
    "prometheus_client",
    "pydantic",
    "ruamel",
    "safetensors",
    "simdjson",
    "starlette",
    "uvicorn",
    "uvloop",
}
GATE = {"onnx", "onnxruntime", "onnxscript", "safetensors", "torch"}
PIPELINE = CLIENT | GATE
PIPELINE |= {"dvc", "filelock", "jinja2", "matplotlib", "mlflow", "packaging", "pip", "pydantic"}
PIPELINE |= {"ruamel", "scipy", "tenacity", "tqdm"}

EXTRAS = {  # a module of several extras belongs to the first, unless the command has its own
    "client": CLIENT,
    "serve": SERVE,
    "gate": GATE,
    "pipeline": PIPELINE,
    "grpc": {"tritonclient"},
    "postgres": {"psycopg"},
    "s3": {"boto3", "dvc_s3"},
    "signing": {"OpenSSL", "model_signing"},
}


def require_extra(extra: str) -> None:
    """Raise UserError if a module of an extra is not installed; imports none of them."""
    for module in sorted(EXTRAS[extra] - {"uvloop"}):  # there is no uvloop for Windows
        if importlib.util.find_spec(module) is None:
            raise _not_installed(module, extra)


def missing_extra(error: ModuleNotFoundError, preferred: str) -> UserError | None:
    """Translate a failed import into a UserError that names the extra to install.

    Args:
        error: raised by the import.
        preferred: the extra of the command that runs.

    Returns:
        None if the module belongs to no extra.
    """
    module = (error.name or "").partition(".")[0]
    for extra in (preferred, *EXTRAS):
        if module in EXTRAS[extra]:
            return _not_installed(module, extra)
    return None


def _not_installed(module: str, extra: str) -> UserError:
    return UserError(f"{module} is not installed: pip install 'mnist-batchnorm[{extra}]'")
