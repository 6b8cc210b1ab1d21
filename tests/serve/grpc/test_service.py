"""The protocol over gRPC: by the client that most people use, and by hand where it is too tidy."""

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import requests
import tritonclient.grpc as triton
from tritonclient.grpc import aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.parity import runtime
from mnist_batchnorm.serve.core.catalog import Catalog, FileSource
from mnist_batchnorm.serve.core.control import Control
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.service import InferenceService
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.core.shared_state import SharedState
from mnist_batchnorm.serve.grpc.server import GrpcServer
from mnist_batchnorm.serve.grpc.service import GrpcService
from mnist_batchnorm.serve.process.listener import reserve_grpc_port
from tests.support.grpc_calls import (
    INFER,
    MAX_ROWS,
    METADATA,
    MODEL,
    NOISE,
    SERVICE,
    STREAM,
    WAIT,
    address,
    ask,
    halfway,
    packed,
    rejection,
)
from tests.support.serving import BEARER, TOKEN, Server, running, until

MAX_BODY = 1 << 20
AUTH = {"authorization": BEARER["Authorization"]}

Float32 = npt.NDArray[np.float32]
Caller = Callable[..., Any]


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


def tensor(images: npt.NDArray[Any]) -> triton.InferInput:
    given = triton.InferInput("image", images.shape, {1: "UINT8", 4: "FP32"}[images.itemsize])
    given.set_data_from_numpy(images)
    return given


def rejects(server: Server, reason: str) -> float:
    """How many requests were refused for a reason, as the metrics have it."""
    text = requests.get(f"{server.url}/metrics", headers=AUTH, timeout=WAIT).text
    lines = [line for line in text.splitlines() if "mnist_bn_rejects_total{" in line]
    return sum(float(line.split()[1]) for line in lines if f'reason="{reason}"' in line)


# --- every call, by tritonclient --------------------------------------------------------------


def test_health(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()  # without a token
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, headers=AUTH)
    assert not client.is_model_ready("another", headers=AUTH)
    assert not client.is_model_ready(MODEL, "0", headers=AUTH)


def test_metadata_is_the_same_as_over_http(
    client: triton.InferenceServerClient, server: Server
) -> None:
    def get(path: str) -> Any:
        return requests.get(f"{server.url}{path}", headers=BEARER, timeout=WAIT).json()

    itself = client.get_server_metadata(headers=AUTH)
    model = client.get_model_metadata(MODEL, headers=AUTH)
    index = client.get_model_repository_index(headers=AUTH)
    over_http = get(f"/v2/models/{MODEL}")

    assert (itself.name, itself.version) == (get("/v2")["name"], get("/v2")["version"])
    extensions = set(get("/v2")["extensions"])
    assert set(itself.extensions) == extensions - {"binary_tensor_data"}
    assert "parameters" in extensions  # test_parameters_are_repeated_in_the_answer
    assert list(model.versions) == over_http["versions"]
    assert model.platform == over_http["platform"]
    for tensors, same in [(model.inputs, "inputs"), (model.outputs, "outputs")]:
        told = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]
        assert told == over_http[same]
    listed = requests.post(f"{server.url}/v2/repository/index", headers=AUTH, timeout=WAIT)
    keys = ("name", "version", "state", "reason")
    assert [{key: getattr(row, key) for key in keys} for row in index.models] == listed.json()


def test_the_configuration_is_that_of_the_server(
    client: triton.InferenceServerClient, server: Server
) -> None:
    config = client.get_model_config(MODEL, headers=AUTH).config
    about = requests.get(f"{server.url}/v2/models/{MODEL}", headers=AUTH, timeout=WAIT).json()

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
    answer = client.infer(MODEL, [tensor(images)], request_id="one", headers=AUTH)

    inputs = images if images.dtype == np.float32 else network_input(images)
    assert answer.get_response().id == "one"
    assert answer.as_numpy("logits").tobytes() == expected(inputs).tobytes()


def test_parameters_are_repeated_in_the_answer(client: triton.InferenceServerClient) -> None:
    parameters = {"text": "t", "number": 3, "truth": True}
    answer = client.infer(MODEL, [tensor(NOISE[:1])], parameters=parameters, headers=AUTH)

    came = answer.get_response().parameters
    assert came["text"].string_param == "t"
    assert came["number"].int64_param == 3
    assert came["truth"].bool_param is True


def test_classification(
    client: triton.InferenceServerClient, expected: Callable[[Float32], Float32]
) -> None:
    wanted = [triton.InferRequestedOutput("logits", class_count=3)]
    answer = client.infer(MODEL, [tensor(NOISE[:2])], outputs=wanted, headers=AUTH)

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
        MODEL, [tensor(NOISE[:1])], compression_algorithm=compression, headers=AUTH
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
        client.async_infer(MODEL, images, back, request_id=str(n), headers=AUTH)
    came = [answers.get(timeout=WAIT) for _ in range(20)]

    assert [error for _, error in came] == [None] * 20
    logits = {int(one.get_response().id): one.as_numpy("logits") for one, _ in came}
    assert b"".join(logits[n].tobytes() for n in range(20)) == expected(NOISE[:20]).tobytes()


def test_a_stream_is_answered_in_order(
    client: triton.InferenceServerClient, expected: Callable[[Float32], Float32]
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=AUTH)
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


def test_statistics_count_requests(client: triton.InferenceServerClient) -> None:
    def counts() -> tuple[int, int]:
        (stats,) = client.get_inference_statistics(MODEL, headers=AUTH).model_stats
        return stats.execution_count, stats.inference_count

    requests_before, rows_before = counts()
    client.infer(MODEL, [tensor(NOISE[:5])], headers=AUTH)

    assert counts() == (requests_before + 1, rows_before + 5)
    (stats,) = client.get_inference_statistics(MODEL, headers=AUTH).model_stats
    with pytest.raises(InferenceServerException, match="shape"):
        client.infer(MODEL, [tensor(NOISE[:2, :100].copy())], headers=AUTH)
    (again,) = client.get_inference_statistics(MODEL, headers=AUTH).model_stats
    assert again.inference_stats.fail.count == stats.inference_stats.fail.count + 1
    assert again.inference_stats.fail.ns > stats.inference_stats.fail.ns
    assert again.last_inference == stats.last_inference > 1.7e12  # milliseconds since the epoch
    everything = client.get_inference_statistics(headers=AUTH).model_stats
    assert {MODEL, "mnist-bn-folded"} <= {stats.name for stats in everything}


def test_unload_and_load(client: triton.InferenceServerClient) -> None:
    name = "mnist-bn-folded"
    client.unload_model(name, headers=AUTH)
    gone = client.is_model_ready(name, headers=AUTH)
    with pytest.raises(InferenceServerException, match=f"no model '{name}' here") as refused:
        client.infer(name, [tensor(NOISE[:1])], headers=AUTH)
    client.load_model(name, headers=AUTH)

    assert not gone
    assert refused.value.status() == "StatusCode.NOT_FOUND"
    assert client.is_model_ready(name, headers=AUTH)


def test_calls_that_are_not_served_name_an_alternative(
    client: triton.InferenceServerClient,
) -> None:
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
            call(*arguments, headers=AUTH)
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


def test_asyncio_client(server: Server, expected: Callable[[Float32], Float32]) -> None:
    async def calls() -> tuple[bool, list[Any], list[Any]]:
        async with triton_aio.InferenceServerClient(address(server)) as client:
            ready = await client.is_server_ready()
            asked = [
                client.infer(MODEL, [tensor(NOISE[n : n + 1])], headers=AUTH) for n in range(8)
            ]
            answers = await asyncio.gather(*asked)

            async def stream() -> Any:
                for n in range(8):
                    yield {"model_name": MODEL, "inputs": [tensor(NOISE[n : n + 1])]}

            streamed = [pair async for pair in client.stream_infer(stream(), headers=AUTH)]
            return ready, answers, streamed

    ready, answers, streamed = asyncio.run(calls())

    assert ready
    logits = expected(NOISE[:8]).tobytes()
    assert b"".join(answer.as_numpy("logits").tobytes() for answer in answers) == logits
    assert [error for _, error in streamed] == [None] * 8
    assert b"".join(answer.as_numpy("logits").tobytes() for answer, _ in streamed) == logits


# --- what a request may look like ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "code", "why"),
    [
        (packed(model_name="x"), "NOT_FOUND", "no model 'x' here; there is mnist-bn"),
        (packed(model_version="0"), "NOT_FOUND", "version '0' here"),
        (packed(inputs=[]), "INVALID_ARGUMENT", "inputs: got 0 tensors"),
        (
            packed(inputs=[{"name": "image", "datatype": "FP32", "shape": [2**62, 784]}]),
            "RESOURCE_EXHAUSTED",
            "inputs[0].shape",
        ),
        (b"\xff", "INVALID_ARGUMENT", "the message: got 1 other bytes, expected a whole Model"),
    ],
    ids=["model", "version", "inputs", "rows", "bytes"],
)
def test_a_wrong_request_has_a_code_and_a_reason(
    channel: grpc.Channel, request_: bytes, code: str, why: str
) -> None:
    found, details = rejection(lambda: ask(channel, request_))

    assert found == code
    assert why in details
    assert ask(channel, packed()).model_name == MODEL


def test_a_call_without_a_message(channel: grpc.Channel) -> None:
    call = channel.stream_stream(INFER)(iter(()), metadata=METADATA, timeout=WAIT)

    code, says = rejection(lambda: list(call))

    assert (code, says) == ("INVALID_ARGUMENT", "the call: got no message, expected one")


def test_a_call_that_does_not_exist(channel: grpc.Channel) -> None:
    for path in (f"/{SERVICE.full_name}/Nothing", "/another.Service/ModelInfer", "/"):
        code, _ = rejection(lambda path=path: channel.unary_unary(path)(b"", timeout=WAIT))  # type: ignore[misc]
        assert code == "UNIMPLEMENTED"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_that_is_too_large(
    server: Server, channel: grpc.Channel, compression: grpc.Compression
) -> None:
    before = rejects(server, "unread")
    request = packed(raw_input_contents=[bytes(MAX_BODY + 1)])

    code, _ = rejection(lambda: ask(channel, request, compression=compression))

    assert code == "RESOURCE_EXHAUSTED"
    assert ask(channel, packed()).model_name == MODEL
    until(lambda: rejects(server, "unread") == before + 1)


def test_the_largest_request_fits(channel: grpc.Channel) -> None:
    images = {"name": "image", "datatype": "FP32", "shape": [MAX_ROWS, 784]}

    answer = ask(channel, packed(inputs=[images], raw_input_contents=[NOISE.tobytes()]))

    assert [*answer.outputs[0].shape] == [MAX_ROWS, 10]


# --- who may ask, and what is seen ------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "Bearer another-token-of-tests", TOKEN, "Bearer"])
def test_only_health_checks_need_no_token(channel: grpc.Channel, given: str | None) -> None:
    metadata = [("authorization", given)] if given else []
    for name in SERVICE.methods_by_name:
        call = channel.stream_stream(f"/{SERVICE.full_name}/{name}")
        answers = call(iter((b"",)), metadata=metadata, timeout=WAIT)
        if name in ("ServerLive", "ServerReady"):
            assert len(list(answers)) == 1
        else:
            code, _ = rejection(lambda answers=answers: list(answers))  # type: ignore[misc]
            assert code == "UNAUTHENTICATED", name


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda c: c.load_model("another", headers=AUTH), "no model 'another' here"),
        (lambda c: c.unload_model("another", headers=AUTH), "no model 'another' here"),
        (
            lambda c: c.load_model(MODEL, headers=AUTH, config="{}"),
            "parameters: got config",
        ),
        (
            lambda c: c.get_model_metadata("another", headers=AUTH),
            "no model 'another' here",
        ),
        (lambda c: c.get_model_config("another", headers=AUTH), "no model 'another' here"),
        (
            lambda c: c.get_inference_statistics("another", headers=AUTH),
            "no model 'another'",
        ),
    ],
)
def test_other_calls_report_what_is_wrong(
    client: triton.InferenceServerClient, call: Caller, why: str
) -> None:
    with pytest.raises(InferenceServerException, match=why) as refused:
        call(client)
    assert refused.value.status() in {"StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT"}


def test_no_other_repository(channel: grpc.Channel) -> None:
    request = service_pb2.RepositoryIndexRequest(repository_name="x").SerializeToString()
    index = channel.unary_unary(f"/{SERVICE.full_name}/RepositoryIndex")

    code, says = rejection(lambda: index(request, metadata=METADATA, timeout=WAIT))

    assert (code, says.split(":")[0]) == ("INVALID_ARGUMENT", "repository_name")


def test_a_call_can_be_found_in_the_log(server: Server, channel: grpc.Channel) -> None:
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    traced = [*METADATA, ("x-request-id", "mine"), ("traceparent", parent)]
    _, call = channel.unary_unary(INFER).with_call(packed(), metadata=traced, timeout=WAIT)
    refused = [*METADATA, ("x-request-id", "mine-too")]
    rejection(lambda: ask(channel, packed(model_name="x"), metadata=refused))

    came = dict(call.trailing_metadata())
    assert (came["x-request-id"], came["traceparent"]) == ("mine", parent)
    (line,) = [line for line in server.events("infer") if line.get("request_id") == "mine"]
    assert (line["model"], line["rows"], line["traceparent"]) == (MODEL, 1, parent)
    (line,) = [line for line in server.events("rejected") if line.get("request_id") == "mine-too"]
    assert (line["code"], line["reason"], line["call"]) == ("NOT_FOUND", "model", "ModelInfer")


def test_rejections_are_counted(server: Server, channel: grpc.Channel) -> None:
    before = rejects(server, "shape")
    rejection(
        lambda: ask(channel, packed(inputs=[{"name": "image", "datatype": "FP32", "shape": [784]}]))
    )

    assert rejects(server, "shape") == before + 1


def test_the_log_never_holds_the_token(server: Server) -> None:
    assert TOKEN not in json.dumps(server.log())


# --- load, and the end ------------------------------------------------------------------------


def test_a_full_queue_rejects_calls_and_slow_clients_hold_no_place(folder: Path) -> None:
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


@pytest.fixture(scope="module")
def unproven(folder: Path) -> Iterator[Server]:
    """A server of unproven models without a token that does not wait for slow messages."""
    options = ("--allow-unverified", "--parity", "absent.json", "--body-timeout", "0.3")
    with running("--grpc-port", "0", *options, folder=folder) as server:
        yield server


def test_a_slow_message_is_rejected(unproven: Server) -> None:
    release = threading.Event()
    with grpc.insecure_channel(address(unproven)) as channel:
        code, details = rejection(lambda: list(halfway(channel, release)))
        release.set()

    assert (code, details) == ("DEADLINE_EXCEEDED", "the message: not all here after 0.3 s")
    assert rejects(unproven, "slow") == 1


def test_an_unproven_model_is_reported_and_control_needs_a_token(unproven: Server) -> None:
    with triton.InferenceServerClient(address(unproven)) as client:
        parameters = client.get_model_config(MODEL).config.parameters
        with pytest.raises(InferenceServerException, match="need a token") as refused:
            client.load_model(MODEL)

    assert parameters["verified"].string_value == "false"
    assert "absent.json" in parameters["unverified_because"].string_value
    assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def test_a_client_that_reads_no_answers_holds_no_place(folder: Path, tmp_path: Path) -> None:
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
        inference = InferenceService(catalog, settings, metrics)
        control = Control(catalog, SharedState(tmp_path), 0.0)
        server = GrpcServer(GrpcService(inference, control, lambda: False))
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

    settings = Settings(grpc_port=0, write_timeout=0.3, state=tmp_path)
    with reserve_grpc_port(settings) as settings:
        asyncio.run(serve(settings))


@pytest.fixture
def service(folder: Path, tmp_path: Path) -> GrpcService:
    """A service in this process, with a queue of one."""
    metrics = Metrics()
    source = FileSource(MODEL, folder / "models/bn.onnx", folder / "reports/parity.json", True)
    catalog = Catalog([source], metrics)
    catalog.load()

    settings = Settings(queue=1, state=tmp_path)
    inference = InferenceService(catalog, settings, metrics)
    return GrpcService(inference, Control(catalog, SharedState(tmp_path), 0.0), lambda: False)


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

    def answered_by(self, service: GrpcService, path: str) -> None:
        """Have a call answered."""
        details = SimpleNamespace(method=path)
        asyncio.run(service.service(details).stream_stream(None, self))


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_a_message_is_released_before_its_answer_is_sent(service: GrpcService, path: str) -> None:
    context = Context(packed())
    context.answered_by(service, path)

    assert context.kept == [0]


def test_a_streamed_request_is_rejected_while_the_queue_is_full(service: GrpcService) -> None:
    context = Context(packed(id="1"), packed(id="2"), packed(id="3"))

    def fill_for_the_second() -> None:
        service.inference.open_calls = int(len(context.given) == 2)

    context.on_read = fill_for_the_second
    context.answered_by(service, STREAM)

    answers = [service_pb2.ModelStreamInferResponse.FromString(one) for one in context.answers]
    assert [one.infer_response.id for one in answers] == ["1", "2", "3"]
    assert [one.error_message for one in answers] == ["", "the server is busy, try again", ""]
    assert service.inference.open_calls == 0
