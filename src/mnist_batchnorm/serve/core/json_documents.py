"""Parse JSON by pysimdjson, or by orjson where it is not installed, and read a tensor's numbers.

pysimdjson passes a list of numbers to NumPy in one piece, and leaves other lists and objects
unread until they are needed.
"""

import itertools
from collections.abc import Sequence
from math import prod
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import orjson

from mnist_batchnorm.serve.core.protocol import RequestError, refuse
from mnist_batchnorm.serve.core.tensors import DATA, Float64

simdjson: ModuleType | None
try:
    import simdjson
except ImportError:
    simdjson = None

# simdjson counts the elements of a list in 24 bits, and pysimdjson writes more than that beyond the
# list that it has made. An element and its comma are two bytes or more.
SIMDJSON_MAX_BYTES = 2 * 0xFFFFFF
BOM = b"\xef\xbb\xbf"


class AmbiguousObjectError(Exception):
    """An object in which simdjson cannot look up every field: orjson must parse it."""


def load_with_orjson(text: bytes) -> dict[str, Any]:
    """Parse an object into Python's own types; RequestError: it is invalid."""
    try:
        document = orjson.loads(text.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}", reason="json") from None
    if not isinstance(document, dict):
        refuse("the body", document, "an object")
    return document


def load(text: bytes) -> dict[str, Any]:
    """Parse an object, its fields unread where simdjson is installed; raises RequestError."""
    if not simdjson or len(text) > SIMDJSON_MAX_BYTES:
        return load_with_orjson(text)
    try:
        # A new parser each time: it keeps what it has read, and a traceback may keep the parser.
        document = simdjson.Parser().parse(text)
    except (ValueError, RuntimeError):
        return load_with_orjson(text)  # locates the mistake, unless it is an integer of 65 bits
    if not isinstance(document, simdjson.Object):
        refuse("the body", to_python(document), "an object")
    return fields_of(document)


OBJECT = (dict, simdjson.Object) if simdjson else dict
LIST = (list, simdjson.Array) if simdjson else list


def to_python(value: Any) -> Any:
    """Convert a parsed value to Python's own types."""
    if simdjson and isinstance(value, simdjson.Object):
        return value.as_dict()
    return value.as_list() if simdjson and isinstance(value, simdjson.Array) else value


def fields_of(parsed: Any) -> dict[str, Any]:
    """Return an object's fields, unread; AmbiguousObjectError: a name is repeated or has a NUL."""
    try:
        fields = {name: parsed[name] for name in parsed.keys()}  # noqa: SIM118 - also pysimdjson's
    except KeyError:
        raise AmbiguousObjectError from None
    if len(fields) != len(parsed):
        raise AmbiguousObjectError
    return fields


def parse_numbers(text: bytes, count: int) -> Float64 | None:
    """Return a flat JSON list of `count` numbers; None: the text is not, or may not be, one."""
    if not simdjson or len(text) > SIMDJSON_MAX_BYTES:
        return None
    try:
        parsed = simdjson.Parser().parse(text)
    except (ValueError, RuntimeError):
        return None
    return to_numbers(parsed, count)


def to_numbers(parsed: Any, count: int) -> Float64 | None:
    """Return the numbers of simdjson's list, of nested ones too; None: not `count` numbers."""
    try:
        values: Float64 = np.frombuffer(parsed.as_buffer(of_type="d"), np.float64)
    except (ValueError, TypeError):
        return None
    return values if len(values) == count else None


def read_numbers(data: Any, shape: Sequence[int], brackets: int) -> Float64:
    """Return the numbers of a tensor, flat; raises RequestError.

    `brackets` is the number of lists that the request can contain in `data`, itself included.
    """
    if not isinstance(data, LIST):
        refuse(DATA, to_python(data), "a list of numbers", "data")
    count = prod(shape)
    if not isinstance(data, list) and _is_well_nested(data, shape, count, brackets):
        values = to_numbers(data, count)
        if values is not None:
            return values
    expected = shape[0] if len(data) and isinstance(data[0], LIST) else count
    if len(data) != expected:  # before converting: the list may be too long for Python objects
        _refuse_length(DATA, len(data), expected, shape)
    return np.array(_flatten(to_python(data), shape), np.float64)


def count_brackets(body: bytes, limit: int) -> int:
    """Count opening brackets up to a limit; `find` is ten times as fast as `count`."""
    count, index = 0, body.find(b"[")
    while index >= 0 and count < limit:
        count, index = count + 1, body.find(b"[", index + 1)
    return count


def _is_well_nested(data: Any, shape: Sequence[int], count: int, brackets: int) -> bool:
    """Whether it is cheap to see that the lists are nested correctly; False: unknown.

    Only then may all numbers inside them be read, regardless of the nesting.
    """
    if brackets == 1:
        return len(data) == count
    if len(shape) == 2 and brackets == 1 + shape[0] == 1 + len(data):
        return all(isinstance(row, LIST) and len(row) == shape[1] for row in data)
    return False


def _flatten(data: list[Any], shape: Sequence[int]) -> list[Any]:
    nested = bool(data) and isinstance(data[0], list)
    levels = shape if nested else [prod(shape)]
    flat: list[Any] = [data]
    for depth, length in enumerate(levels):
        for index, part in enumerate(flat):
            if not isinstance(part, list):
                refuse(_locate(index, levels[:depth]), part, f"a list of {length}", "data")
            if len(part) != length:
                _refuse_length(_locate(index, levels[:depth]), len(part), length, shape)
        flat = list(itertools.chain.from_iterable(flat))
    if not set(map(type, flat)) <= {int, float}:
        index = next(i for i, value in enumerate(flat) if type(value) not in (int, float))
        refuse(_locate(index, levels), flat[index], "a number", "data")
    return flat


def _refuse_length(where: str, got: int, expected: int, shape: Sequence[int]) -> NoReturn:
    refuse(where, f"a list of {got}", f"one of {expected} for shape {list(shape)}", "data")


def _locate(index: int, lengths: Sequence[int]) -> str:
    """Name a value in the data by its index among all values of its depth."""
    indices = np.unravel_index(index, tuple(lengths)) if lengths else ()
    return DATA + "".join(f"[{i}]" for i in indices)
