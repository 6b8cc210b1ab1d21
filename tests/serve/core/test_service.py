"""The inference service without a transport: token, queue, trace, failures, log."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mnist_batchnorm.parity.runtime import RuntimeFailedError
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import Float32, InferRequest, RequestError
from mnist_batchnorm.serve.core.service import Headers, InferenceService
from mnist_batchnorm.serve.core.settings import Limits, Settings

TOKEN = "0123456789abcdef"
PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
Log = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def log(capsysbinary: pytest.CaptureFixture[bytes]) -> Log:
    return lambda: [json.loads(line) for line in capsysbinary.readouterr().err.splitlines()]


def make_service(**settings: Any) -> InferenceService:
    metrics = Metrics()
    return InferenceService(Catalog([], metrics), Settings(**settings), metrics)


def infer(service: InferenceService, run: Callable[[Float32], Float32], headers: Headers) -> str:
    model = Model("m", "1", "0" * 64, None, None, run)

    def decode(rows: int, limits: Limits) -> InferRequest:
        return InferRequest(np.zeros((rows, 784), np.float32))

    def encode(request: InferRequest, logits: Float32, model: Model) -> str:
        return f"{len(request.images)} images, {len(logits)} logits of {model.name}"

    meters = service.metrics.meters("m", "1")
    return service.infer((model, meters), headers, 0.0, decode, (3,), encode, call="c")


def test_a_request_is_decoded_run_encoded_and_recorded(log: Log) -> None:
    service = make_service(access_log=True)
    headers = {b"x-request-id": b"mine"}
    assert infer(service, lambda images: images[:, :10], headers) == "3 images, 3 logits of m"
    service.metrics.flush()
    text = service.metrics.text().decode()
    assert 'mnist_bn_rows_total{model="m",version="1"} 3.0' in text
    (line,) = log()
    del line["time"], line["seconds"]
    assert line == {
        "level": "info",
        "event": "infer",
        "call": "c",
        "model": "m",
        "version": "1",
        "rows": 3,
        "request_id": "mine",
    }


def test_a_model_that_fails_is_an_error_that_is_logged(log: Log) -> None:
    def fail(_: Float32) -> Float32:
        raise RuntimeFailedError("no \udc80")

    service = make_service()
    with pytest.raises(RequestError, match="the model does not run: no \udc80") as failure:
        infer(service, fail, {})
    assert (failure.value.status, failure.value.reason) == (500, "runtime")
    assert service.reject(failure.value, "m", {}) == r"the model does not run: no \udc80"
    failed, rejected = log()
    assert (failed["event"], failed["model"]) == ("failed", "m")
    assert (rejected["event"], rejected["reason"]) == ("rejected", "runtime")


def test_an_unexpected_error_is_explained_without_its_details(log: Log) -> None:
    service = make_service()
    explained = service.explain(ValueError("\udc80"), "m")
    assert (str(explained), explained.status) == ("the server failed; its log says how", 500)
    (line,) = log()
    assert (line["event"], line["why"]) == ("failed", r"ValueError('\udc80')")
    assert str(service.explain(asyncio.CancelledError(), "m")) == "the server stops"
    expected = RequestError("x")
    assert service.explain(expected, "m") is expected


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        ("Bearer " + TOKEN, True),
        ("bearer  " + TOKEN, True),
        ("", False),
        (TOKEN, False),
        ("Bearer", False),
        (f"Bearer {TOKEN}0", False),
        (f"Basic {TOKEN}", False),
    ],
)
def test_a_request_must_contain_the_token(given: str, valid: bool) -> None:
    service = make_service(token=TOKEN)
    headers = {b"authorization": given.encode()} if given else {}
    assert service.is_authenticated(headers) == valid
    for require in (service.authenticate, service.authorize_control):
        if valid:
            require(headers)
        else:
            with pytest.raises(RequestError, match="expected Bearer and this server's token"):
                require(headers)


def test_without_a_token_only_control_is_forbidden() -> None:
    service = make_service()
    service.authenticate({})
    with pytest.raises(RequestError, match="--token-file") as forbidden:
        service.authorize_control({})
    assert forbidden.value.status == 403


def test_more_requests_than_the_queue_holds_are_rejected() -> None:
    service = make_service(queue=2)
    service.check_queue(2)
    with pytest.raises(RequestError, match="the server is busy, try again"):
        service.check_queue(3)


@pytest.mark.parametrize("given", [b"", b"a b", b"a\xff", b"a" * 129])
def test_an_unusable_request_id_is_replaced(given: bytes) -> None:
    service = make_service()
    headers = {b"x-request-id": given}
    ((name, value),) = service.trace(headers)
    assert name == b"x-request-id"
    assert value == headers[name] != given
    assert value.startswith(service.id_prefix.encode())
    assert dict(service.trace(headers)) == {name: value}


@pytest.mark.parametrize(
    ("parent", "valid"),
    [
        (PARENT, True),
        (b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", True),
        (b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        (b"00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        (b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", False),
        (b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", False),
    ],
)
def test_only_a_valid_traceparent_is_passed_on(parent: bytes, valid: bool) -> None:
    headers = {b"x-request-id": b"mine", b"traceparent": parent}
    fields = dict(make_service().trace(headers))
    assert fields == {b"x-request-id": b"mine"} | ({b"traceparent": parent} if valid else {})
    assert (b"traceparent" in headers) == valid
