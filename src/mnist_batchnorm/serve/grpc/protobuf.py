"""Map the protocol's protobuf messages to requests and from answers.

The messages come with tritonclient, generated from the published definition,
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2 as config_pb2
from tritonclient.grpc import service_pb2

from mnist_batchnorm.artifacts.splits import CLASSES, network_input
from mnist_batchnorm.serve.core.decode import read_classes
from mnist_batchnorm.serve.core.describe import model_configuration
from mnist_batchnorm.serve.core.encode import classified, pack
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT, PIXELS, Float32, InferRequest, refuse
from mnist_batchnorm.serve.core.settings import Limits
from mnist_batchnorm.serve.core.tensors import (
    TENSOR,
    check_finite,
    check_shape,
    decode_raw,
    refuse_pixel,
)

Message = Any  # its class is generated at import, unknown to type checkers

CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}  # datatype -> field of the numbers
RAW = "raw_input_contents"


def parse(kind: type[Message], raw: bytes) -> Message:
    """Parse a message; RequestError: the bytes are not such a message."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        refuse("the message", f"{len(raw)} other bytes", f"a whole {kind.DESCRIPTOR.name}")


def decode_request(message: Message, limits: Limits) -> InferRequest:
    """Decode a ``ModelInferRequest``; raises RequestError."""
    tensor = only_tensor(message.inputs, "inputs", INPUT)
    datatype: str | None = tensor.datatype or None
    shape, known = check_shape(list(tensor.shape), datatype, limits)
    if "shared_memory_region" in tensor.parameters:
        refuse(f"{TENSOR}.parameters", "shared_memory_region", "the tensor itself")
    typed = [field.name for field, _ in tensor.contents.ListFields()]
    raw = message.raw_input_contents
    if not raw:
        images = _read_contents(tensor.contents, typed, shape, known, limits)
    elif typed:
        refuse(TENSOR, f"contents.{typed[0]} and {RAW}", "one of the two", "binary")
    elif len(raw) > 1:
        refuse(RAW, f"{len(raw)} tensors", "one, for one input", "binary")
    else:
        where = f"{RAW}[0]"
        images = decode_raw(raw[0], len(raw[0]), f"{where}, bytes", shape, known, limits, where)
    request = InferRequest(images, message.id or None, message.parameters, binary=bool(raw))
    if message.outputs:
        parameters = to_python(only_tensor(message.outputs, "outputs", OUTPUT).parameters)
        if "shared_memory_region" in parameters:
            refuse("outputs[0].parameters", "shared_memory_region", "an answer in the message")
        request.classes = read_classes(parameters)
    return request


def only_tensor(tensors: Any, field: str, name: str) -> Message:
    """Return the only tensor of a list, which must have this name."""
    if len(tensors) != 1:
        refuse(field, f"{len(tensors)} tensors", f"one tensor, {name!r}")
    if tensors[0].name != name:
        refuse(f"{field}[0].name", tensors[0].name or None, repr(name))
    return tensors[0]


def _read_contents(
    contents: Message, typed: list[str], shape: Any, datatype: str, limits: Limits
) -> Float32:
    """Read the numbers of an ``InferTensorContents``, whose fields `typed` are not empty."""
    field, count = CONTENTS[datatype], prod(shape)
    where = f"{TENSOR}.contents.{field}"
    if wrong := [name for name in typed if name != field]:
        refuse(f"{TENSOR}.contents", wrong[0], f"{field} for {datatype}", "data")
    values = getattr(contents, field)
    if len(values) != count:
        refuse(where, f"{len(values)} numbers", f"{count} for {datatype} {shape}", "data")
    if datatype == "FP32":
        images = np.array(values[:], np.float32).reshape(shape[0], PIXELS)
        return check_finite(images, limits, where)
    pixels = np.array(values[:], np.uint32)
    if count and pixels.max() > 255:
        index = int(np.flatnonzero(pixels > 255)[0])
        refuse_pixel(index, str(pixels[index]), "an integer from 0 to 255", where)
    return network_input(pixels.astype(np.uint8).reshape(shape[0], PIXELS))


def to_python(parameters: Mapping[str, Message]) -> dict[str, Any]:
    """Convert parameters to Python's own types; None: without a value."""
    chosen = {name: one.WhichOneof("parameter_choice") for name, one in parameters.items()}
    return {
        name: getattr(parameters[name], choice) if choice else None
        for name, choice in chosen.items()
    }


def encode_response(request: InferRequest, logits: Float32, model: Model) -> Message:
    """Encode float32 logits ``[n, 10]`` as a ``ModelInferResponse``, raw if the request was."""
    output: dict[str, Any] = {"name": OUTPUT, "datatype": "FP32", "shape": [len(logits), CLASSES]}
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request.classes:
        output |= {"datatype": "BYTES", "shape": [len(logits), request.classes]}
        texts = list(classified(logits, request.classes))
        if request.binary:
            answer["raw_output_contents"] = [pack(texts)]
        else:
            output["contents"] = {"bytes_contents": [text.encode() for text in texts]}
    elif request.binary:
        answer["raw_output_contents"] = [logits.astype("<f4", copy=False).tobytes()]
    else:
        output["contents"] = {"fp32_contents": logits.reshape(-1).tolist()}
    if request.id is not None:
        answer["id"] = request.id
    if request.parameters:
        answer["parameters"] = request.parameters
    return service_pb2.ModelInferResponse(outputs=[output], **answer)


def model_config(model: Model, limits: Limits, workers: int) -> Message:
    """Return `describe.model_configuration` as a ``ModelConfigResponse``."""
    fields = model_configuration(model, limits, workers)
    config = json_format.ParseDict(fields, config_pb2.ModelConfig())
    return service_pb2.ModelConfigResponse(config=config)
