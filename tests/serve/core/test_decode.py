"""Bodies of inference requests, read by either of the parsers."""

import json
import struct
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_batchnorm.serve.core import decode as with_simdjson
from mnist_batchnorm.serve.core.protocol import InferRequest, RequestError
from mnist_batchnorm.serve.core.settings import Limits
from tests.support import bodies
from tests.support.bodies import (
    ACCEPTED,
    GRAY,
    IMAGE,
    PIXELS,
    REJECTED,
    Accepted,
    Rejected,
    request,
    tensor,
)
from tests.support.parsers import PARSERS

LIMITS = Limits()


parsers = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)


def test_the_parsers_are_two() -> None:
    assert [bool(parser.simdjson) for parser in PARSERS.values()] == [True, False]


@pytest.mark.parametrize("case", REJECTED, ids=lambda case: case.what)
def test_an_invalid_body_is_rejected_by_either_parser(case: Rejected) -> None:
    for parser in PARSERS.values():
        with pytest.raises(RequestError) as rejection:
            parser.decode(case.body, case.json_length, LIMITS)
        message = str(rejection.value)
        assert case.says in message
        assert rejection.value.status == case.status
        assert len(message) < 300
        assert "\n" not in message


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.what)
def test_an_odd_body_is_decoded_by_either_parser(case: Accepted) -> None:
    for parser in PARSERS.values():
        images = parser.decode(case.body, case.json_length, LIMITS).images
        assert images.dtype == np.float32
        assert images.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(images, case.images)


@parsers
def test_everything_besides_the_tensor_is_read(parser: ModuleType) -> None:
    own = {"binary_data": False, "classification": 3}
    parameters = {"a": "b", "c": 2**63, "d": 0.1, "e": False}
    read: InferRequest = parser.decode(
        request(
            id="42",
            parameters=parameters | {"binary_data_output": True},
            outputs=[{"name": "logits", "parameters": own}],
        ),
        None,
        LIMITS,
    )
    assert (read.id, read.parameters, read.binary, read.classes) == ("42", parameters, False, 3)


@parsers
def test_the_last_of_a_name_counts_everywhere(parser: ModuleType) -> None:
    body = request()[:-1] + b',"id":"a","id":"b","parameters":{"c":1,"c":2}}'
    read: InferRequest = parser.decode(body, None, LIMITS)
    assert (read.id, read.parameters) == ("b", {"c": 2})


@parsers
def test_more_classes_than_there_are_is_all(parser: ModuleType) -> None:
    body = request(outputs=[{"name": "logits", "parameters": {"classification": 10**9}}])
    assert parser.decode(body, None, LIMITS).classes == 10


@parsers
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_numbers_pass_only_where_they_may(parser: ModuleType, value: float) -> None:
    numbers = np.array(bodies.at(5, value), "<f4")
    head = request(tensor(data=bodies.MISSING, parameters={"binary_data_size": 4 * PIXELS}))
    body = head + numbers.tobytes()
    read = parser.decode(body, len(head), Limits(nonfinite=True))
    np.testing.assert_array_equal(read.images, [numbers])
    with pytest.raises(RequestError, match=f"image 0, pixel 5: got {value}"):
        parser.decode(body, len(head), LIMITS)


@parsers
def test_large_numbers_whose_squares_overflow_are_finite(parser: ModuleType) -> None:
    read = parser.decode(request(tensor(data=[3e38] * PIXELS)), None, LIMITS)
    np.testing.assert_array_equal(read.images, np.full((1, PIXELS), 3e38, np.float32))


@parsers
def test_as_many_rows_as_are_allowed(parser: ModuleType) -> None:
    body = request(bodies.bytes_tensor(shape=[3, PIXELS], data=GRAY * 3))
    assert len(parser.decode(body, None, Limits(rows=3)).images) == 3
    with pytest.raises(RequestError, match="got 3 images, expected at most 2"):
        parser.decode(body, None, Limits(rows=2))


@pytest.mark.parametrize("depth", [1020, 1021, 1022, 1023, 1024, 1025])
def test_both_parsers_stop_at_the_same_depth(depth: int) -> None:
    body = request()[:-1] + b',"x":' + b"[" * depth + b"]" * depth + b"}"
    assert outcome(with_simdjson, body) == outcome(PARSERS["orjson"], body)


def test_a_list_longer_than_simdjson_can_count_is_read_by_the_other() -> None:
    """pysimdjson would write beyond the list that it makes."""
    many = 0xFFFFFF + 10
    body = request(tensor(data="HERE")).replace(b'"HERE"', b"[%b0]" % (b"0," * (many - 1)))
    with pytest.raises(RequestError, match=rf"got a list of {many}, expected one of 784"):
        with_simdjson.decode(body, None, LIMITS)


# --- requests that differ in their numbers only ---------------------------------------------------


def test_what_is_around_the_numbers_is_read_once() -> None:
    def asked(image: list[float]) -> InferRequest:
        outputs = [{"name": "logits", "parameters": {"classification": 2, "binary_data": True}}]
        body = request(tensor(data=image), outputs=outputs)
        return with_simdjson.decode(body, None, LIMITS)

    first = asked(IMAGE)
    with mock.patch.object(with_simdjson, "_decode_json", side_effect=AssertionError):
        second = asked(IMAGE[::-1])
        np.testing.assert_array_equal(second.images, first.images[:, ::-1])
        assert (second.binary, second.classes) == (first.binary, first.classes) == (True, 2)


def test_pixels_are_scaled_whether_or_not_it_is_known_that_they_are() -> None:
    for image in (GRAY, GRAY[::-1]):
        same(request(bodies.bytes_tensor(data=image)))


def test_a_limit_on_rows_holds_for_what_another_had_let_pass() -> None:
    body = request(tensor(shape=[2, PIXELS], data=IMAGE * 2))
    assert len(with_simdjson.decode(body, None, LIMITS).images) == 2
    with pytest.raises(RequestError, match="got 2 images, expected at most 1"):
        with_simdjson.decode(body, None, Limits(rows=1))


@pytest.mark.parametrize(
    "around",
    [
        b'{"data":[LIST],"inputs":[%b]}',
        b'{"inputs":[%b],"data":[LIST]}',
        b'{"parameters":{"data":[LIST]},"inputs":[%b]}',
        b'{"outputs":[{"name":"logits","data":[LIST]}],"inputs":[%b]}',
        b'{"inputs":[%b],"inputs":[{"data":[LIST]}]}',
        b'{"id":"\\"data\\":[LIST]","inputs":[%b]}',
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [b'"data":[LIST],', b'"parameters":{"data":[LIST]},', b""])
def test_other_lists_are_not_taken_for_the_images(around: bytes, own: bytes) -> None:
    one = json.dumps(tensor()).encode()
    body = around % one.replace(b"{", b"{" + own, 1)
    many = b",".join([b"0"] * PIXELS)
    for content in (many, many, b"1" + many[1:], b"2", b'{"a":2', b"[3", b"", b"true"):
        same(body.replace(b"LIST", content))


# --- anything -----------------------------------------------------------------------------------


def outcome(parser: ModuleType, body: bytes, json_length: int | None = None) -> object:
    """What a parser makes of a body: all that it reads, or where it sees a mistake."""
    try:
        read: InferRequest = parser.decode(body, json_length, LIMITS)
    except RequestError as error:
        return refusal(error)
    images = read.images
    assert images.dtype == np.float32
    assert images.shape[1:] == (PIXELS,)
    assert np.isfinite(images).all()
    rest = read.id, read.parameters, read.binary, read.classes
    # -0 as an integer has its sign for orjson only; the network gives the same for both
    return rest, (images + np.float32(0)).tobytes()


def refusal(error: RequestError) -> object:
    """What is the same of an error, whichever parser read the body."""
    assert 400 <= error.status < 500
    str(error).encode()  # what stands in it can be sent
    return error.status, error.reason, "" if error.reason == "json" else str(error)


def same(body: bytes, json_length: int | None = None) -> None:
    expected = outcome(PARSERS["orjson"], body, json_length)
    assert outcome(with_simdjson, body, json_length) == expected
    assert outcome(with_simdjson, body, json_length) == expected  # it remembers what it has read


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
SMALL = tensor(shape=[0, PIXELS], data=[])
FIELDS = ("inputs", "outputs", "id", "parameters", "name", "datatype", "shape", "data")


@given(anything)
def test_any_json_is_read_alike_or_refused_alike(content: object) -> None:
    same(json.dumps(content).encode())


@given(st.binary(max_size=60), st.none() | st.integers(0, 70))
def test_any_bytes_are_refused_alike(body: bytes, json_length: int | None) -> None:
    same(body, json_length)


@given(
    st.dictionaries(st.sampled_from(FIELDS), anything),
    st.dictionaries(st.sampled_from(FIELDS), anything),
)
def test_any_field_may_hold_anything(fields: dict[str, object], own: dict[str, object]) -> None:
    same(json.dumps({"inputs": [SMALL | own]} | fields).encode())


@given(
    st.integers(0, len(request()) - 1),
    st.sampled_from(
        [
            b"",
            b"[",
            b"]",
            b"{",
            b"}",
            b'"',
            b",",
            b":",
            b"0",
            b"-",
            b"e",
            b".",
            b"\0",
            b"\xff",
            b"1]",
        ]
    )
    | st.binary(max_size=3),
    st.integers(0, 3),
)
def test_a_request_in_which_something_is_changed(place: int, by: bytes, over: int) -> None:
    for fields in ({}, {"id": "1"}):  # of which it remembers the first
        body = request(**fields, outputs=[{"name": "logits"}])
        with_simdjson.decode(body, None, LIMITS)
        same(body[:place] + by + body[place + over :])


@given(st.lists(st.integers(-1, 3) | st.none() | st.just(10**20), max_size=5), anything)
def test_any_shape_and_any_size(shape: list[int | None], size: object) -> None:
    head = request(tensor(shape=shape, data=bodies.MISSING, parameters={"binary_data_size": size}))
    same(head + bytes(3136), len(head))


@given(st.integers(0, 2**32 - 1))
def test_json_brings_every_float32_as_it_is(seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, PIXELS, np.uint32)
    exact = bits.view(np.float32)
    exact[~np.isfinite(exact)] = 0
    shortest = ",".join(str(number) for number in exact)
    for text in (json.dumps(exact.tolist()), f"[{shortest}]"):
        body = request(tensor(data="HERE")).replace(b'"HERE"', text.encode())
        for parser in PARSERS.values():
            images = parser.decode(body, None, LIMITS).images
            np.testing.assert_array_equal(images, [exact])


def test_raw_numbers_are_little_endian() -> None:
    head = request(tensor(data=bodies.MISSING, parameters={"binary_data_size": 4 * PIXELS}))
    raw = struct.pack(f"<{PIXELS}f", *IMAGE)
    images = with_simdjson.decode(head + raw, len(head), LIMITS).images
    assert images[0, 1] == np.float32(0.001)
