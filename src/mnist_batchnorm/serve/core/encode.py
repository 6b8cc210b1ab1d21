"""Encode answers to inference requests: JSON, and raw tensors after it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import OUTPUT, Float32, InferRequest


def encode(request: InferRequest, logits: Float32, model: Model) -> tuple[bytes, int | None]:
    """Encode float32 logits ``[n, 10]``.

    Returns:
        The body, and the size of its JSON in bytes if a raw tensor follows.
    """
    content: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.id is not None:
        content["id"] = request.id
    if request.parameters:
        content["parameters"] = request.parameters
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(logits), CLASSES]}
    content["outputs"] = [output]
    if request.classes:
        texts = list(classified(logits, request.classes))
        output |= {"datatype": "BYTES", "shape": [len(logits), request.classes]}
    if not request.binary:
        output["data"] = texts if request.classes else logits.reshape(-1)
        # float32 is written as the shortest decimal that reads back as the same float32
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), None
    raw = pack(texts) if request.classes else logits.astype("<f4", copy=False).tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = orjson.dumps(content)
    return header + raw, len(header)


def classified(logits: Float32, classes: int) -> Iterator[str]:
    """Yield each row's largest logits with their classes, as ``logit:class``, largest first.

    A logit is the shortest decimal of the same float32, as in a list of logits.
    """
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :classes]
    for row, indices in zip(logits, ranked.tolist(), strict=True):
        yield from (f"{row[index]!s}:{index}" for index in indices)  # without !s, as float64


def pack(texts: list[str]) -> bytes:
    """Return the raw form of a BYTES tensor: each element preceded by its length in 4 bytes."""
    elements = [text.encode() for text in texts]
    return b"".join(len(raw).to_bytes(4, "little") + raw for raw in elements)
