"""Protobuf messages as requests and answers, without a server."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import Float32, RequestError
from mnist_batchnorm.serve.core.settings import Limits
from mnist_batchnorm.serve.grpc.protobuf import decode_request, encode_response, parse
from tests.support.grpc_calls import MAX_ROWS, MODEL, message, packed
from tests.support.request_forms import session

LIMITS = Limits(MAX_ROWS)
SERVED = Model(MODEL, "1", "0" * 64, None, None, lambda images: images)


@st.composite
def valid(draw: st.DrawFn) -> tuple[dict[str, Any], Float32]:
    """The fields of a request, and the images in it."""
    rows = draw(st.integers(0, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 784), np.uint8)
    datatype = draw(st.sampled_from(["FP32", "UINT8"]))
    shape = draw(st.sampled_from([[rows, 784]] + [[rows, 28, 28]] * (datatype == "UINT8")))
    images = network_input(pixels) * np.float32(draw(st.floats(-2, 2, width=32)))
    values = images if datatype == "FP32" else pixels
    given: dict[str, Any] = {"name": "image", "datatype": datatype, "shape": shape}
    request: dict[str, Any] = {"model_name": MODEL, "inputs": [given]}
    if draw(st.booleans()):
        request["raw_input_contents"] = [values.tobytes()]
    else:
        field = {"FP32": "fp32_contents", "UINT8": "uint_contents"}[datatype]
        given["contents"] = {field: values.reshape(-1).tolist()}
    request |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "id": st.text(st.characters(codec="utf-8"), max_size=20),
                "outputs": st.just([{"name": "logits"}]),
                "parameters": st.dictionaries(
                    st.text(st.characters(codec="utf-8"), max_size=5),
                    st.one_of(
                        st.builds(lambda x: {"bool_param": x}, st.booleans()),
                        st.builds(lambda x: {"int64_param": x}, st.integers(-(2**63), 2**63 - 1)),
                        st.builds(lambda x: {"double_param": x}, st.floats(allow_nan=False)),
                    ),
                    max_size=3,
                ),
            },
        )
    )
    return request, images if datatype == "FP32" else network_input(pixels)


@given(valid())
def test_every_valid_form_is_answered(case: tuple[dict[str, Any], Float32]) -> None:
    fields, images = case
    request = service_pb2.ModelInferRequest(**fields)

    decoded = decode_request(request, LIMITS)
    answer = encode_response(decoded, session().run(decoded.images), SERVED)

    (output,) = answer.outputs
    assert (output.name, output.datatype, [*output.shape]) == ("logits", "FP32", [len(images), 10])
    assert (answer.model_name, answer.model_version) == (MODEL, "1")
    assert (answer.id, answer.parameters) == (request.id, request.parameters)
    if request.raw_input_contents:
        logits = answer.raw_output_contents[0]
        assert not output.contents.fp32_contents
    else:
        logits = np.array(output.contents.fp32_contents, np.float32).tobytes()
        assert not answer.raw_output_contents
    assert logits == session().run(images).tobytes()


def image(**changed: Any) -> dict[str, Any]:
    """A request whose tensor is different."""
    return message(inputs=[{"name": "image", "datatype": "FP32", "shape": [1, 784], **changed}])


def typed(field: str, values: list[Any], **changed: Any) -> dict[str, Any]:
    """A request whose tensor is numbers."""
    return {**image(contents={field: values}, **changed), "raw_input_contents": []}


HALF = np.full((1, 784), 0.5, np.float32)
NAN = HALF.copy()
NAN[0, 7] = np.nan
REGION = {"shared_memory_region": {"string_param": "a"}}
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no input": (message(inputs=[]), 400, "inputs: got 0 tensors"),
    "two inputs": (
        message(inputs=image()["inputs"] * 2),
        400,
        "inputs: got 2 tensors, expected one tensor, 'image'",
    ),
    "other name": (image(name="x"), 400, "inputs[0].name: got x, expected 'image'"),
    "no name": (image(name=""), 400, "inputs[0].name: got nothing"),
    "no datatype": (image(datatype=""), 400, "inputs[0].datatype: got nothing"),
    "other datatype": (
        image(datatype="FP64"),
        400,
        "inputs[0].datatype: got FP64, expected FP32 or UINT8",
    ),
    "no shape": (image(shape=[]), 400, "inputs[0].shape: got []"),
    "one axis": (image(shape=[784]), 400, "inputs[0].shape: got [784]"),
    "other shape": (
        image(shape=[1, 28, 28]),
        400,
        "inputs[0].shape: got [1, 28, 28], expected [n, 784] of FP32",
    ),
    "negative": (image(shape=[-1, 784]), 400, "inputs[0].shape: got [-1, 784]"),
    "too many rows": (
        image(shape=[MAX_ROWS + 1, 784]),
        413,
        f"inputs[0].shape: got {MAX_ROWS + 1} images, expected at most {MAX_ROWS}",
    ),
    "huge shape": (image(shape=[2**62, 784]), 413, "inputs[0].shape"),
    "no data": (
        message(raw_input_contents=[]),
        400,
        "inputs[0].contents.fp32_contents: got 0 numbers, expected 784 for FP32 [1, 784]",
    ),
    "short raw": (
        message(raw_input_contents=[bytes(3132)]),
        400,
        "raw_input_contents[0], bytes: got 3132, expected 3136 for FP32 [1, 784]",
    ),
    "long raw": (
        message(raw_input_contents=[bytes(3140)]),
        400,
        "raw_input_contents[0], bytes: got 3140",
    ),
    "odd raw": (
        message(raw_input_contents=[bytes(3135)]),
        400,
        "raw_input_contents[0], bytes: got 3135",
    ),
    "two raw": (
        message(raw_input_contents=[bytes(3136)] * 2),
        400,
        "raw_input_contents: got 2 tensors, expected one, for one input",
    ),
    "raw and typed": (
        image(contents={"fp32_contents": [0.0] * 784}),
        400,
        "inputs[0]: got contents.fp32_contents and raw_input_contents, expected one of the two",
    ),
    "few numbers": (
        typed("fp32_contents", [0.0] * 783),
        400,
        "inputs[0].contents.fp32_contents: got 783 numbers, expected 784",
    ),
    "doubles": (
        typed("fp64_contents", [0.0] * 784),
        400,
        "inputs[0].contents: got fp64_contents, expected fp32_contents for FP32",
    ),
    "floats for pixels": (
        typed("fp32_contents", [0.0] * 784, datatype="UINT8"),
        400,
        "inputs[0].contents: got fp32_contents, expected uint_contents for UINT8",
    ),
    "no pixel": (
        typed("uint_contents", [0] * 783 + [256], datatype="UINT8"),
        400,
        "inputs[0].contents.uint_contents, image 0, pixel 783: got 256",
    ),
    "raw NaN": (
        message(raw_input_contents=[NAN.tobytes()]),
        400,
        "raw_input_contents[0], image 0, pixel 7: got nan, expected a finite FP32",
    ),
    "typed infinity": (
        typed("fp32_contents", [0.0] * 783 + [float("inf")]),
        400,
        "inputs[0].contents.fp32_contents, image 0, pixel 783: got inf",
    ),
    "shared input": (image(parameters=REGION), 400, "inputs[0].parameters"),
    "shared output": (
        message(outputs=[{"name": "logits", "parameters": REGION}]),
        400,
        "outputs[0].parameters: got shared_memory_region",
    ),
    "other output": (
        message(outputs=[{"name": "x"}]),
        400,
        "outputs[0].name: got x, expected 'logits'",
    ),
    "output twice": (
        message(outputs=[{"name": "logits"}] * 2),
        400,
        "outputs: got 2 tensors",
    ),
    "no classes": (
        message(
            outputs=[{"name": "logits", "parameters": {"classification": {"int64_param": -1}}}]
        ),
        400,
        "outputs[0].parameters.classification: got -1",
    ),
    "classes in words": (
        message(
            outputs=[{"name": "logits", "parameters": {"classification": {"string_param": "3"}}}]
        ),
        400,
        "outputs[0].parameters.classification: got 3",
    ),
    "classes of nothing": (
        message(outputs=[{"name": "logits", "parameters": {"classification": {}}}]),
        400,
        "outputs[0].parameters.classification: got nothing",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_request_is_rejected_by_its_field(kind: str) -> None:
    fields, status, why = BAD[kind]
    request = service_pb2.ModelInferRequest(**fields)

    with pytest.raises(RequestError) as rejection:
        decode_request(request, LIMITS)

    assert rejection.value.status == status
    assert why in str(rejection.value)


@pytest.mark.parametrize(
    "content", [b"\xff", b"\x0a\xff", packed()[:-1], b"\x0a\x02\xff\xfe", b'{"inputs": []}']
)
def test_bytes_that_are_not_a_message_are_rejected(content: bytes) -> None:
    with pytest.raises(RequestError) as rejection:
        parse(service_pb2.ModelInferRequest, content)

    assert str(rejection.value) == (
        f"the message: got {len(content)} other bytes, expected a whole ModelInferRequest"
    )
