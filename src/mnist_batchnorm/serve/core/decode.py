"""Read inference requests: JSON, and raw tensors behind it.

The numbers of an image are most of a request, and most of the time that it takes: pysimdjson hands
them to NumPy in one piece. Where it is not installed, orjson reads the same requests.
"""

import itertools
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import orjson

from mnist_batchnorm.artifacts.splits import CLASSES, network_input
from mnist_batchnorm.serve.core.protocol import (
    BYTES_OF,
    INPUT,
    LONGEST,
    OUTPUT,
    PIXELS,
    SHAPES_OF,
    Float32,
    InferRequest,
    RequestError,
    refuse,
)
from mnist_batchnorm.serve.core.settings import Limits

simdjson: ModuleType | None
try:
    import simdjson
except ImportError:
    simdjson = None

Float64 = npt.NDArray[np.float64]

TENSOR = "inputs[0]"
DATA = f"{TENSOR}.data"
# simdjson counts the elements of a list in 24 bits, and pysimdjson writes more than that beyond the
# list that it has made. An element and its comma are two bytes or more.
LARGEST = 2 * 0xFFFFFF
NUMBERS = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[[ \t\r\n]*[-0-9])')
PROBE = secrets.randbits(31)  # stands for the numbers; no client knows it
MOST_FORMS, LONGEST_FORM = 256, 4096  # how many are remembered, and bytes of one
BOM = b"\xef\xbb\xbf"


class _AmbiguousError(Exception):
    """An object in which simdjson cannot look up every field: the other parser reads it."""


def decode(body: bytes, json_length: int | None, limits: Limits) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: JSON, followed by raw tensors where ``json_length`` says how long the JSON is.
        json_length: bytes of JSON; None: all of it.
        limits: what it may ask for.

    Raises:
        RequestError: It is not a request that can be answered.
    """
    if json_length is None:
        around = _around(body) if simdjson else None
        known = _decode_known(body, around, limits) if around else None
        return known or _decode_json(body, around, limits)
    if json_length > len(body):
        expected = f"at most the body's {len(body)} bytes"
        refuse("Inference-Header-Content-Length", json_length, expected, "binary")
    return _decode(body, _load_small(body[:json_length]), body[json_length:], limits)


def _decode_json(body: bytes, around: tuple[bytes, bytes] | None, limits: Limits) -> InferRequest:
    try:
        request = _decode(body, _load(body), b"", limits)
    except _AmbiguousError:
        request = _decode(body, _load_small(body), b"", limits)
    if around and request.id is None and not request.parameters:  # which may differ each time
        _remember(around, request)
    return request


def _decode(body: bytes, document: dict[str, Any], tail: bytes, limits: Limits) -> InferRequest:
    tensor = _only_tensor(document, "inputs", INPUT)
    if tensor is None:
        refuse("inputs", None, f"a list of one tensor, {INPUT!r}")
    shape, datatype = check_shape(_plain(tensor.get("shape")), tensor.get("datatype"), limits)
    own = _object(tensor, f"{TENSOR}.parameters")
    if "shared_memory_region" in own:
        refuse(f"{TENSOR}.parameters", "shared_memory_region", "the tensor itself")
    if "binary_data_size" in own:
        if tensor.get("data") is not None:
            refuse(TENSOR, "data and parameters.binary_data_size", "one of the two", "binary")
        size = f"{TENSOR}.parameters.binary_data_size"
        images = decode_raw(tail, own["binary_data_size"], size, shape, datatype, limits)
    elif tail:
        refuse("the body", f"{len(tail)} bytes after the JSON", "none", "binary")
    else:
        listed = isinstance(document.get("outputs"), _LIST)
        brackets = _brackets(body, most=shape[0] + 5) - 2 - listed  # those of inputs and shape
        images = _images(_numbers(tensor.get("data"), shape, brackets), datatype, limits)
    request = InferRequest(images)
    if len(document) > 1:
        _read_rest(request, document)
    return request


def check_shape(
    shape: object, datatype: object, limits: Limits, where: str = TENSOR
) -> tuple[Sequence[int], str]:
    """Return the shape and the datatype of the input, if they are ones that the models take.

    Raises:
        RequestError: They are not.
    """
    if not isinstance(datatype, str) or datatype not in SHAPES_OF:
        refuse(f"{where}.datatype", _plain(datatype), " or ".join(SHAPES_OF), "datatype")
    if (
        not isinstance(shape, list)
        or not shape
        or any(type(length) is not int for length in shape)
        or tuple(shape[1:]) not in SHAPES_OF[datatype]
        or shape[0] < 0
    ):
        known = (f"[n, {', '.join(map(str, tail))}]" for tail in SHAPES_OF[datatype])
        refuse(f"{where}.shape", shape, f"{' or '.join(known)} of {datatype}", "shape")
    if shape[0] > limits.rows:
        refuse(f"{where}.shape", f"{shape[0]} images", f"at most {limits.rows}", "rows", 413)
    return shape, datatype


def decode_raw(
    raw: bytes,
    size: object,
    where: str,
    shape: Sequence[int],
    datatype: str,
    limits: Limits,
    data: str = DATA,
) -> Float32:
    """Read a raw tensor, little-endian and row-major.

    Args:
        raw: what came.
        size: how many bytes the request says that are.
        where: the request says so.
        shape: of the tensor.
        datatype: likewise.
        limits: what may be asked for.
        data: where the tensor is, for what is said of its values.

    Returns:
        float32 ``[n, 784]``.

    Raises:
        RequestError: The numbers of bytes do not agree, or a value is not finite.
    """
    expected = prod(shape) * BYTES_OF[datatype]
    if type(size) is not int or size != expected:
        refuse(where, _plain(size), f"{expected} for {datatype} {shape}", "binary")
    if len(raw) != expected:
        refuse("the body", f"{len(raw)} bytes of tensor", f"{expected}", "binary")
    if datatype == "UINT8":
        return network_input(np.frombuffer(raw, np.uint8).reshape(shape[0], PIXELS))
    return check_finite(np.frombuffer(raw, "<f4"), limits, data)


def check_finite(
    values: npt.NDArray[np.floating[Any]], limits: Limits, where: str = DATA
) -> Float32:
    """Return the images, float32 ``[n, 784]``, if all their pixels are finite or need not be.

    Raises:
        RequestError: One is not.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows here is refused by name
        flat = values.astype(np.float32, copy=False).reshape(-1)
        # a square is finite only where its root is; where it is not, the root may be all the same
        if isfinite(flat.dot(flat)) or limits.nonfinite or np.isfinite(flat).all():
            return flat.reshape(-1, PIXELS)
    place = int(np.flatnonzero(~np.isfinite(flat))[0])
    expected = "a finite FP32 (the server's option --allow-nonfinite lets it pass)"
    return refuse_pixel(place, str(flat[place]), expected, where, "nonfinite")


def refuse_pixel(
    place: int, got: str, expected: str, where: str = DATA, reason: str = "data"
) -> NoReturn:
    """Refuse a request for one pixel.

    Args:
        place: of the pixel among those of all images.
        got: what it is.
        expected: what it should be.
        where: the images are.
        reason: a word for the metrics.

    Raises:
        RequestError: Always.
    """
    image, pixel = divmod(place, PIXELS)
    refuse(f"{where}, image {image}, pixel {pixel}", got, expected, reason)


# --- what is around the numbers -------------------------------------------------------------------
# Clients send it again and again: the same bytes around another list of numbers are the same
# request with other images, so they are read once.


@dataclass(frozen=True, slots=True)
class _Form:
    """What a request is but for its images."""

    shape: Sequence[int]
    datatype: str
    binary: bool
    classes: int


_forms: dict[tuple[bytes, bytes], _Form] = {}  # by what is before and behind the numbers


def _around(body: bytes) -> tuple[bytes, bytes] | None:
    """Return what is before and behind the first flat list of data."""
    start = NUMBERS.search(body)
    if start is None:
        return None
    before, behind = start.end(), body.find(b"]", start.end()) + 1
    if not behind or before + len(body) - behind > LONGEST_FORM:
        return None
    return body[:before], body[behind:]


def _decode_known(body: bytes, around: tuple[bytes, bytes], limits: Limits) -> InferRequest | None:
    form = _forms.get(around)
    if not form or form.shape[0] > limits.rows or len(body) > LARGEST:
        return None
    assert simdjson
    before, behind = around
    try:
        data = simdjson.Parser().parse(body[len(before) : len(body) - len(behind)])
    except (ValueError, RuntimeError):
        return None
    values = _buffer(data, prod(form.shape))
    if values is None:
        return None
    images = _images(values, form.datatype, limits)
    return InferRequest(images, binary=form.binary, classes=form.classes)


def _remember(around: tuple[bytes, bytes], request: InferRequest) -> None:
    """Remember what is around the numbers of a request, if it is clear where they are."""
    before, behind = around
    try:
        document = _load_small(b"%b[%d]%b" % (before, PROBE, behind))
    except RequestError:
        return  # it is no list that has been cut out
    tensor = document["inputs"][0]
    if tensor.get("data") != [PROBE]:
        return  # it is another list
    if len(_forms) >= MOST_FORMS:
        _forms.clear()
    _forms[around] = _Form(tensor["shape"], tensor["datatype"], request.binary, request.classes)


# --- JSON ---------------------------------------------------------------------------------------


def _load_small(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", reason="json") from None
    if not isinstance(document, dict):
        refuse("the body", document, "an object")
    return document


def _load_large(text: bytes) -> dict[str, Any]:
    assert simdjson
    if len(text) > LARGEST:
        return _load_small(text)
    try:
        # A parser of its own: it keeps what it has read, and a traceback may keep it in turn.
        document = simdjson.Parser().parse(text)
    except (ValueError, RuntimeError):
        return _load_small(text)  # says where the mistake is, unless it is an integer of 65 bits
    if not isinstance(document, simdjson.Object):
        refuse("the body", _plain(document), "an object")
    return _fields(document)


_load: Callable[[bytes], dict[str, Any]] = _load_large if simdjson else _load_small
_OBJECT = (dict, simdjson.Object) if simdjson else dict
_LIST = (list, simdjson.Array) if simdjson else list


def _plain(value: Any) -> Any:
    """Turn what the parser gives into Python's own types."""
    if simdjson and isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if simdjson and isinstance(value, simdjson.Array) else value


def _fields(of: Any) -> dict[str, Any]:
    """Return an object's fields, of which those that hold lists or objects stay unread.

    Raises:
        _AmbiguousError: A name is there twice, or holds a NUL.
    """
    try:
        fields = {name: of[name] for name in of.keys()}  # noqa: SIM118 - also pysimdjson's
    except KeyError:
        raise _AmbiguousError from None
    if len(fields) != len(of):
        raise _AmbiguousError
    return fields


def _only_tensor(document: dict[str, Any], field: str, name: str) -> dict[str, Any] | None:
    """Return the one tensor of a list, which must have this name; None: there is no list."""
    tensors = document.get(field)
    if tensors is None:
        return None
    if not isinstance(tensors, _LIST) or len(tensors) != 1:
        got = f"{len(tensors)} tensors" if isinstance(tensors, _LIST) else _plain(tensors)
        refuse(field, got, f"a list of one tensor, {name!r}")
    if not isinstance(tensors[0], _OBJECT):
        refuse(f"{field}[0]", _plain(tensors[0]), "an object")
    tensor = _fields(tensors[0])
    if tensor.get("name") != name:
        refuse(f"{field}[0].name", _plain(tensor.get("name")), repr(name))
    return tensor


def _object(of: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the object in the field that ``where`` ends with; empty: there is none."""
    value = of.get(where.rpartition(".")[2])
    if value is None:
        return {}
    if not isinstance(value, _OBJECT):
        refuse(where, _plain(value), "an object")
    plain: dict[str, Any] = _plain(value)
    return plain


def _read_rest(request: InferRequest, document: dict[str, Any]) -> None:
    """Read everything but the tensor."""
    request.id = document.get("id")
    if request.id is not None and not isinstance(request.id, str):
        refuse("id", _plain(request.id), "a string")
    parameters = _object(document, "parameters")
    request.binary = _boolean(parameters, "parameters.binary_data_output", default=False)
    request.parameters = {k: v for k, v in parameters.items() if k != "binary_data_output"}
    for name, value in request.parameters.items():
        if not isinstance(value, str | int | float):
            refuse(f"parameters.{name[:LONGEST]}", value, "a string, a number or a boolean")
    listed = document.get("outputs")
    if isinstance(listed, _LIST) and not len(listed):
        return
    output = _only_tensor(document, "outputs", OUTPUT)
    if output is None:
        return
    own = _object(output, "outputs[0].parameters")
    if "shared_memory_region" in own:
        refuse("outputs[0].parameters", "shared_memory_region", "an answer in the body")
    request.binary = _boolean(own, "outputs[0].parameters.binary_data", default=request.binary)
    classes = own.get("classification", 0)
    if type(classes) is not int or classes < 0:
        refuse("outputs[0].parameters.classification", classes, "how many classes, 1 or more")
    request.classes = min(classes, CLASSES)


def _boolean(of: dict[str, Any], where: str, *, default: bool) -> bool:
    value = of.get(where.rpartition(".")[2], default)
    if not isinstance(value, bool):
        refuse(where, value, "true or false")
    return value


# --- numbers ------------------------------------------------------------------------------------


def _numbers(data: Any, shape: Sequence[int], brackets: int) -> Float64:
    """Return the numbers of a tensor in JSON, flat; ``data`` is so too, or nested as ``shape``.

    Args:
        data: the list.
        shape: what it should hold.
        brackets: how many lists the request may have inside this one, itself included.
    """
    if not isinstance(data, _LIST):
        refuse(DATA, _plain(data), "a list of numbers", "data")
    count = prod(shape)
    if not isinstance(data, list) and _well_nested(data, shape, count, brackets):
        values = _buffer(data, count)
        if values is not None:
            return values
    expected = shape[0] if len(data) and isinstance(data[0], _LIST) else count
    if len(data) != expected:  # perhaps too many to make objects of them
        _wrong_length(DATA, len(data), expected, shape)
    flat = _flatten(_plain(data), shape)
    return np.array(flat, np.float64)


def _buffer(data: Any, count: int) -> Float64 | None:
    """Return what simdjson's list holds, if that is so many numbers and nothing else."""
    try:
        values: Float64 = np.frombuffer(data.as_buffer(of_type="d"), np.float64)
    except (ValueError, TypeError):
        return None
    return values if len(values) == count else None


def _brackets(body: bytes, most: int) -> int:
    """Count opening brackets up to a number: `find` is ten times as fast as `count`."""
    count, place = 0, body.find(b"[")
    while place >= 0 and count < most:
        count, place = count + 1, body.find(b"[", place + 1)
    return count


def _well_nested(data: Any, shape: Sequence[int], count: int, brackets: int) -> bool:
    """Tell at little cost whether lists lie in each other as they should.

    Only then is it safe to ask for all numbers inside them, whatever lies in what. False: perhaps.
    """
    if brackets == 1:
        return len(data) == count
    if len(shape) == 2 and brackets == 1 + shape[0] == 1 + len(data):
        return all(isinstance(row, _LIST) and len(row) == shape[1] for row in data)
    return False


def _flatten(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Return all numbers of lists that lie in each other as the shape says, or not at all."""
    nested = bool(data) and isinstance(data[0], list)
    levels = shape if nested else [prod(shape)]
    flat: list[Any] = [data]
    for depth, length in enumerate(levels):
        for place, part in enumerate(flat):
            if not isinstance(part, list):
                refuse(_place(place, levels[:depth]), part, f"a list of {length}", "data")
            if len(part) != length:
                _wrong_length(_place(place, levels[:depth]), len(part), length, shape)
        flat = list(itertools.chain.from_iterable(flat))
    if not set(map(type, flat)) <= {int, float}:
        place = next(i for i, value in enumerate(flat) if type(value) not in (int, float))
        refuse(_place(place, levels), flat[place], "a number", "data")
    return flat


def _wrong_length(where: str, got: int, expected: int, shape: Sequence[int]) -> NoReturn:
    refuse(where, f"a list of {got}", f"one of {expected} for shape {list(shape)}", "data")


def _place(position: int, lengths: Sequence[int]) -> str:
    """Name the place of a value in the data, from its place among all of its depth."""
    indices = np.unravel_index(position, tuple(lengths)) if lengths else ()
    return DATA + "".join(f"[{index}]" for index in indices)


def _images(values: Float64, datatype: str, limits: Limits) -> Float32:
    if datatype == "UINT8":
        wrong = np.flatnonzero((values != np.floor(values)) | (values < 0) | (values > 255))
        if len(wrong):
            refuse_pixel(int(wrong[0]), f"{values[wrong[0]]:.17g}", "an integer from 0 to 255")
        return network_input(values.astype(np.uint8).reshape(-1, PIXELS))
    return check_finite(values, limits)
