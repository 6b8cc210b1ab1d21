"""The protocol over gRPC: by the client that most people use, and by hand where it is too tidy."""

import asyncio
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import requests
import tritonclient.grpc as triton
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.catalog import Catalog, FileSource
from mnist_batchnorm.serve.core.control import Control
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.grpc.service import Rpc, RpcServer
from mnist_batchnorm.serve.http.app import App
from mnist_batchnorm.serve.process.listener import reserved
from mnist_batchnorm.serve.process.shared_state import Roll
from tests.support import commands
from tests.support.serving import Server, lay, running

TOKEN = "the-token-of-these-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}
MODEL = "mnist-bn"
MAX_BODY, MAX_ROWS = 1 << 20, 100
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
INFER, STREAM = (f"/{SERVICE.full_name}/{name}" for name in ("ModelInfer", "ModelStreamInfer"))
WAIT = 30.0  # seconds; the machine may be busy
NOISE = np.random.default_rng(0).random((MAX_ROWS, 784), np.float32)

Float32 = npt.NDArray[np.float32]
Caller = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpc") / "pipeline"
    lay(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = ("--max-body", str(MAX_BODY), "--max-rows", str(MAX_ROWS), "--access-log")
    env = {"MNIST_BN_TOKEN": TOKEN}
    with running("--grpc-port", "0", *limits, folder=folder, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(server)) as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address(server)) as channel:
        yield channel


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[Float32], Float32]:
    """What ONNX Runtime gives in this process."""
    return runtime.load((folder / "models/bn.onnx").read_bytes()).run


def address(server: Server) -> str:
    return str(server.events("serving")[0]["grpc"])


def tensor(images: npt.NDArray[Any]) -> triton.InferInput:
    given = triton.InferInput("image", images.shape, {1: "UINT8", 4: "FP32"}[images.itemsize])
    given.set_data_from_numpy(images)
    return given


def message(**changed: Any) -> dict[str, Any]:
    """The fields of a good request, and what shall be different."""
    image = {"name": "image", "datatype": "FP32", "shape": [1, 784]}
    contents = {"raw_input_contents": [NOISE[:1].tobytes()]}
    return {"model_name": MODEL, "inputs": [image], **contents, **changed}


def packed(**changed: Any) -> bytes:
    return bytes(service_pb2.ModelInferRequest(**message(**changed)).SerializeToString())


def ask(channel: grpc.Channel, request: bytes, **options: Any) -> service_pb2.ModelInferResponse:
    options = {"metadata": list(BEARER.items()), "timeout": WAIT, **options}
    answer = channel.unary_unary(INFER)(request, **options)
    return service_pb2.ModelInferResponse.FromString(answer)


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Code and details of a call that is refused."""
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code().name, refused.value.details()


def rejects(server: Server, reason: str) -> float:
    """How many requests were refused for a reason, as the metrics have it."""
    text = requests.get(f"{server.url}/metrics", headers=BEARER, timeout=WAIT).text
    lines = [line for line in text.splitlines() if "mnist_bn_rejects_total{" in line]
    return sum(float(line.split()[1]) for line in lines if f'reason="{reason}"' in line)


# --- every call, by tritonclient --------------------------------------------------------------


def test_health(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()  # without a token
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, headers=BEARER)
    assert not client.is_model_ready("another", headers=BEARER)
    assert not client.is_model_ready(MODEL, "0", headers=BEARER)


def test_it_tells_the_same_of_itself_as_over_http(
    client: triton.InferenceServerClient, server: Server
) -> None:
    def get(path: str) -> Any:
        return requests.get(f"{server.url}{path}", headers=BEARER, timeout=WAIT).json()

    itself = client.get_server_metadata(headers=BEARER)
    model = client.get_model_metadata(MODEL, headers=BEARER)
    index = client.get_model_repository_index(headers=BEARER)
    over_http = get(f"/v2/models/{MODEL}")

    assert (itself.name, itself.version) == (get("/v2")["name"], get("/v2")["version"])
    extensions = set(get("/v2")["extensions"])
    assert set(itself.extensions) == extensions - {"binary_tensor_data"}
    assert "parameters" in extensions  # test_parameters_come_back
    assert list(model.versions) == over_http["versions"]
    assert model.platform == over_http["platform"]
    for tensors, same in [(model.inputs, "inputs"), (model.outputs, "outputs")]:
        told = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]
        assert told == over_http[same]
    listed = requests.post(f"{server.url}/v2/repository/index", headers=BEARER, timeout=WAIT)
    keys = ("name", "version", "state", "reason")
    assert [{key: getattr(row, key) for key in keys} for row in index.models] == listed.json()


def test_the_configuration_is_that_of_the_server(
    client: triton.InferenceServerClient, server: Server
) -> None:
    config = client.get_model_config(MODEL, headers=BEARER).config
    about = requests.get(f"{server.url}/v2/models/{MODEL}", headers=BEARER, timeout=WAIT).json()

    assert (config.name, config.backend, config.max_batch_size) == (MODEL, "onnxruntime", MAX_ROWS)
    assert ([*config.input[0].dims], [*config.output[0].dims]) == ([784], [10])
    assert not config.HasField("dynamic_batching")
    assert config.parameters["sha256"].string_value == about["parameters"]["sha256"]
    assert config.parameters["verified"].string_value == "true"


@pytest.mark.parametrize(
    "images",
    [
        NOISE[:3],
        (NOISE[:3] * 255).astype(np.uint8),
        (NOISE * 255).astype(np.uint8)[:2].reshape(2, 28, 28),
    ],
    ids=["floats", "pixels", "pictures"],
)
def test_logits_are_those_of_onnx_runtime(
    client: triton.InferenceServerClient,
    expected: Callable[[Float32], Float32],
    images: npt.NDArray[Any],
) -> None:
    answer = client.infer(MODEL, [tensor(images)], request_id="one", headers=BEARER)

    inputs = images if images.dtype == np.float32 else network_input(images)
    assert answer.get_response().id == "one"
    assert answer.as_numpy("logits").tobytes() == expected(inputs).tobytes()


def test_parameters_come_back(client: triton.InferenceServerClient) -> None:
    parameters = {"text": "t", "number": 3, "truth": True}
    answer = client.infer(MODEL, [tensor(NOISE[:1])], parameters=parameters, headers=BEARER)

    came = answer.get_response().parameters
    assert came["text"].string_param == "t"
    assert came["number"].int64_param == 3
    assert came["truth"].bool_param is True


def test_classification(
    client: triton.InferenceServerClient, expected: Callable[[Float32], Float32]
) -> None:
    wanted = [triton.InferRequestedOutput("logits", class_count=3)]
    answer = client.infer(MODEL, [tensor(NOISE[:2])], outputs=wanted, headers=BEARER)

    found = [[text.decode().split(":") for text in row] for row in answer.as_numpy("logits")]
    for row, logits in zip(found, expected(NOISE[:2]), strict=True):
        best = np.argsort(-logits)[:3]
        assert [int(index) for _, index in row] == best.tolist()
        assert [np.float32(value) for value, _ in row] == logits[best].tolist()


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests(
    client: triton.InferenceServerClient,
    expected: Callable[[Float32], Float32],
    compression: str,
) -> None:
    answer = client.infer(
        MODEL, [tensor(NOISE[:1])], compression_algorithm=compression, headers=BEARER
    )

    assert answer.as_numpy("logits").tobytes() == expected(NOISE[:1]).tobytes()


def test_many_at_once(
    client: triton.InferenceServerClient, expected: Callable[[Float32], Float32]
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for n in range(20):
        images, back = (
            [tensor(NOISE[n : n + 1])],
            lambda result, error: answers.put((result, error)),
        )
        client.async_infer(MODEL, images, back, request_id=str(n), headers=BEARER)
    came = [answers.get(timeout=WAIT) for _ in range(20)]

    assert [error for _, error in came] == [None] * 20
    logits = {int(one.get_response().id): one.as_numpy("logits") for one, _ in came}
    assert b"".join(logits[n].tobytes() for n in range(20)) == expected(NOISE[:20]).tobytes()


def test_a_stream_is_answered_in_order(
    client: triton.InferenceServerClient, expected: Callable[[Float32], Float32]
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=BEARER)
    for n in range(10):
        name, last = ("another" if n == 4 else MODEL), n == 7
        images = [tensor(NOISE[n : n + 1])]
        client.async_stream_infer(name, images, request_id=str(n), enable_empty_final_response=last)
    came = [answers.get(timeout=WAIT) for _ in range(10)]
    client.stop_stream()

    for n, (result, error) in enumerate(came):
        if n == 4:
            assert "no model 'another' here" in str(error)
            continue
        assert error is None
        assert result.get_response().id == str(n)
        assert result.as_numpy("logits").tobytes() == expected(NOISE[n : n + 1]).tobytes()
        assert ("triton_final_response" in result.get_response().parameters) == (n == 7)


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient) -> None:
    def counts() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics(MODEL, headers=BEARER).model_stats
        return stats.execution_count, stats.inference_count

    requests_before, rows_before = counts()
    client.infer(MODEL, [tensor(NOISE[:5])], headers=BEARER)

    assert counts() == (requests_before + 1, rows_before + 5)
    (stats,) = client.get_inference_statistics(MODEL, headers=BEARER).model_stats
    with pytest.raises(InferenceServerException, match="shape"):
        client.infer(MODEL, [tensor(NOISE[:2, :100].copy())], headers=BEARER)
    (again,) = client.get_inference_statistics(MODEL, headers=BEARER).model_stats
    assert again.inference_stats.fail.count == stats.inference_stats.fail.count + 1
    assert again.inference_stats.fail.ns > stats.inference_stats.fail.ns
    assert again.last_inference == stats.last_inference > 1.7e12  # milliseconds since the epoch
    everything = client.get_inference_statistics(headers=BEARER).model_stats
    assert {MODEL, "mnist-bn-folded"} <= {stats.name for stats in everything}


def test_unload_and_load(client: triton.InferenceServerClient) -> None:
    name = "mnist-bn-folded"
    client.unload_model(name, headers=BEARER)
    gone = client.is_model_ready(name, headers=BEARER)
    with pytest.raises(InferenceServerException, match=f"no model '{name}' here") as refused:
        client.infer(name, [tensor(NOISE[:1])], headers=BEARER)
    client.load_model(name, headers=BEARER)

    assert not gone
    assert refused.value.status() == "StatusCode.NOT_FOUND"
    assert client.is_model_ready(name, headers=BEARER)


def test_what_is_not_here_says_so(client: triton.InferenceServerClient) -> None:
    memory = "send the tensor in the request"
    absent: list[tuple[Callable[..., object], tuple[Any, ...], str]] = [
        (client.get_system_shared_memory_status, (), memory),
        (client.register_system_shared_memory, ("a", "/a", 1), memory),
        (client.unregister_system_shared_memory, (), memory),
        (client.get_cuda_shared_memory_status, (), memory),
        (client.register_cuda_shared_memory, ("a", b"YWFh", 0, 1), memory),
        (client.unregister_cuda_shared_memory, (), memory),
        (client.get_trace_settings, (), "traceparent"),
        (client.update_trace_settings, (), "traceparent"),
        (client.get_log_settings, (), "--access-log"),
        (client.update_log_settings, ({},), "--access-log"),
    ]
    for call, arguments, instead in absent:
        with pytest.raises(InferenceServerException, match=instead) as refused:
            call(*arguments, headers=BEARER)
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_asyncio_client(server: Server, expected: Callable[[Float32], Float32]) -> None:
    async def calls() -> tuple[bool, list[Any], list[Any]]:
        async with triton_aio.InferenceServerClient(address(server)) as client:
            ready = await client.is_server_ready()
            asked = [
                client.infer(MODEL, [tensor(NOISE[n : n + 1])], headers=BEARER) for n in range(8)
            ]
            answers = await asyncio.gather(*asked)

            async def stream() -> Any:
                for n in range(8):
                    yield {"model_name": MODEL, "inputs": [tensor(NOISE[n : n + 1])]}

            streamed = [pair async for pair in client.stream_infer(stream(), headers=BEARER)]
            return ready, answers, streamed

    ready, answers, streamed = asyncio.run(calls())

    assert ready
    logits = expected(NOISE[:8]).tobytes()
    assert b"".join(answer.as_numpy("logits").tobytes() for answer in answers) == logits
    assert [error for _, error in streamed] == [None] * 8
    assert b"".join(answer.as_numpy("logits").tobytes() for answer, _ in streamed) == logits


# --- what a request may look like ---------------------------------------------------------------


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
                "model_version": st.just("1"),
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
def test_every_valid_form_is_answered(
    channel: grpc.Channel,
    expected: Callable[[Float32], Float32],
    client: triton.InferenceServerClient,
    case: tuple[dict[str, Any], Float32],
) -> None:
    fields, images = case
    if "model_version" in fields:
        metadata = client.get_model_metadata(MODEL, headers=BEARER)
        fields = fields | {"model_version": metadata.versions[0]}
    request = service_pb2.ModelInferRequest(**fields)

    answer = ask(channel, request.SerializeToString())

    (output,) = answer.outputs
    assert (output.name, output.datatype, [*output.shape]) == ("logits", "FP32", [len(images), 10])
    assert (answer.id, answer.parameters) == (request.id, request.parameters)
    if request.raw_input_contents:
        came = answer.raw_output_contents[0]
        assert not output.contents.fp32_contents
    else:
        came = np.array(output.contents.fp32_contents, np.float32).tobytes()
        assert not answer.raw_output_contents
    assert came == expected(images).tobytes()


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
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": (message(model_name=""), "NOT_FOUND", "no model '' here"),
    "other model": (message(model_name="x"), "NOT_FOUND", "no model 'x' here; there is mnist-bn"),
    "other version": (message(model_version="0"), "NOT_FOUND", "version '0' here"),
    "no input": (message(inputs=[]), "INVALID_ARGUMENT", "inputs: got 0 tensors"),
    "two inputs": (
        message(inputs=image()["inputs"] * 2),
        "INVALID_ARGUMENT",
        "inputs: got 2 tensors, expected one tensor, 'image'",
    ),
    "other name": (image(name="x"), "INVALID_ARGUMENT", "inputs[0].name: got x, expected 'image'"),
    "no name": (image(name=""), "INVALID_ARGUMENT", "inputs[0].name: got nothing"),
    "no datatype": (image(datatype=""), "INVALID_ARGUMENT", "inputs[0].datatype: got nothing"),
    "other datatype": (
        image(datatype="FP64"),
        "INVALID_ARGUMENT",
        "inputs[0].datatype: got FP64, expected FP32 or UINT8",
    ),
    "no shape": (image(shape=[]), "INVALID_ARGUMENT", "inputs[0].shape: got []"),
    "one axis": (image(shape=[784]), "INVALID_ARGUMENT", "inputs[0].shape: got [784]"),
    "other shape": (
        image(shape=[1, 28, 28]),
        "INVALID_ARGUMENT",
        "inputs[0].shape: got [1, 28, 28], expected [n, 784] of FP32",
    ),
    "negative": (image(shape=[-1, 784]), "INVALID_ARGUMENT", "inputs[0].shape: got [-1, 784]"),
    "too many rows": (
        image(shape=[MAX_ROWS + 1, 784]),
        "RESOURCE_EXHAUSTED",
        f"inputs[0].shape: got {MAX_ROWS + 1} images, expected at most {MAX_ROWS}",
    ),
    "huge shape": (image(shape=[2**62, 784]), "RESOURCE_EXHAUSTED", "inputs[0].shape"),
    "no data": (
        message(raw_input_contents=[]),
        "INVALID_ARGUMENT",
        "inputs[0].contents.fp32_contents: got 0 numbers, expected 784 for FP32 [1, 784]",
    ),
    "short raw": (
        message(raw_input_contents=[bytes(3132)]),
        "INVALID_ARGUMENT",
        "raw_input_contents[0], bytes: got 3132, expected 3136 for FP32 [1, 784]",
    ),
    "long raw": (
        message(raw_input_contents=[bytes(3140)]),
        "INVALID_ARGUMENT",
        "raw_input_contents[0], bytes: got 3140",
    ),
    "odd raw": (
        message(raw_input_contents=[bytes(3135)]),
        "INVALID_ARGUMENT",
        "raw_input_contents[0], bytes: got 3135",
    ),
    "two raw": (
        message(raw_input_contents=[bytes(3136)] * 2),
        "INVALID_ARGUMENT",
        "raw_input_contents: got 2 tensors, expected one, for one input",
    ),
    "raw and typed": (
        image(contents={"fp32_contents": [0.0] * 784}),
        "INVALID_ARGUMENT",
        "inputs[0]: got contents.fp32_contents and raw_input_contents, expected one of the two",
    ),
    "few numbers": (
        typed("fp32_contents", [0.0] * 783),
        "INVALID_ARGUMENT",
        "inputs[0].contents.fp32_contents: got 783 numbers, expected 784",
    ),
    "doubles": (
        typed("fp64_contents", [0.0] * 784),
        "INVALID_ARGUMENT",
        "inputs[0].contents: got fp64_contents, expected fp32_contents for FP32",
    ),
    "floats for pixels": (
        typed("fp32_contents", [0.0] * 784, datatype="UINT8"),
        "INVALID_ARGUMENT",
        "inputs[0].contents: got fp32_contents, expected uint_contents for UINT8",
    ),
    "no pixel": (
        typed("uint_contents", [0] * 783 + [256], datatype="UINT8"),
        "INVALID_ARGUMENT",
        "inputs[0].contents.uint_contents, image 0, pixel 783: got 256",
    ),
    "raw NaN": (
        message(raw_input_contents=[NAN.tobytes()]),
        "INVALID_ARGUMENT",
        "raw_input_contents[0], image 0, pixel 7: got nan, expected a finite FP32",
    ),
    "typed infinity": (
        typed("fp32_contents", [0.0] * 783 + [float("inf")]),
        "INVALID_ARGUMENT",
        "inputs[0].contents.fp32_contents, image 0, pixel 783: got inf",
    ),
    "shared input": (image(parameters=REGION), "INVALID_ARGUMENT", "inputs[0].parameters"),
    "shared output": (
        message(outputs=[{"name": "logits", "parameters": REGION}]),
        "INVALID_ARGUMENT",
        "outputs[0].parameters: got shared_memory_region",
    ),
    "other output": (
        message(outputs=[{"name": "x"}]),
        "INVALID_ARGUMENT",
        "outputs[0].name: got x, expected 'logits'",
    ),
    "output twice": (
        message(outputs=[{"name": "logits"}] * 2),
        "INVALID_ARGUMENT",
        "outputs: got 2 tensors",
    ),
    "no classes": (
        message(
            outputs=[{"name": "logits", "parameters": {"classification": {"int64_param": -1}}}]
        ),
        "INVALID_ARGUMENT",
        "outputs[0].parameters.classification: got -1",
    ),
    "classes in words": (
        message(
            outputs=[{"name": "logits", "parameters": {"classification": {"string_param": "3"}}}]
        ),
        "INVALID_ARGUMENT",
        "outputs[0].parameters.classification: got 3",
    ),
    "classes of nothing": (
        message(outputs=[{"name": "logits", "parameters": {"classification": {}}}]),
        "INVALID_ARGUMENT",
        "outputs[0].parameters.classification: got nothing",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_refused_by_field(channel: grpc.Channel, kind: str) -> None:
    fields, code, why = BAD[kind]
    request = service_pb2.ModelInferRequest(**fields).SerializeToString()

    found, says = refusal(lambda: ask(channel, request))

    assert found == code
    assert why in says
    assert ask(channel, packed()).model_name == MODEL


@pytest.mark.parametrize(
    "request_", [b"\xff", b"\x0a\xff", packed()[:-1], b"\x0a\x02\xff\xfe", b'{"inputs": []}']
)
def test_bytes_that_are_no_message(channel: grpc.Channel, request_: bytes) -> None:
    code, says = refusal(lambda: ask(channel, request_))

    assert code == "INVALID_ARGUMENT"
    assert (
        says == f"the message: got {len(request_)} other bytes, expected a whole ModelInferRequest"
    )


def test_a_call_without_a_message(channel: grpc.Channel) -> None:
    call = channel.stream_stream(INFER)(iter(()), metadata=list(BEARER.items()), timeout=WAIT)

    code, says = refusal(lambda: list(call))

    assert (code, says) == ("INVALID_ARGUMENT", "the call: got no message, expected one")


def test_a_call_that_does_not_exist(channel: grpc.Channel) -> None:
    for path in (f"/{SERVICE.full_name}/Nothing", "/another.Service/ModelInfer", "/"):
        code, _ = refusal(lambda path=path: channel.unary_unary(path)(b"", timeout=WAIT))  # type: ignore[misc]
        assert code == "UNIMPLEMENTED"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_that_is_too_large(
    server: Server, channel: grpc.Channel, compression: grpc.Compression
) -> None:
    before = rejects(server, "unread")
    request = packed(raw_input_contents=[bytes(MAX_BODY + 1)])

    code, _ = refusal(lambda: ask(channel, request, compression=compression))

    assert code == "RESOURCE_EXHAUSTED"
    assert ask(channel, packed()).model_name == MODEL
    until(lambda: rejects(server, "unread") == before + 1)


def test_the_largest_request_fits(channel: grpc.Channel) -> None:
    images = {"name": "image", "datatype": "FP32", "shape": [MAX_ROWS, 784]}

    answer = ask(channel, packed(inputs=[images], raw_input_contents=[NOISE.tobytes()]))

    assert [*answer.outputs[0].shape] == [MAX_ROWS, 10]


# --- who may ask, and what is seen ------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "Bearer another-token-of-tests", TOKEN, "Bearer"])
def test_only_health_is_free_of_the_token(channel: grpc.Channel, given: str | None) -> None:
    metadata = [("authorization", given)] if given else []
    for name in SERVICE.methods_by_name:
        call = channel.stream_stream(f"/{SERVICE.full_name}/{name}")
        answers = call(iter((b"",)), metadata=metadata, timeout=WAIT)
        if name in ("ServerLive", "ServerReady"):
            assert len(list(answers)) == 1
        else:
            code, _ = refusal(lambda answers=answers: list(answers))  # type: ignore[misc]
            assert code == "UNAUTHENTICATED", name


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda c: c.load_model("another", headers=BEARER), "no model 'another' here"),
        (lambda c: c.unload_model("another", headers=BEARER), "no model 'another' here"),
        (lambda c: c.load_model(MODEL, headers=BEARER, config="{}"), "parameters: got config"),
        (lambda c: c.get_model_metadata("another", headers=BEARER), "no model 'another' here"),
        (lambda c: c.get_model_config("another", headers=BEARER), "no model 'another' here"),
        (lambda c: c.get_inference_statistics("another", headers=BEARER), "no model 'another'"),
    ],
)
def test_other_calls_name_what_is_wrong(
    client: triton.InferenceServerClient, call: Caller, why: str
) -> None:
    with pytest.raises(InferenceServerException, match=why) as refused:
        call(client)
    assert refused.value.status() in {"StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT"}


def test_no_other_repository(channel: grpc.Channel) -> None:
    request = service_pb2.RepositoryIndexRequest(repository_name="x").SerializeToString()
    index = channel.unary_unary(f"/{SERVICE.full_name}/RepositoryIndex")

    code, says = refusal(lambda: index(request, metadata=list(BEARER.items()), timeout=WAIT))

    assert (code, says.split(":")[0]) == ("INVALID_ARGUMENT", "repository_name")


def test_a_call_can_be_found_in_the_log(server: Server, channel: grpc.Channel) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    traced = [*BEARER.items(), ("x-request-id", "mine"), ("traceparent", parent)]
    _, call = channel.unary_unary(INFER).with_call(packed(), metadata=traced, timeout=WAIT)
    refused = [*BEARER.items(), ("x-request-id", "mine-too")]
    refusal(lambda: ask(channel, packed(model_name="x"), metadata=refused))

    came = dict(call.trailing_metadata())
    assert (came["x-request-id"], came["traceparent"]) == ("mine", parent)
    (line,) = [line for line in server.events("infer") if line.get("request_id") == "mine"]
    assert (line["model"], line["rows"], line["traceparent"]) == (MODEL, 1, parent)
    (line,) = [line for line in server.events("rejected") if line.get("request_id") == "mine-too"]
    assert (line["code"], line["reason"], line["call"]) == ("NOT_FOUND", "model", "ModelInfer")


def test_refusals_are_counted(server: Server, channel: grpc.Channel) -> None:
    before = rejects(server, "shape")
    refusal(lambda: ask(channel, packed(inputs=image(shape=[784])["inputs"])))

    assert rejects(server, "shape") == before + 1


def test_the_log_never_holds_the_token(server: Server) -> None:
    assert TOKEN not in json.dumps(server.log())


# --- load, and the end ------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    waited = threading.Event()
    for _ in range(int(WAIT / 0.05)):
        if condition():
            return
        waited.wait(0.05)
    raise AssertionError("it does not happen")


def halfway(channel: grpc.Channel, release: threading.Event) -> Iterator[bytes]:
    """Begin a call whose request is sent when ``release`` is set."""

    def requests_() -> Iterator[bytes]:
        assert release.wait(WAIT)
        yield packed()

    answers: Iterator[bytes] = channel.stream_stream(INFER)(requests_(), timeout=WAIT)
    return answers


def open_calls(server: Server) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=WAIT).text
    (line,) = [line for line in text.splitlines() if line.startswith("mnist_bn_queue ")]
    return float(line.split()[1])


def test_a_full_server_says_so_and_slow_clients_hold_no_place(folder: Path) -> None:
    release = threading.Event()
    with (
        running("--grpc-port", "0", "--queue", "2", folder=folder) as server,
        grpc.insecure_channel(address(server)) as channel,
        grpc.insecure_channel(address(server), [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        refused = ""
        for _ in range(20):  # two calls hold the places for a second, then they are slow
            calls = [halfway(channel, release) for _ in range(2)]
            try:
                for _ in range(50):
                    ask(other, packed())
            except grpc.RpcError as error:
                refused = f"{error.code().name}: {error.details()}"
                pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
                break
            for call in calls:
                call.cancel()  # type: ignore[attr-defined]
        assert refused == "UNAVAILABLE: the server is busy, try again"
        assert pushback == "1000"

        until(lambda: not fails(lambda: ask(other, packed())))
        release.set()
        assert [len(list(call)) for call in calls] == [1, 1]


def fails(call: Callable[[], object]) -> bool:
    try:
        call()
    except grpc.RpcError:
        return True
    return False


def test_a_slow_message_is_refused(folder: Path) -> None:
    release = threading.Event()
    with (
        running("--grpc-port", "0", "--body-timeout", "0.3", folder=folder) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        code, says = refusal(lambda: list(halfway(channel, release)))
        release.set()

        assert (code, says) == ("DEADLINE_EXCEEDED", "the message: not all here after 0.3 s")
        assert rejects(server, "slow") == 1


def test_a_client_that_takes_no_answers_holds_no_place(folder: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    source = FileSource(MODEL, folder / "models/bn.onnx", folder / "reports/parity.json", True)
    catalog = Catalog([source], metrics)
    catalog.load()

    def requests_() -> Iterator[bytes]:
        images = {"name": "image", "datatype": "FP32", "shape": [0, 784]}
        long = {"long": {"string_param": "x" * (1 << 20)}}  # that the answer repeats
        while True:
            yield packed(inputs=[images], parameters=long, raw_input_contents=[b""])

    async def serve(settings: Settings) -> None:
        app = App(catalog, settings, metrics, cold)
        control = Control(catalog, Roll(tmp_path), 0.0)
        server = RpcServer(Rpc(app, control, settings, lambda: False))
        address = await server.start()
        done = threading.Event()
        running_ = asyncio.create_task(server.run(done.is_set, lambda: True))
        with grpc.insecure_channel(address) as channel:
            stalled = channel.stream_stream(STREAM)(requests_(), timeout=WAIT)
            for _ in range(int(WAIT / 0.05)):
                await asyncio.sleep(0.05)
                if 'reason="stalled"' in metrics.text().decode():
                    break
            assert 'reason="stalled"' in metrics.text().decode()
            answer = await asyncio.to_thread(ask, channel, packed())
            assert answer.model_name == MODEL
            stalled.cancel()
        done.set()
        await running_

    async def cold(*_: object) -> None:
        raise AssertionError("nobody asks over HTTP")

    settings = Settings(grpc_port=0, write_timeout=0.3, state=tmp_path)
    with reserved(settings) as settings:
        asyncio.run(serve(settings))


@pytest.fixture
def rpc(folder: Path, tmp_path: Path) -> Rpc:
    """What answers calls, in this process, with a queue of one."""
    metrics = Metrics()
    source = FileSource(MODEL, folder / "models/bn.onnx", folder / "reports/parity.json", True)
    catalog = Catalog([source], metrics)
    catalog.load()

    async def cold(*_: object) -> None:
        raise AssertionError("nobody asks over HTTP")

    settings = Settings(queue=1, state=tmp_path)
    app = App(catalog, settings, metrics, cold)
    return Rpc(app, Control(catalog, Roll(tmp_path), 0.0), settings, lambda: False)


class Kept(bytes):
    """A message that tells when nobody keeps it any more."""

    def __init__(self, _: bytes) -> None:
        self.on_end: Callable[[], object] = lambda: None

    def __del__(self) -> None:
        self.on_end()


class Context:
    """A call, as gRPC hands it over, with these requests."""

    def __init__(self, *given: bytes) -> None:
        self.given = list(given)
        self.answers: list[bytes] = []
        self.on_read: Callable[[], object] = lambda: None
        self.ended = 0  # messages that nobody keeps any more
        self.kept: list[int] = []  # at each answer, the messages that were still kept

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    async def read(self) -> object:
        self.on_read()
        if not self.given:
            return grpc.aio.EOF
        message = Kept(self.given.pop(0))
        message.on_end = self._end
        return message

    def _end(self) -> None:
        self.ended += 1

    async def write(self, answer: bytes) -> None:
        self.answers.append(answer)
        self.kept.append(len(self.answers) - self.ended)

    def answered_by(self, rpc: Rpc, path: str) -> None:
        """Have a call answered."""
        details = SimpleNamespace(method=path)
        asyncio.run(rpc.service(details).stream_stream(None, self))


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_a_message_is_not_kept_until_its_answer_is_taken(rpc: Rpc, path: str) -> None:
    context = Context(packed())
    context.answered_by(rpc, path)

    assert context.kept == [0]


def test_a_streamed_request_is_refused_while_the_queue_is_full(rpc: Rpc) -> None:
    context = Context(packed(id="1"), packed(id="2"), packed(id="3"))

    def fill_for_the_second() -> None:
        rpc.app.calls = int(len(context.given) == 2)

    context.on_read = fill_for_the_second
    context.answered_by(rpc, STREAM)

    answers = [service_pb2.ModelStreamInferResponse.FromString(one) for one in context.answers]
    assert [one.infer_response.id for one in answers] == ["1", "2", "3"]
    assert [one.error_message for one in answers] == ["", "the server is busy, try again", ""]
    assert rpc.app.calls == 0


def test_sigterm_loses_no_call(folder: Path) -> None:
    release = threading.Event()
    with (
        running("--grpc-port", "0", "--drain-delay", "0.5", folder=folder) as server,
        triton.InferenceServerClient(address(server)) as client,
        grpc.insecure_channel(address(server)) as channel,
        ThreadPoolExecutor(4) as threads,
    ):
        open_ = [halfway(channel, release) for _ in range(3)]
        asked: queue.Queue[bytes | None] = queue.Queue()
        stream = channel.stream_stream(STREAM)(iter(asked.get, None), timeout=WAIT)
        asked.put(packed())
        assert service_pb2.ModelStreamInferResponse.FromString(next(stream)).infer_response.outputs
        until(lambda: open_calls(server) == 3)

        stopped = threading.Event()
        answered, lost = [0] * 4, []

        def keep_asking(number: int) -> None:
            while not stopped.is_set():
                try:
                    ask(channel, packed())
                except grpc.RpcError as error:
                    lost.append(error.code())
                    return
                answered[number] += 1

        for number in range(4):
            threads.submit(keep_asking, number)
        until(lambda: all(answered))
        server.process.send_signal(signal.SIGTERM)
        until(lambda: bool(server.events("draining")))
        asked.put(packed())
        next(stream)
        ready = client.is_server_ready()
        release.set()
        answers = [list(call) for call in open_]
        code, says = refusal(lambda: next(stream))
        asked.put(None)
        status = server.process.wait(WAIT)
        stopped.set()

        assert not ready
        assert [len(answer) for answer in answers] == [1, 1, 1]
        assert (code, says) == ("UNAVAILABLE", "the server stops")
        assert set(lost) <= {grpc.StatusCode.UNAVAILABLE}
        assert status == 0
        counted = [line for line in server.log() if line["level"] == "error"]
        assert counted == []


def test_a_call_that_never_ends_is_cut_off_at_the_deadline(folder: Path) -> None:
    release = threading.Event()
    with (
        running(
            "--grpc-port", "0", "--drain-delay", "0", "--drain", "0.5", folder=folder
        ) as server,
        grpc.insecure_channel(address(server)) as channel,
    ):
        call = halfway(channel, release)
        until(lambda: open_calls(server) == 1)

        assert server.stop() == 0
        code, _ = refusal(lambda: list(call))
        release.set()
        assert code == "UNAVAILABLE"


def test_workers_share_the_port(folder: Path) -> None:
    with running("--grpc-port", "0", "--workers", "2", folder=folder) as server:
        until(lambda: len(server.events("serving")) == 2)
        assert len({line["grpc"] for line in server.events("serving")}) == 1
        for _ in range(8):  # a connection each, so that more than one worker is met
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(address(server), options) as channel:
                assert ask(channel, packed()).model_name == MODEL
        with triton.InferenceServerClient(address(server)) as client:
            (stats,) = client.get_inference_statistics(MODEL).model_stats

        assert stats.execution_count == 8
        assert server.stop() == 0


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("mnist-bn", "serve", "--port", "0", "--grpc-port", str(port))
        status, err = commands.run(folder, *words)

    assert status == 2
    assert f"cannot listen on 127.0.0.1, port {port} for gRPC: Address already in use" in err


def test_an_unproven_model_says_so(folder: Path) -> None:
    unproven = ("--allow-unverified", "--parity", "absent.json")
    with (
        running("--grpc-port", "0", *unproven, folder=folder) as server,
        triton.InferenceServerClient(address(server)) as client,
    ):
        parameters = client.get_model_config(MODEL).config.parameters
        with pytest.raises(InferenceServerException, match="need a token") as refused:
            client.load_model(MODEL)

    assert parameters["verified"].string_value == "false"
    assert "absent.json" in parameters["unverified_because"].string_value
    assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


@pytest.mark.parametrize("missing", ["grpc", "tritonclient"])
def test_without_the_extra_it_says_what_to_install(folder: Path, missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from mnist_batchnorm.cli import main\n"
        "sys.argv = ['mnist-bn', 'serve', '--port', '0', '--grpc-port', '0']\n"
        "main()"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "gRPC needs more packages" in done.stderr
    assert "pip install 'mnist-batchnorm[grpc,serve]'" in done.stderr
