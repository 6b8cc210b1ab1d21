"""All forms of an inference request, and the check of its answer against ONNX Runtime."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.protocol import Float32
from tests.support.serving import network

seeds = st.integers(0, 2**32 - 1)


@cache
def session() -> runtime.Session:
    return runtime.load(network().graph(folded=False))


def bits(array: np.ndarray) -> bytes:
    """The bytes of a float32 array: distinguishes -0 from 0."""
    assert array.dtype == np.float32
    return array.tobytes()


def split_answer(body: bytes, json_length: int | None) -> tuple[dict[str, Any], bytes]:
    """The JSON of an answer and the raw tensor after it."""
    return json.loads(body[:json_length]), b"" if json_length is None else body[json_length:]


@dataclass(frozen=True)
class Form:
    """A form of request.

    Attributes:
        layout: of the input: ``flat`` or ``rows`` of JSON, or ``raw``.
        square: whether UINT8 has shape ``[n, 28, 28]``.
        output: ``json``, ``raw`` or ``raw by default``.
        classes: number of largest logits; 0: all.
    """

    datatype: str
    layout: str
    square: bool
    output: str
    classes: int


forms = st.builds(
    Form,
    st.sampled_from(["FP32", "UINT8"]),
    st.sampled_from(["flat", "rows", "raw"]),
    st.booleans(),
    st.sampled_from(["json", "raw", "raw by default"]),
    st.sampled_from([0, 0, 1, 3, 10]),
)


def images_of(seed: int, rows: int, form: Form) -> np.ndarray:
    """Random images: pixels, or float32 of all sizes that the network takes without overflow."""
    random = np.random.default_rng(seed)
    if form.datatype == "UINT8":
        return random.integers(0, 256, (rows, 28, 28) if form.square else (rows, 784), np.uint8)
    exponents = random.integers(-40, 10, (rows, 784)).astype(np.float64)
    return (random.uniform(-1, 1, (rows, 784)) * 10**exponents).astype(np.float32)


def body_of(images: np.ndarray, form: Form) -> tuple[bytes, int | None]:
    """A request, and the length of its JSON where raw bytes follow."""
    tensor: dict[str, Any] = {"name": "image", "datatype": form.datatype}
    tensor["shape"] = list(images.shape)
    content: dict[str, Any] = {"inputs": [tensor]}
    if form.layout == "raw":
        tensor["parameters"] = {"binary_data_size": images.nbytes}
    else:
        tensor["data"] = (images.ravel() if form.layout == "flat" else images).tolist()
    own: dict[str, Any] = {"classification": form.classes} if form.classes else {}
    if form.output == "raw by default":
        content["parameters"] = {"binary_data_output": True}
    else:
        own["binary_data"] = form.output == "raw"
    if own:
        content["outputs"] = [{"name": "logits", "parameters": own}]
    head = json.dumps(content).encode()
    return (head + images.tobytes(), len(head)) if form.layout == "raw" else (head, None)


def expected_of(images: np.ndarray) -> Float32:
    """What ONNX Runtime gives."""
    if images.dtype == np.uint8:
        images = network_input(images)
    logits: Float32 = session().run(images)
    return logits


def check(body: bytes, json_length: int | None, form: Form, logits: Float32) -> None:
    """Fail unless an answer holds these logits, bit for bit."""
    content, raw = split_answer(body, json_length)
    (output,) = content["outputs"]
    assert (json_length is None) == (form.output == "json")
    if not form.classes:
        assert (output["datatype"], output["shape"]) == ("FP32", [len(logits), 10])
        given = np.array(output["data"], np.float32) if json_length is None else raw
        assert (given if isinstance(given, bytes) else bits(given)) == bits(logits)
        return
    assert (output["datatype"], output["shape"]) == ("BYTES", [len(logits), form.classes])
    texts = output["data"] if json_length is None else list(unpack(raw))
    values, classes = (
        np.array([text.split(":")[part] for text in texts]).reshape(len(logits), form.classes)
        for part in (0, 1)
    )
    order = np.argsort(-logits, axis=1, kind="stable")[:, : form.classes]
    np.testing.assert_array_equal(classes.astype(int), order)
    assert bits(values.astype(np.float32)) == bits(np.take_along_axis(logits, order, 1))


def unpack(raw: bytes) -> Iterator[str]:
    """The elements of a raw BYTES tensor."""
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        yield raw[4:end].decode()
        raw = raw[end:]
