"""Bodies of inference requests: odd ones that are accepted, and invalid ones with their errors."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mnist_batchnorm.serve.core.protocol import Float32

PIXELS = 784
IMAGE = [round(0.001 * i, 3) for i in range(PIXELS)]
GRAY = [i % 256 for i in range(PIXELS)]
ROWS = [GRAY[28 * i : 28 * (i + 1)] for i in range(28)]
MISSING = object()  # as a field's value: without the field


def tensor(**changed: Any) -> dict[str, Any]:
    """A tensor of one image, with other fields."""
    fields = {"name": "image", "datatype": "FP32", "shape": [1, PIXELS], "data": IMAGE} | changed
    return {name: value for name, value in fields.items() if value is not MISSING}


def bytes_tensor(**changed: Any) -> dict[str, Any]:
    """A tensor of one image in pixels, with other fields."""
    return tensor(**{"datatype": "UINT8", "data": GRAY} | changed)


def request(*inputs: Any, **fields: Any) -> bytes:
    """A request with these inputs, by default one image."""
    return json.dumps({"inputs": list(inputs or [tensor()])} | fields).encode()


def written(number: str, datatype: str = "FP32") -> bytes:
    """A request whose pixel 5 is written so, whether that is JSON or not."""
    numbers = ["0"] * PIXELS
    numbers[5] = number
    marked = request(tensor(datatype=datatype, data="HERE"))
    return marked.replace(b'"HERE"', f"[{','.join(numbers)}]".encode())


def with_text(text: bytes) -> bytes:
    """A request whose id is written so, whether that is JSON or not."""
    return request(id="HERE").replace(b"HERE", text)


def at(place: int, value: Any) -> list[Any]:
    """An image with another value at a place."""
    return [*IMAGE[:place], value, *IMAGE[place + 1 :]]


def nested(depth: int) -> Any:
    """Lists in each other."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class Rejected:
    """An invalid body.

    Attributes:
        what: description.
        says: part of the error message.
        json_length: of the JSON before raw tensors; None: all is JSON.
    """

    what: str
    body: bytes
    says: str
    json_length: int | None = None
    status: int = 400


def raw(
    size: Any, content: bytes, what: str, says: str, datatype: str = "FP32", **changed: Any
) -> Rejected:
    """An invalid request with a raw tensor that claims `size` bytes."""
    parameters = {"binary_data_size": size}
    head = request(tensor(datatype=datatype, data=MISSING, parameters=parameters, **changed))
    return Rejected(what, head + content, says, len(head))


FLOATS = struct.pack(f"<{PIXELS}f", *IMAGE)
NOT_FINITE = np.array(at(5, np.nan), "<f4").tobytes()
A_LIST = "inputs: got {}, expected a list of one tensor, 'image'"
NO_JSON = "the body is not JSON"
DATA = "inputs[0].data"

NO_REQUEST = [
    Rejected("nothing", b"", NO_JSON),
    Rejected("spaces", b"  \r\n", NO_JSON),
    Rejected("words", b"hello", NO_JSON),
    Rejected("null", b"null", "the body: got nothing, expected an object"),
    Rejected("a list", b"[1, 2]", "the body: got [1, 2], expected an object"),
    Rejected("a large list", b"[%b1]" % (b"1," * 100_000), "the body: got [1, 1"),
    Rejected("a string", b'"inputs"', "the body: got inputs, expected an object"),
    Rejected("a number", b"12", "the body: got 12, expected an object"),
    Rejected("half", request()[:2000], NO_JSON),
    Rejected("a bracket missing", request()[:-1], NO_JSON),
    Rejected("something behind it", request() + b"x", NO_JSON),
    Rejected("two at once", request() * 2, NO_JSON),
    Rejected("single quotes", request().replace(b'"', b"'"), NO_JSON),
    Rejected("a comment", b"/* one image */" + request(), NO_JSON),
    Rejected("a comma too many", request().replace(b"]}", b",]}"), NO_JSON),
    Rejected("a form", b"inputs=image&data=0", NO_JSON),
    Rejected("gzip that no header tells of", b"\x1f\x8b\x08\0\0\0\0\0", NO_JSON),
    Rejected("a NUL behind it", request() + b"\0", NO_JSON),
    Rejected("half a byte order mark", b"\xef\xbb" + request(), NO_JSON),
    Rejected("UTF-16", request().decode().encode("utf-16"), NO_JSON),
    Rejected("UTF-16 without a mark", request().decode().encode("utf-16-le"), NO_JSON),
    Rejected("UTF-32", request().decode().encode("utf-32"), NO_JSON),
    Rejected("bytes that are not UTF-8", with_text(b"\xff\xfe"), NO_JSON),
    Rejected("an overlong form", with_text(b"\xc0\xaf"), NO_JSON),
    Rejected("a surrogate in UTF-8", with_text(b"\xed\xa0\x80"), NO_JSON),
    Rejected("half a surrogate pair", with_text(rb"\ud800"), NO_JSON),
    Rejected("the other half", with_text(rb"\udc00x"), NO_JSON),
    Rejected("a control character in a string", with_text(b"a\nb"), NO_JSON),
    Rejected("an unknown escape", with_text(rb"\x41"), NO_JSON),
    Rejected("lists 100,000 deep", b"[" * 100_000, NO_JSON),
    Rejected("objects 100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, NO_JSON),
]
INPUTS = [
    Rejected("no inputs", b"{}", A_LIST.format("nothing")),
    Rejected("inputs null", b'{"inputs":null}', A_LIST.format("nothing")),
    Rejected("inputs in other letters", b'{"Inputs":[]}', A_LIST.format("nothing")),
    Rejected("inputs an object", b'{"inputs":{}}', A_LIST.format("{}")),
    Rejected("inputs a string", b'{"inputs":"image"}', A_LIST.format("image")),
    Rejected("instances, as in version 1", b'{"instances":[[0]]}', A_LIST.format("nothing")),
    Rejected("no input", b'{"inputs":[]}', A_LIST.format("0 tensors")),
    Rejected("two inputs", request(tensor(), tensor()), A_LIST.format("2 tensors")),
    Rejected("another input besides", request(tensor(), tensor(name="mask")), "got 2 tensors"),
    Rejected("null as the input", request(None), "inputs[0]: got nothing, expected an object"),
    Rejected("a list as the input", request([0.5]), "inputs[0]: got [0.5], expected an object"),
    Rejected("a number as the input", request(0.5), "inputs[0]: got 0.5, expected an object"),
    Rejected("lists 900 deep as the input", request(nested(900)), "inputs[0]: got [[[["),
    Rejected(
        "no name", request(tensor(name=MISSING)), "inputs[0].name: got nothing, expected 'image'"
    ),
    Rejected("another name", request(tensor(name="x")), "inputs[0].name: got x, expected 'image'"),
    Rejected("a number as the name", request(tensor(name=1)), "inputs[0].name: got 1, expected"),
    Rejected("an object as the name", request(tensor(name={"a": []})), "inputs[0].name: got {'a'"),
    Rejected(
        "no datatype", request(tensor(datatype=MISSING)), "datatype: got nothing, expected FP32"
    ),
    Rejected(
        "datatype fp32", request(tensor(datatype="fp32")), "datatype: got fp32, expected FP32"
    ),
    Rejected(
        "datatype FP16", request(tensor(datatype="FP16")), "datatype: got FP16, expected FP32"
    ),
    Rejected(
        "datatype FP64", request(tensor(datatype="FP64")), "datatype: got FP64, expected FP32"
    ),
    Rejected("datatype INT64", request(tensor(datatype="INT64")), "got INT64, expected FP32 or"),
    Rejected("datatype BYTES", request(tensor(datatype="BYTES")), "got BYTES, expected FP32 or"),
    Rejected("a number as the datatype", request(tensor(datatype=1)), "datatype: got 1, expected"),
    Rejected(
        "a list as the datatype", request(tensor(datatype=["FP32"])), "datatype: got ['FP32']"
    ),
    Rejected(
        "a datatype of 100,000 letters",
        request(tensor(datatype="F" * 100_000)),
        f"got {'F' * 79}…, expected FP32 or UINT8",
    ),
    Rejected(
        "the input's parameters a list",
        request(tensor(parameters=[])),
        "inputs[0].parameters: got []",
    ),
    Rejected(
        "the input's parameters a string",
        request(tensor(parameters="a")),
        "inputs[0].parameters: got a",
    ),
    Rejected(
        "shared memory",
        request(tensor(data=MISSING, parameters={"shared_memory_region": "a"})),
        "inputs[0].parameters: got shared_memory_region, expected the tensor itself",
    ),
    Rejected(
        "shared memory besides the data",
        request(tensor(parameters={"shared_memory_region": "a", "shared_memory_byte_size": 3136})),
        "inputs[0].parameters: got shared_memory_region, expected the tensor itself",
    ),
]


def shape(what: str, given: Any, *, datatype: str = "FP32", status: int = 400) -> Rejected:
    """A request with a wrong shape."""
    body = request(tensor(shape=given, datatype=datatype))
    return Rejected(what, body, "inputs[0].shape: got ", status=status)


SHAPES = [
    shape("no shape", MISSING),
    shape("shape null", None),
    shape("a string as the shape", "1,784"),
    shape("a number as the shape", 784),
    shape("an object as the shape", {"n": 1}),
    shape("an empty shape", []),
    shape("no batch axis", [784]),
    shape("axes exchanged", [784, 1]),
    shape("a pixel less", [1, 783]),
    shape("an axis more", [1, 784, 1]),
    shape("FP32 in rows", [1, 28, 28]),
    shape("UINT8 with channels", [1, 1, 28, 28], datatype="UINT8"),
    shape("UINT8 without the batch axis", [28, 28], datatype="UINT8"),
    shape("an open batch axis", [-1, 784]),
    shape("a fraction of an image", [0.5, 784]),
    shape("1.0 images", [1.0, 784]),
    shape("true images", [True, 784]),
    shape("null images", [None, 784]),
    shape("images in a string", ["1", 784]),
    shape("a shape in a shape", [[1, 784]]),
    shape("a shape 900 deep", nested(900)),
    shape("a shape of 100,000 axes", [1] * 100_000),
    shape("2^64 images", [2**64, 784]),
    shape("10^30 images", [10**30, 784]),
    shape("negative 2^63 images", [-(2**63), 784]),
    shape("10,001 images", [10_001, 784], status=413),
    shape("2^62 images", [2**62, 784], status=413),
    shape("10,001 images of UINT8", [10_001, 28, 28], datatype="UINT8", status=413),
]


def data(what: str, given: Any, says: str, **changed: Any) -> Rejected:
    """A request with wrong data."""
    return Rejected(what, request(tensor(data=given, **changed)), f"{DATA}{says}")


def pixels(what: str, given: Any, says: str, **changed: Any) -> Rejected:
    """A request with wrong data in pixels."""
    return data(what, given, says, datatype="UINT8", **changed)


NUMBERS = [
    data("no data", MISSING, ": got nothing, expected a list of numbers"),
    data("data null", None, ": got nothing, expected a list of numbers"),
    data("a string as the data", "AAAA", ": got AAAA, expected a list of numbers"),
    data("an object as the data", {"0": 0.5}, ": got {'0': 0.5}, expected a list of numbers"),
    data("a number as the data", 0.5, ": got 0.5, expected a list of numbers"),
    data("no numbers", [], ": got a list of 0, expected one of 784 for shape [1, 784]"),
    data("a number less", IMAGE[1:], ": got a list of 783, expected one of 784"),
    data("a number more", [*IMAGE, 0], ": got a list of 785, expected one of 784"),
    data("numbers for two images", IMAGE * 2, ": got a list of 1568, expected one of 784"),
    data(
        "numbers for half of two",
        IMAGE,
        ": got a list of 784, expected one of 1568",
        shape=[2, 784],
    ),
    data("null among numbers", at(5, None), "[5]: got nothing, expected a number"),
    data("true among numbers", at(5, True), "[5]: got True, expected a number"),
    data("only booleans", [True] * PIXELS, "[0]: got True, expected a number"),
    data("a string among numbers", at(5, "0.5"), "[5]: got 0.5, expected a number"),
    data("an object among numbers", at(5, {}), "[5]: got {}, expected a number"),
    data("a list among numbers", at(5, [0.5]), "[5]: got [0.5], expected a number"),
    data("an empty list among numbers", at(5, []), "[5]: got [], expected a number"),
    data("a list that is first", at(0, [0.5]), ": got a list of 784, expected one of 1"),
    data("lists that hide a number", [[], *IMAGE[1:]], ": got a list of 784, expected one of 1"),
    data("lists that hide two", [[0.0, 0.0], *IMAGE[2:]], ": got a list of 783, expected one of 1"),
    data("an empty list besides all", [[], *IMAGE], ": got a list of 785, expected one of 1"),
    data("an empty list and an image", [[], IMAGE], "[0]: got a list of 0", shape=[2, 784]),
    data(
        "an image in a number's place",
        [IMAGE, 0.5],
        "[1]: got 0.5, expected a list",
        shape=[2, 784],
    ),
    data("a row less", [IMAGE], ": got a list of 1, expected one of 2", shape=[2, 784]),
    data("a row more", [IMAGE] * 3, ": got a list of 3, expected one of 2", shape=[2, 784]),
    data("ragged rows", [IMAGE[1:], [*IMAGE, 0]], "[0]: got a list of 783", shape=[2, 784]),
    data("an object as a row", [IMAGE, {}], "[1]: got {}, expected a list", shape=[2, 784]),
    data("null in a row", [IMAGE, at(7, None)], "[1][7]: got nothing", shape=[2, 784]),
    data("a list too many", [[IMAGE]], "[0]: got a list of 1, expected one of 784"),
    data("each number in a list", [[x] for x in IMAGE], ": got a list of 784, expected one of 1"),
    Rejected(
        "a list among numbers, and outputs null",
        request(tensor(data=at(5, [0.5])), outputs=None),
        f"{DATA}[5]: got [0.5], expected a number",
    ),
    data("lists 900 deep", nested(900), "[0]: got a list of 1, expected one of 784"),
    data("lists 900 deep among numbers", at(5, nested(900)), "[5]: got [[[[[["),
    pixels(
        "rows of pixels for shape [1, 784]", [ROWS], "[0]: got a list of 28, expected one of 784"
    ),
    pixels("a row of pixels less", [ROWS[1:]], "[0]: got a list of 27", shape=[1, 28, 28]),
    pixels(
        "a pixel less in a row",
        [[*ROWS[:-1], [0] * 27]],
        "[0][27]: got a list of 27",
        shape=[1, 28, 28],
    ),
    pixels(
        "null as a pixel", [[*ROWS[:-1], [None] * 28]], "[0][27][0]: got nothing", shape=[1, 28, 28]
    ),
    pixels("a pixel of -1", [-1, *GRAY[1:]], ", image 0, pixel 0: got -1, expected an integer"),
    pixels(
        "a pixel of 256",
        [256, *GRAY[1:]],
        ", image 0, pixel 0: got 256, expected an integer from 0",
    ),
    pixels(
        "a pixel of 0.5", [*GRAY[1:], 0.5], ", image 0, pixel 783: got 0.5, expected an integer"
    ),
    pixels("a pixel of 2^63", [2**63, *GRAY[1:]], ", image 0, pixel 0: got 9.22337203685477"),
    pixels("a pixel in a string", ["1", *GRAY[1:]], "[0]: got 1, expected a number"),
]
FINITE = f"{DATA}, image 0, pixel 5: got "
SPELLED = [
    Rejected("NaN", written("NaN"), NO_JSON),
    Rejected("nan", written("nan"), NO_JSON),
    Rejected("Infinity", written("Infinity"), NO_JSON),
    Rejected("-Infinity", written("-Infinity"), NO_JSON),
    Rejected("inf", written("inf"), NO_JSON),
    Rejected("1e39", written("1e39"), f"{FINITE}inf, expected a finite FP32"),
    Rejected("-1e39", written("-1e39"), f"{FINITE}-inf, expected a finite FP32"),
    Rejected("3.4028236e38", written("3.4028236e38"), f"{FINITE}inf, expected a finite FP32"),
    Rejected("40 digits", written("9" * 40), f"{FINITE}inf, expected a finite FP32"),
    Rejected("1e999", written("1e999"), NO_JSON),
    Rejected("-1e999", written("-1e999"), NO_JSON),
    Rejected("400 digits", written("9" * 400), NO_JSON),
    Rejected("hexadecimal", written("0x10"), NO_JSON),
    Rejected("a plus", written("+1"), NO_JSON),
    Rejected("a leading zero", written("01"), NO_JSON),
    Rejected("no digit before the point", written(".5"), NO_JSON),
    Rejected("no digit behind the point", written("1."), NO_JSON),
    Rejected("no digit in the exponent", written("1e"), NO_JSON),
    Rejected("a minus alone", written("-"), NO_JSON),
    Rejected("a decimal comma", written("0,5"), ": got a list of 785"),
    Rejected("a gap", written(""), NO_JSON),
    Rejected("True", written("True"), NO_JSON),
    Rejected("UINT8 1e999", written("1e999", "UINT8"), NO_JSON),
    Rejected("UINT8 1e39", written("1e39", "UINT8"), f"{FINITE}9.9999999999999994e+38"),
    Rejected("UINT8 of 40 digits", written("9" * 40, "UINT8"), f"{FINITE}1e+40"),
    Rejected("UINT8 just above 255", written("255.00000000000003", "UINT8"), f"{FINITE}255.00000"),
]
A_CLASS = "outputs[0].parameters.classification: got "


def output(**parameters: Any) -> bytes:
    """A request that says so of its output."""
    return request(outputs=[{"name": "logits", "parameters": parameters}])


REST = [
    Rejected("a number as the id", request(id=1), "id: got 1, expected a string"),
    Rejected("false as the id", request(id=False), "id: got False, expected a string"),
    Rejected("a list as the id", request(id=["a"]), "id: got ['a'], expected a string"),
    Rejected("an object as the id", request(id={}), "id: got {}, expected a string"),
    Rejected(
        "parameters a list", request(parameters=[1]), "parameters: got [1], expected an object"
    ),
    Rejected(
        "parameters a string", request(parameters="a"), "parameters: got a, expected an object"
    ),
    Rejected("a list as a parameter", request(parameters={"a": [1]}), "parameters.a: got [1]"),
    Rejected("an object as a parameter", request(parameters={"a": {}}), "parameters.a: got {}"),
    Rejected("null as a parameter", request(parameters={"a": None}), "parameters.a: got nothing"),
    Rejected(
        "a parameter 900 deep", request(parameters={"a": nested(900)}), "parameters.a: got [[[[[["
    ),
    Rejected(
        "binary_data_output 1",
        request(parameters={"binary_data_output": 1}),
        "parameters.binary_data_output: got 1, expected true or false",
    ),
    Rejected(
        "binary_data_output in a string",
        request(parameters={"binary_data_output": "true"}),
        "parameters.binary_data_output: got true, expected true or false",
    ),
    Rejected("outputs an object", request(outputs={}), "outputs: got {}, expected a list of one"),
    Rejected("outputs a string", request(outputs="logits"), "outputs: got logits, expected a list"),
    Rejected("null as the output", request(outputs=[None]), "outputs[0]: got nothing, expected an"),
    Rejected(
        "a name as the output", request(outputs=["logits"]), "outputs[0]: got logits, expected"
    ),
    Rejected("an output without name", request(outputs=[{}]), "outputs[0].name: got nothing"),
    Rejected(
        "another output", request(outputs=[{"name": "y"}]), "outputs[0].name: got y, expected"
    ),
    Rejected(
        "an output twice", request(outputs=[{"name": "logits"}] * 2), "outputs: got 2 tensors"
    ),
    Rejected(
        "output parameters a list",
        request(outputs=[{"name": "logits", "parameters": []}]),
        "outputs[0].parameters: got [], expected an object",
    ),
    Rejected(
        "shared memory for the answer", output(shared_memory_region="a"), "expected an answer"
    ),
    Rejected("binary_data 0", output(binary_data=0), "outputs[0].parameters.binary_data: got 0"),
    Rejected("-1 classes", output(classification=-1), f"{A_CLASS}-1, expected how many classes"),
    Rejected("1.5 classes", output(classification=1.5), f"{A_CLASS}1.5, expected how many classes"),
    Rejected("classes in a string", output(classification="3"), f"{A_CLASS}3, expected how many"),
    Rejected("true classes", output(classification=True), f"{A_CLASS}True, expected how many"),
    Rejected("null classes", output(classification=None), f"{A_CLASS}nothing, expected how many"),
    Rejected("classes in a list", output(classification=[3]), f"{A_CLASS}[3], expected how many"),
]
SIZE = "inputs[0].parameters.binary_data_size: got "
LENGTH = "Inference-Header-Content-Length: got "
BODY = "the body: got "
BINARY = [
    raw(3136, FLOATS[:-1], "a byte less", f"{BODY}3135 bytes of tensor, expected 3136"),
    raw(3136, FLOATS + b"\0", "a byte more", f"{BODY}3137 bytes of tensor, expected 3136"),
    raw(3136, b"", "no bytes", f"{BODY}0 bytes of tensor, expected 3136"),
    raw(3136, FLOATS * 2, "an image more", f"{BODY}6272 bytes of tensor, expected 3136"),
    raw(3135, FLOATS, "size a byte less", f"{SIZE}3135, expected 3136 for FP32 [1, 784]"),
    raw(3137, FLOATS, "size a byte more", f"{SIZE}3137, expected 3136"),
    raw(784, FLOATS, "size in numbers", f"{SIZE}784, expected 3136"),
    raw(0, FLOATS, "size 0", f"{SIZE}0, expected 3136"),
    raw(-3136, FLOATS, "negative size", f"{SIZE}-3136, expected 3136"),
    raw(2**63, FLOATS, "size 2^63", f"{SIZE}9223372036854775808, expected 3136"),
    raw(3136.0, FLOATS, "size 3136.0", f"{SIZE}3136.0, expected 3136"),
    raw("3136", FLOATS, "size in a string", f"{SIZE}3136, expected 3136"),
    raw(None, FLOATS, "size null", f"{SIZE}nothing, expected 3136"),
    raw(True, FLOATS, "size true", f"{SIZE}True, expected 3136"),
    raw([3136], FLOATS, "size in a list", f"{SIZE}[3136], expected 3136"),
    raw(3136, FLOATS, "UINT8 with FP32's size", f"{SIZE}3136, expected 784 for UINT8", "UINT8"),
    raw(784, FLOATS, "UINT8 with FP32's bytes", f"{BODY}3136 bytes of tensor", "UINT8"),
    raw(3136, FLOATS, "two images of one's size", f"{SIZE}3136, expected 6272", shape=[2, 784]),
    raw(3136, NOT_FINITE, "a NaN", f"{FINITE}nan, expected a finite FP32"),
    Rejected(
        "data besides the size",
        request(tensor(parameters={"binary_data_size": 3136})),
        "inputs[0]: got data and parameters.binary_data_size, expected one of the two",
    ),
    Rejected(
        "bytes without size",
        request() + FLOATS,
        f"{BODY}3136 bytes after the JSON, expected none",
        len(request()),
    ),
    Rejected("JSON longer than the body", request(), f"{LENGTH}10000000, expected at most", 10**7),
    Rejected("JSON of no length", request(), NO_JSON, 0),
    Rejected("JSON cut by its length", request(), NO_JSON, 100),
    Rejected("JSON a byte too long", request(tensor(data=MISSING)) + FLOATS, NO_JSON, 200),
    Rejected(
        "raw bytes and no length of the JSON",
        request(tensor(data=MISSING, parameters={"binary_data_size": 3136})) + FLOATS,
        NO_JSON,
    ),
    Rejected(
        "a size and no bytes",
        request(tensor(data=MISSING, parameters={"binary_data_size": 3136})),
        f"{BODY}0 bytes of tensor, expected 3136",
    ),
]
REJECTED: Sequence[Rejected] = (*NO_REQUEST, *INPUTS, *SHAPES, *NUMBERS, *SPELLED, *REST, *BINARY)


@dataclass(frozen=True)
class Accepted:
    """A valid body that looks odd.

    Attributes:
        what: description.
        images: the model's input.
        json_length: of the JSON before raw tensors; None: all is JSON.
    """

    what: str
    body: bytes
    images: Float32
    json_length: int | None = None


FLOAT = np.array([IMAGE], np.float32)
GRAYS = np.array([GRAY], np.float32) / np.float32(255)
NONE = np.empty((0, PIXELS), np.float32)


def behind(body: bytes, content: bytes, what: str, images: Float32) -> Accepted:
    """A request with a raw tensor."""
    return Accepted(what, body + content, images, len(body))


def spelled(number: str, value: float) -> Accepted:
    """A request whose pixel 5 is written so."""
    images = np.zeros((1, PIXELS), np.float32)
    images[0, 5] = value
    return Accepted(number, written(number), images)


def spelled_pixel(number: str, value: int) -> Accepted:
    """A request whose pixel 5 of UINT8 is written so."""
    images = np.zeros((1, PIXELS), np.float32)
    images[0, 5] = np.float32(value) / np.float32(255)
    return Accepted(f"UINT8 {number}", written(number, "UINT8"), images)


FP32_RAW = tensor(data=MISSING, parameters={"binary_data_size": 3136})
ACCEPTED: Sequence[Accepted] = (
    Accepted("a plain request", request(), FLOAT),
    Accepted(
        "space around everything", json.dumps(json.loads(request()), indent=3).encode(), FLOAT
    ),
    Accepted("names in escapes", request().replace(b'"inputs"', rb'"\u0069nputs"'), FLOAT),
    Accepted("a byte order mark", b"\xef\xbb\xbf" + request(), FLOAT),
    Accepted("fields that nobody knows", request(tensor(scale=[[1]]), model={"a": [{}]}), FLOAT),
    Accepted("a name with a NUL", request(**{"a\0b": 1}), FLOAT),
    Accepted("a tensor's name with a NUL", request(tensor(**{"a\0b": 1})), FLOAT),
    Accepted("an empty name", request(**{"": 1}), FLOAT),
    Accepted("fields in another order", request(dict(reversed(tensor().items()))), FLOAT),
    Accepted("no outputs", request(outputs=[]), FLOAT),
    Accepted("outputs null", request(outputs=None), FLOAT),
    Accepted("the output by name", request(outputs=[{"name": "logits"}]), FLOAT),
    Accepted("brackets in a string", request(id="[[]["), FLOAT),
    Accepted("an empty id", request(id=""), FLOAT),
    Accepted("an id of 10,000 letters", request(id="a" * 10_000), FLOAT),
    Accepted("an id in all alphabets", request(id='é 数 \U0001f600 \0 \\ "'), FLOAT),
    Accepted("an id that is null", request(id=None), FLOAT),
    Accepted("parameters", request(parameters={"a": "b", "c": 1, "d": 0.5, "e": True}), FLOAT),
    Accepted("parameters null", request(tensor(parameters=None), parameters=None), FLOAT),
    Accepted("a parameter of the tensor", request(tensor(parameters={"a": [{}]})), FLOAT),
    Accepted("an image in a list", request(tensor(data=[IMAGE])), FLOAT),
    Accepted(
        "two images in a row", request(tensor(shape=[2, 784], data=IMAGE * 2)), FLOAT.repeat(2, 0)
    ),
    Accepted("two in lists", request(tensor(shape=[2, 784], data=[IMAGE] * 2)), FLOAT.repeat(2, 0)),
    Accepted("no image", request(tensor(shape=[0, 784], data=[])), NONE),
    Accepted("no image in rows", request(bytes_tensor(shape=[0, 28, 28], data=[])), NONE),
    Accepted("pixels", request(bytes_tensor()), GRAYS),
    Accepted("pixels in a list", request(bytes_tensor(data=[GRAY])), GRAYS),
    Accepted("rows of pixels", request(bytes_tensor(shape=[1, 28, 28], data=[ROWS])), GRAYS),
    Accepted("pixels of rows", request(bytes_tensor(shape=[1, 28, 28])), GRAYS),
    Accepted(
        "two images of rows",
        request(bytes_tensor(shape=[2, 28, 28], data=[ROWS, ROWS])),
        GRAYS.repeat(2, 0),
    ),
    Accepted("a field twice: the last counts", request()[:-1] + b',"id":1,"id":"a"}', FLOAT),
    Accepted("inputs twice", b'{"inputs":[],' + request()[1:], FLOAT),
    Accepted(
        "the data twice",
        request().replace(b'"data"', b'"data":[' + b"0," * 783 + b'0],"data"'),
        FLOAT,
    ),
    Accepted("the shape twice", request().replace(b'"shape"', b'"shape":[2,784],"shape"'), FLOAT),
    spelled("0", 0.0),
    spelled("-1", -1.0),
    spelled("1E+2", 100.0),
    spelled("1e-400", 0.0),
    spelled("1.4e-45", 1e-45),
    spelled("3.4028235e38", 3.4028235e38),
    spelled("-3.4028235e38", -3.4028235e38),
    spelled("9223372036854775808", 2.0**63),
    spelled("18446744073709551615", 2.0**64),
    spelled("18446744073709551616", 2.0**64),
    spelled("1" + "0" * 30, 1e30),
    spelled("0." + "3" * 1000, 1 / 3),
    spelled("16777217", 2.0**24),
    spelled_pixel("255.0", 255),
    spelled_pixel("1e2", 100),
    spelled_pixel("-0.0", 0),
    behind(request(FP32_RAW), FLOATS, "a raw tensor", FLOAT),
    behind(b" " + request(FP32_RAW) + b"\n", FLOATS, "space around the JSON", FLOAT),
    behind(request(FP32_RAW | {"data": None}), FLOATS, "data null besides", FLOAT),
    behind(
        request(FP32_RAW | {"datatype": "UINT8", "parameters": {"binary_data_size": 784}}),
        bytes(GRAY),
        "raw pixels",
        GRAYS,
    ),
    behind(
        request(FP32_RAW | {"shape": [0, 784], "parameters": {"binary_data_size": 0}}),
        b"",
        "no raw image",
        NONE,
    ),
    behind(request(), b"", "the JSON's length and no bytes", FLOAT),
)
