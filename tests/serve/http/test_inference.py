"""Inference over HTTP: requests of every form and damaged ones, bit for bit."""

import http.client
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import serving
from tests.support.request_forms import (
    Form,
    body_of,
    check,
    expected_of,
    forms,
    images_of,
    seeds,
    split_answer,
)
from tests.support.serving import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("inference") / "project"
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
    content, _ = split_answer(body, json_length)
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
