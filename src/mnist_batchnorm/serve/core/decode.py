"""Decode the body of an inference request: JSON, and raw tensors after it."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.serve.core.json_documents import (
    LIST,
    OBJECT,
    AmbiguousObjectError,
    count_brackets,
    fields_of,
    load,
    load_with_orjson,
    parse_numbers,
    read_numbers,
    simdjson,
    to_python,
)
from mnist_batchnorm.serve.core.protocol import (
    INPUT,
    MAX_QUOTED_CHARS,
    OUTPUT,
    InferRequest,
    RequestError,
    refuse,
)
from mnist_batchnorm.serve.core.settings import Limits
from mnist_batchnorm.serve.core.tensors import TENSOR, check_shape, convert_images, decode_raw


def decode(body: bytes, json_length: int | None, limits: Limits) -> InferRequest:
    """Decode a request; raises RequestError.

    Args:
        body: JSON, followed by raw tensors if `json_length` is given.
        json_length: bytes of JSON; None: all of the body.
        limits: on the content.
    """
    if json_length is None:
        frame = _split_frame(body) if simdjson else None
        known = _decode_known(body, frame, limits) if frame else None
        return known or _decode_json(body, frame, limits)
    if json_length > len(body):
        expected = f"at most the body's {len(body)} bytes"
        refuse("Inference-Header-Content-Length", json_length, expected, "binary")
    document = load_with_orjson(body[:json_length])
    return _decode_document(body, document, body[json_length:], limits)


def _decode_document(
    body: bytes, document: dict[str, Any], raw: bytes, limits: Limits
) -> InferRequest:
    tensor = _only_tensor(document, "inputs", INPUT)
    if tensor is None:
        refuse("inputs", None, f"a list of one tensor, {INPUT!r}")
    shape, datatype = check_shape(
        to_python(tensor.get("shape")), to_python(tensor.get("datatype")), limits
    )
    parameters = _object(tensor, f"{TENSOR}.parameters")
    if "shared_memory_region" in parameters:
        refuse(f"{TENSOR}.parameters", "shared_memory_region", "the tensor itself")
    if "binary_data_size" in parameters:
        if tensor.get("data") is not None:
            refuse(TENSOR, "data and parameters.binary_data_size", "one of the two", "binary")
        field = f"{TENSOR}.parameters.binary_data_size"
        images = decode_raw(raw, parameters["binary_data_size"], field, shape, datatype, limits)
    elif raw:
        refuse("the body", f"{len(raw)} bytes after the JSON", "none", "binary")
    else:
        has_outputs = isinstance(document.get("outputs"), LIST)
        # less those of inputs and shape
        brackets = count_brackets(body, limit=shape[0] + 5) - 2 - has_outputs
        images = convert_images(read_numbers(tensor.get("data"), shape, brackets), datatype, limits)
    request = InferRequest(images)
    if len(document) > 1:
        _read_options(request, document)
    return request


def _only_tensor(document: dict[str, Any], field: str, name: str) -> dict[str, Any] | None:
    """Return the only tensor of a list, which must have this name; None: there is no list."""
    tensors = document.get(field)
    if tensors is None:
        return None
    if not isinstance(tensors, LIST) or len(tensors) != 1:
        got = f"{len(tensors)} tensors" if isinstance(tensors, LIST) else to_python(tensors)
        refuse(field, got, f"a list of one tensor, {name!r}")
    if not isinstance(tensors[0], OBJECT):
        refuse(f"{field}[0]", to_python(tensors[0]), "an object")
    tensor = fields_of(tensors[0])
    if tensor.get("name") != name:
        refuse(f"{field}[0].name", to_python(tensor.get("name")), repr(name))
    return tensor


def _object(parent: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the object in the field that `path` ends with; empty: there is none."""
    value = parent.get(path.rpartition(".")[2])
    if value is None:
        return {}
    if not isinstance(value, OBJECT):
        refuse(path, to_python(value), "an object")
    plain: dict[str, Any] = to_python(value)
    return plain


def _boolean(parent: dict[str, Any], path: str, *, default: bool) -> bool:
    value = parent.get(path.rpartition(".")[2], default)
    if not isinstance(value, bool):
        refuse(path, value, "true or false")
    return value


def _read_options(request: InferRequest, document: dict[str, Any]) -> None:
    request.id = document.get("id")
    if request.id is not None and not isinstance(request.id, str):
        refuse("id", to_python(request.id), "a string")
    parameters = _object(document, "parameters")
    request.binary = _boolean(parameters, "parameters.binary_data_output", default=False)
    request.parameters = {k: v for k, v in parameters.items() if k != "binary_data_output"}
    for name, value in request.parameters.items():
        if not isinstance(value, str | int | float):
            path = f"parameters.{name[:MAX_QUOTED_CHARS]}"
            refuse(path, value, "a string, a number or a boolean")
    outputs = document.get("outputs")
    if isinstance(outputs, LIST) and not len(outputs):
        return
    output = _only_tensor(document, "outputs", OUTPUT)
    if output is None:
        return
    parameters = _object(output, "outputs[0].parameters")
    if "shared_memory_region" in parameters:
        refuse("outputs[0].parameters", "shared_memory_region", "an answer in the body")
    path = "outputs[0].parameters.binary_data"
    request.binary = _boolean(parameters, path, default=request.binary)
    request.classes = read_classes(parameters)


def read_classes(parameters: dict[str, Any]) -> int:
    """Return the number of classes that a requested output asks for; 0: the logits."""
    classes = parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        refuse("outputs[0].parameters.classification", classes, "how many classes, 1 or more")
    return min(classes, CLASSES)


# --- requests that differ in their numbers only ---------------------------------------------------
# A client repeats the same bytes around another list of numbers: they are parsed once.

NUMBERS = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[[ \t\r\n]*[-0-9])')
MARKER = secrets.randbits(31)  # replaces the numbers; clients cannot guess it
MAX_FRAMES, MAX_FRAME_BYTES = 256, 4096

Frame = tuple[bytes, bytes]  # before and after the numbers


@dataclass(frozen=True, slots=True)
class _Options:
    """A request without its images."""

    shape: Sequence[int]
    datatype: str
    binary: bool
    classes: int


_frames: dict[Frame, _Options] = {}


def _split_frame(body: bytes) -> Frame | None:
    """Return the bytes before and after the first flat list of data."""
    start = NUMBERS.search(body)
    if start is None:
        return None
    before, after = start.end(), body.find(b"]", start.end()) + 1
    if not after or before + len(body) - after > MAX_FRAME_BYTES:
        return None
    return body[:before], body[after:]


def _decode_known(body: bytes, frame: Frame, limits: Limits) -> InferRequest | None:
    options = _frames.get(frame)
    if not options or options.shape[0] > limits.rows:
        return None
    before, after = frame
    values = parse_numbers(body[len(before) : len(body) - len(after)], prod(options.shape))
    if values is None:
        return None
    images = convert_images(values, options.datatype, limits)
    return InferRequest(images, binary=options.binary, classes=options.classes)


def _decode_json(body: bytes, frame: Frame | None, limits: Limits) -> InferRequest:
    try:
        request = _decode_document(body, load(body), b"", limits)
    except AmbiguousObjectError:
        request = _decode_document(body, load_with_orjson(body), b"", limits)
    if frame and request.id is None and not request.parameters:  # which may differ each time
        _remember(frame, request)
    return request


def _remember(frame: Frame, request: InferRequest) -> None:
    """Cache the options of a frame, if the list that was cut out is the input's data."""
    before, after = frame
    try:
        document = load_with_orjson(b"%b[%d]%b" % (before, MARKER, after))
    except RequestError:
        return  # what was cut out is not a list
    tensor = document["inputs"][0]
    if tensor.get("data") != [MARKER]:
        return  # another list
    if len(_frames) >= MAX_FRAMES:
        _frames.clear()
    _frames[frame] = _Options(tensor["shape"], tensor["datatype"], request.binary, request.classes)
