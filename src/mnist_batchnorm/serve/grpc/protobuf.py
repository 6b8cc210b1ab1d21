"""The protocol's messages as gRPC carries them, to requests and from answers.

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
from mnist_batchnorm.serve.core.decode import (
    TENSOR,
    check_finite,
    check_shape,
    decode_raw,
    refuse_pixel,
)
from mnist_batchnorm.serve.core.describe import model_configuration
from mnist_batchnorm.serve.core.encode import classified, pack
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import INPUT, OUTPUT, PIXELS, Float32, InferRequest, refuse
from mnist_batchnorm.serve.core.settings import Limits

Message = Any  # generated when it is imported, so no type checker knows it

CONTENTS = {"FP32": "fp32_contents", "UINT8": "uint_contents"}  # datatype -> its typed numbers
RAW = "raw_input_contents"


def parse(kind: type[Message], raw: bytes) -> Message:
    """Read a message.

    Raises:
        RequestError: The bytes are none of this kind.
    """
    try:
        return kind.FromString(raw)
    except DecodeError:
        refuse("the message", f"{len(raw)} other bytes", f"a whole {kind.DESCRIPTOR.name}")


def read_request(message: Message, limits: Limits) -> InferRequest:
    """Read a ``ModelInferRequest``; `InferRequest.parameters` stays empty.

    Args:
        message: the request.
        limits: what it may ask for.

    Raises:
        RequestError: It is not a request that can be answered.
    """
    tensor = only(message.inputs, "inputs", INPUT)
    datatype: str | None = tensor.datatype or None
    shape, known = check_shape(list(tensor.shape), datatype, limits)
    if "shared_memory_region" in tensor.parameters:
        refuse(f"{TENSOR}.parameters", "shared_memory_region", "the tensor itself")
    typed = [field.name for field, _ in tensor.contents.ListFields()]
    raw = message.raw_input_contents
    if not raw:
        images = read_contents(tensor.contents, typed, shape, known, limits)
    elif typed:
        refuse(TENSOR, f"contents.{typed[0]} and {RAW}", "one of the two", "binary")
    elif len(raw) > 1:
        refuse(RAW, f"{len(raw)} tensors", "one, for one input", "binary")
    else:
        where = f"{RAW}[0]"
        images = decode_raw(raw[0], len(raw[0]), f"{where}, bytes", shape, known, limits, where)
    request = InferRequest(images, id=message.id or None, binary=bool(raw))
    if message.outputs:
        request.classes = read_output(only(message.outputs, "outputs", OUTPUT))
    return request


def only(tensors: Any, field: str, name: str) -> Message:
    """Return the one tensor of a list, which must have this name.

    Raises:
        RequestError: There are none or several, or it has another name.
    """
    if len(tensors) != 1:
        refuse(field, f"{len(tensors)} tensors", f"one tensor, {name!r}")
    if tensors[0].name != name:
        refuse(f"{field}[0].name", tensors[0].name or None, repr(name))
    return tensors[0]


def read_contents(
    contents: Message, typed: list[str], shape: Any, datatype: str, limits: Limits
) -> Float32:
    """Read a tensor that came as numbers.

    Args:
        contents: the ``InferTensorContents``.
        typed: its fields that are not empty.
        shape: of the tensor.
        datatype: likewise.
        limits: what may be asked for.

    Returns:
        float32 ``[n, 784]``.

    Raises:
        RequestError: They are not as many as the shape says, of another type, or no pixels.
    """
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
        place = int(np.flatnonzero(pixels > 255)[0])
        refuse_pixel(place, str(pixels[place]), "an integer from 0 to 255", where)
    return network_input(pixels.astype(np.uint8).reshape(shape[0], PIXELS))


def read_output(output: Message) -> int:
    """Return how many classes a requested output asks for; 0: the logits.

    Raises:
        RequestError: It asks for what there is not.
    """
    own = plain(output.parameters)
    if "shared_memory_region" in own:
        refuse("outputs[0].parameters", "shared_memory_region", "an answer in the message")
    classes = own.get("classification", 0)
    if type(classes) is not int or classes < 0:
        refuse("outputs[0].parameters.classification", classes, "how many classes, 1 or more")
    return min(classes, CLASSES)


def plain(parameters: Mapping[str, Message]) -> dict[str, Any]:
    """Return parameters as Python's own types; None is one without a value."""
    chosen = {name: one.WhichOneof("parameter_choice") for name, one in parameters.items()}
    return {
        name: getattr(parameters[name], choice) if choice else None
        for name, choice in chosen.items()
    }


def write_answer(message: Message, request: InferRequest, logits: Float32, model: Model) -> Message:
    """Write a ``ModelInferResponse``; raw where the request was, else as numbers.

    Args:
        message: the request.
        request: what was read from it.
        logits: float32 ``[n, 10]``.
        model: that gave them.
    """
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
    if message.parameters:
        answer["parameters"] = message.parameters
    return service_pb2.ModelInferResponse(outputs=[output], **answer)


def model_config(model: Model, limits: Limits, workers: int) -> Message:
    """Write a ``ModelConfigResponse``; see `describe.model_configuration`."""
    told = model_configuration(model, limits, workers)
    config = json_format.ParseDict(told, config_pb2.ModelConfig())
    return service_pb2.ModelConfigResponse(config=config)
