"""What the server tells of itself and its models, whichever way it is asked."""

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
    """Return a model that is served, of its default version unless another is named.

    Raises:
        RequestError: There is no such model.
    """
    model = catalog.find(name, version)
    if model is None:
        told = f"model {name!r}" + (f" version {version!r}" if version else "")
        known = ", ".join(f"{one.name} {one.version}" for one in catalog) or "none"
        raise RequestError(f"no {told[:200]} here; there is {known}", 404, "model")
    return model


def server_metadata(extensions: Sequence[str]) -> dict[str, Any]:
    """Return what the server is."""
    return {"name": SERVER, "version": version_of(SERVER), "extensions": list(extensions)}


def model_metadata(catalog: Catalog, model: Model, *, chosen: bool) -> dict[str, Any]:
    """Return what a model takes and gives.

    Args:
        catalog: it is in.
        model: the model.
        chosen: whether the version was named, and no other is of interest.
    """
    return {
        "name": model.name,
        "versions": [model.version] if chosen else catalog.versions(model.name),
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, PIXELS]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, CLASSES]}],
    }


def provenance(model: Model) -> dict[str, Any]:
    """Return where a model comes from, and whether it is proven."""
    return {
        "version": model.version,
        "sha256": model.sha256,
        "weights_sha256": model.weights_sha256,
        "verified": model.verified,
        **({"unverified_because": model.unproven} if model.unproven else {}),
    }


def model_configuration(model: Model, limits: Limits, workers: int) -> dict[str, Any]:
    """Return how a model is served, as Triton's configuration of a model says it.

    https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto

    Args:
        model: that is asked for.
        limits: what a request may ask of it.
        workers: processes, each with the model.
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
    """Return what models have done: all, those of a name, or one version.

    Raises:
        RequestError: There is no such model.
    """
    if name is not None:
        find(catalog, name, version)
    asked = [m for m in catalog if name in (None, m.name) and version in (None, m.version)]
    figures = metrics.merged()
    return [statistics(figures, model.name, model.version) for model in asked]


def repository_index(catalog: Catalog, *, only_ready: bool) -> list[dict[str, str]]:
    """Return the state of every model, as the protocol's repository extension tells it.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
    """
    rows = []
    for slot in catalog.slots:
        row = {"name": slot.source.name, "version": slot.model.version if slot.model else ""}
        if slot.source.name in catalog.unloaded:
            rows.append(row | {"state": "UNAVAILABLE", "reason": "unloaded"})
        elif slot.model is None:
            rows.append(row | {"state": "UNAVAILABLE", "reason": slot.problem or ""})
        else:
            rows.append(row | {"state": "READY", "reason": slot.problem or ""})
    return [row for row in rows if row["state"] == "READY" or not only_ready]
