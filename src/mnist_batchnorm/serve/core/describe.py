"""Metadata of the server and its models, for every transport."""

from collections.abc import Sequence
from importlib.metadata import version as version_of
from typing import Any

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.metrics import Metrics, statistics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import (
    BACKEND,
    INPUT,
    OUTPUT,
    PIXELS,
    PLATFORM,
    RequestError,
)
from mnist_batchnorm.serve.core.settings import Limits

SERVER = "mnist-batchnorm"


def find(catalog: Catalog, name: str, version: str | None = None) -> Model:
    """Return a served model, by default its default version; RequestError: there is none."""
    model = catalog.find(name, version)
    if model is None:
        wanted = f"model {name!r}" + (f" version {version!r}" if version else "")
        known = ", ".join(f"{served.name} {served.version}" for served in catalog) or "none"
        raise RequestError(f"no {wanted[:200]} here; there is {known}", 404, "model")
    return model


def server_metadata(extensions: Sequence[str]) -> dict[str, Any]:
    """Return the protocol's server metadata."""
    return {"name": SERVER, "version": version_of(SERVER), "extensions": list(extensions)}


def model_metadata(catalog: Catalog, model: Model, *, chosen: bool) -> dict[str, Any]:
    """Return the protocol's model metadata; of all versions, unless one was `chosen`."""
    return {
        "name": model.name,
        "versions": [model.version] if chosen else catalog.versions(model.name),
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, PIXELS]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, CLASSES]}],
    }


def provenance(model: Model) -> dict[str, Any]:
    """Return the hashes of a model, and whether the gate has passed it."""
    return {
        "version": model.version,
        "sha256": model.sha256,
        "weights_sha256": model.weights_sha256,
        "verified": model.verified,
        **({"unverified_because": model.unproven} if model.unproven else {}),
    }


def model_configuration(model: Model, limits: Limits, workers: int) -> dict[str, Any]:
    """Return a model's configuration in Triton's form; `workers` are processes.

    https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    parameters = {
        name: {"string_value": str(value).lower() if isinstance(value, bool) else value}
        for name, value in provenance(model).items()
        if value is not None
    }
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "max_batch_size": limits.rows,  # the axis before those below
        "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": [PIXELS]}],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [CLASSES]}],
        "instance_group": [{"kind": "KIND_CPU", "count": workers}],
        "parameters": parameters,
    }


def model_statistics(
    catalog: Catalog, metrics: Metrics, name: str | None = None, version: str | None = None
) -> list[dict[str, Any]]:
    """Return the statistics of all models, of a name, or of one version.

    Raises:
        RequestError: There is no such model.
    """
    if name is not None:
        find(catalog, name, version)
    selected = [m for m in catalog if name in (None, m.name) and version in (None, m.version)]
    merged = metrics.merged()
    return [statistics(merged, model.name, model.version) for model in selected]


def repository_index(catalog: Catalog, *, only_ready: bool) -> list[dict[str, str]]:
    """Return the state of every model as in the protocol's repository extension.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
    """
    rows = []
    for slot in catalog.slots:
        unloaded = slot.source.name in catalog.unloaded
        state = "UNAVAILABLE" if unloaded or slot.model is None else "READY"
        version = slot.model.version if slot.model else ""
        reason = "unloaded" if unloaded else slot.problem or ""
        row = {"name": slot.source.name, "version": version, "state": state, "reason": reason}
        rows.append(row)
    return [row for row in rows if row["state"] == "READY" or not only_ready]
