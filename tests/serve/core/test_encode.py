"""Answers, and whole requests of every form against ONNX Runtime itself, bit for bit."""

import http.client
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.encode import classified, encode, pack
from mnist_batchnorm.serve.core.protocol import Float32, InferRequest
from mnist_batchnorm.serve.core.settings import Limits
from tests.serve.core.test_decode import PARSERS
from tests.support import serving
from tests.support.serving import NETWORK, Server

SESSION = runtime.load(NETWORK.graph(folded=False))
NO_IMAGE = np.empty((0, 784), np.float32)
seeds = st.integers(0, 2**32 - 1)


def bits(array: np.ndarray) -> bytes:
    """An array as it lies in memory: equal means the same bit for bit, -0 and 0 told apart."""
    assert array.dtype == np.float32
    return array.tobytes()


def raw_of(body: bytes, json_length: int | None) -> tuple[dict[str, Any], bytes]:
    """The JSON of an answer and what follows."""
    return json.loads(body[:json_length]), b"" if json_length is None else body[json_length:]


@given(seeds, st.integers(0, 5))
def test_json_holds_every_float32_as_it_is(seed: int, rows: int) -> None:
    logits = np.random.default_rng(seed).integers(0, 2**32, (rows, 10), np.uint32).view(np.float32)
    logits[~np.isfinite(logits)] = -0.0
    body, json_length = encode(InferRequest(NO_IMAGE), logits, "m", "1")
    assert json_length is None
    (output,) = json.loads(body)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [rows, 10])
    assert bits(np.array(output["data"], np.float32)) == bits(logits.ravel())


def test_json_has_no_word_for_what_is_not_finite() -> None:
    """Only a server that was told to passes such numbers; raw tensors hold them as they are."""
    logits = np.array([[np.nan, np.inf, -np.inf, *range(7)]], np.float32)
    body, _ = encode(InferRequest(NO_IMAGE), logits, "m", "1")
    assert json.loads(body)["outputs"][0]["data"][:4] == [None, None, None, 0.0]
    body, json_length = encode(InferRequest(NO_IMAGE, binary=True), logits, "m", "1")
    _, raw = raw_of(body, json_length)
    assert raw == bits(logits)


def test_a_raw_tensor_stands_behind_the_json() -> None:
    logits = np.arange(20, dtype=np.float32).reshape(2, 10)
    request = InferRequest(NO_IMAGE, id="7", parameters={"a": 1}, binary=True)
    content, raw = raw_of(*encode(request, logits, "m", "v"))
    assert content == {
        "model_name": "m",
        "model_version": "v",
        "id": "7",
        "parameters": {"a": 1},
        "outputs": [
            {
                "name": "logits",
                "datatype": "FP32",
                "shape": [2, 10],
                "parameters": {"binary_data_size": 80},
            }
        ],
    }
    assert raw == struct.pack("<20f", *range(20))


def test_what_was_not_asked_is_not_answered() -> None:
    body, _ = encode(InferRequest(NO_IMAGE), np.zeros((1, 10), np.float32), "m", "1")
    assert list(json.loads(body)) == ["model_name", "model_version", "outputs"]
    body, _ = encode(InferRequest(NO_IMAGE, id=""), np.zeros((1, 10), np.float32), "m", "1")
    assert json.loads(body)["id"] == ""


def test_of_equal_logits_the_lower_class_is_first() -> None:
    logits = np.array(
        [[0, 2, 2, -1, 2, 0, 0, 0, 0, 0], [-0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1]], np.float32
    )
    texts = ["2.0:1", "2.0:2", "2.0:4", "1.0:9", "-0.0:0", "0.0:1"]
    assert list(classified(logits, 3)) == texts


def test_a_class_has_its_logit_as_the_list_of_logits_has_it() -> None:
    logits = np.array([[8.271688, 0.1, -3.7832954, 1e-10, 1 / 3, 0, 0, 0, 0, 0]], np.float32)
    listed, _ = encode(InferRequest(NO_IMAGE), logits, "m", "1")
    ranked, _ = encode(InferRequest(NO_IMAGE, classes=3), logits, "m", "1")
    assert b"8.271688,0.1," in listed
    assert b'"8.271688:0","0.33333334:4","0.1:1"' in ranked


def test_a_raw_text_stands_behind_its_length() -> None:
    assert pack(["a", "", "ü"]) == b"\1\0\0\0a\0\0\0\0\2\0\0\0\xc3\xbc"


# --- whole requests -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A way to ask the same.

    Attributes:
        datatype: FP32 or UINT8.
        layout: of the input: ``flat``, ``rows`` or ``images`` of JSON, or ``raw``.
        square: whether UINT8 has shape ``[n, 28, 28]``.
        output: ``json``, ``raw`` or ``raw by default``.
        classes: the so many largest, or all logits.
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
    logits: Float32 = SESSION.run(images)
    return logits


def check(body: bytes, json_length: int | None, form: Form, logits: Float32) -> None:
    """Fail unless an answer holds these logits, bit for bit."""
    content, raw = raw_of(body, json_length)
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


@given(seeds, st.integers(0, 4), forms, st.sampled_from(sorted(PARSERS)))
def test_every_form_gives_onnx_runtimes_logits(
    seed: int, rows: int, form: Form, parser: str
) -> None:
    images = images_of(seed, rows, form)
    request = PARSERS[parser].decode(*body_of(images, form), Limits())
    body, json_length = encode(request, SESSION.run(request.images), "m", "1")
    check(body, json_length, form, expected_of(images))


# --- over the wire ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("encode") / "project"
    serving.lay(folder)
    with serving.running(folder=folder) as server:
        yield server


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    yield connection
    connection.close()


def ask(
    connection: http.client.HTTPConnection, body: bytes, json_length: int | None
) -> tuple[int, bytes, int | None]:
    """Return status, body and the length of the JSON in it."""
    name = "Inference-Header-Content-Length"
    headers = {} if json_length is None else {name: str(json_length)}
    connection.request("POST", "/v2/models/mnist-bn/infer", body, headers)
    answer = connection.getresponse()
    content, length = answer.read(), answer.headers[name]
    kind = "application/json" if length is None else "application/octet-stream"
    assert answer.headers["Content-Type"] == kind
    return answer.status, content, None if length is None else int(length)


def check_over_the_wire(
    connection: http.client.HTTPConnection, images: np.ndarray, form: Form
) -> None:
    status, body, json_length = ask(connection, *body_of(images, form))
    assert status == 200
    check(body, json_length, form, expected_of(images))


@settings(max_examples=40)
@given(seed=seeds, rows=st.integers(0, 4), form=forms)
def test_every_form_gives_onnx_runtimes_logits_over_the_wire(
    connection: http.client.HTTPConnection, seed: int, rows: int, form: Form
) -> None:
    check_over_the_wire(connection, images_of(seed, rows, form), form)


@pytest.mark.slow
@settings(max_examples=1000)
@given(seed=seeds, rows=st.integers(0, 40), form=forms)
def test_thousands_of_requests_give_onnx_runtimes_logits(
    connection: http.client.HTTPConnection, seed: int, rows: int, form: Form
) -> None:
    check_over_the_wire(connection, images_of(seed, rows, form), form)


def mutated(seed: int, form: Form) -> tuple[bytes, int | None]:
    """A valid request of which a few places are changed."""
    random = np.random.default_rng(seed)
    body, json_length = body_of(images_of(seed, 1, form), form)
    content = bytearray(body)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(0, min(len(content), random.choice([60, 200, 10_000]))))
        over = int(random.integers(0, 3))
        content[place : place + over] = random.bytes(int(random.integers(0, 3)))
    if json_length is not None and random.random() < 0.5:
        json_length += int(random.integers(-3, 4))
    return bytes(content), json_length


@settings(max_examples=60)
@given(seed=seeds, form=forms)
def test_a_damaged_request_is_answered_or_refused(
    connection: http.client.HTTPConnection, seed: int, form: Form
) -> None:
    status, body, json_length = ask(connection, *mutated(seed, form))
    assert status in (200, 400, 413)
    content, _ = raw_of(body, json_length)
    assert list(content) == ["error"] if status != 200 else "outputs" in content


@pytest.mark.slow
@settings(max_examples=2000)
@given(seed=seeds, form=forms)
def test_thousands_of_damaged_requests_are_answered_or_refused(
    server: Server, connection: http.client.HTTPConnection, seed: int, form: Form
) -> None:
    status, _, _ = ask(connection, *mutated(seed, form))
    assert status in (200, 400, 413)
    assert server.process.poll() is None
