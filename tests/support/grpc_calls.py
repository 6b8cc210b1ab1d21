"""gRPC calls as bytes, and the parts of a server that answers them."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.support.serving import BEARER, Server

MODEL = "mnist-bn"
MAX_ROWS = 100
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
INFER, STREAM = (f"/{SERVICE.full_name}/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
WAIT = 30.0  # seconds; the machine may be busy
NOISE = np.random.default_rng(0).random((MAX_ROWS, 784), np.float32)
METADATA = [(key.lower(), value) for key, value in BEARER.items()]


def address(server: Server) -> str:
    return str(server.events("serving")[0]["grpc"])


def message(**changed: Any) -> dict[str, Any]:
    """The fields of a valid request, with changes."""
    image = {"name": "image", "datatype": "FP32", "shape": [1, 784]}
    contents = {"raw_input_contents": [NOISE[:1].tobytes()]}
    return {"model_name": MODEL, "inputs": [image], **contents, **changed}


def packed(**changed: Any) -> bytes:
    return bytes(service_pb2.ModelInferRequest(**message(**changed)).SerializeToString())


def ask(channel: grpc.Channel, request: bytes, **options: Any) -> service_pb2.ModelInferResponse:
    answer = channel.unary_unary(INFER)(
        request, **{"metadata": METADATA, "timeout": WAIT, **options}
    )
    return service_pb2.ModelInferResponse.FromString(answer)


def rejection(call: Callable[[], object]) -> tuple[str, str]:
    """Code and details of a call that is rejected."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code().name, error.value.details()


def halfway(channel: grpc.Channel, release: threading.Event) -> Iterator[bytes]:
    """Begin a call whose request is sent when ``release`` is set."""

    def requests_() -> Iterator[bytes]:
        assert release.wait(WAIT)
        yield packed()

    answers: Iterator[bytes] = channel.stream_stream(INFER)(requests_(), timeout=WAIT)
    return answers
