"""The server as `tritonclient`, the protocol's most used client, sees it."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from mnist_batchnorm.artifacts.splits import network_input
from mnist_batchnorm.parity import runtime
from tests.support import serving
from tests.support.serving import Server, network

TOKEN = "0123456789abcdef0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
MODEL = "mnist-bn"
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
FLOATS = network_input(IMAGES)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton") / "project"
    serving.lay(folder)
    with serving.running(folder=folder, env={"MNIST_BN_TOKEN": TOKEN}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return runtime.load(network().graph(folded=False)).run(FLOATS)


@pytest.fixture(scope="module")
def version(client: Any) -> str:
    (version,) = client.get_model_metadata(MODEL, headers=dict(BEARER))["versions"]
    return str(version)


def image(content: np.ndarray = FLOATS, *, binary: bool = True) -> Any:
    """An input."""
    datatype = {"float32": "FP32", "uint8": "UINT8"}[content.dtype.name]
    given = triton.InferInput("image", list(content.shape), datatype)
    given.set_data_from_numpy(content, binary_data=binary)
    return given


def headers() -> dict[str, str]:
    """New ones: the client writes into what it is given."""
    return dict(BEARER)


# --- inference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("binary_output", [True, False, None])
@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize(
    "content",
    [FLOATS, IMAGES, IMAGES.reshape(5, 784), FLOATS[:1], FLOATS[:0]],
    ids=["FP32", "UINT8 in rows", "UINT8", "one", "none"],
)
def test_logits_are_onnx_runtimes_bit_for_bit(
    client: Any,
    logits: np.ndarray,
    content: np.ndarray,
    binary_input: bool,
    binary_output: bool | None,
) -> None:
    outputs = None
    if binary_output is not None:
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary_output)]
    inputs = [image(content, binary=binary_input)]
    result = client.infer(MODEL, inputs, outputs=outputs, headers=headers())
    given = result.as_numpy("logits")
    expected = runtime.load(network().graph(folded=False)).run(FLOATS[: len(content)])
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_requests_may_be_compressed_and_answers_are_not(
    client: Any, logits: np.ndarray, compression: str, binary: bool
) -> None:
    result = client.infer(
        MODEL,
        [image(binary=binary)],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
        headers=headers(),
    )
    np.testing.assert_array_equal(result.as_numpy("logits"), logits)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [1, 3, 10, 99])
def test_classification_ranks_the_logits(
    client: Any, logits: np.ndarray, count: int, binary: bool
) -> None:
    output = triton.InferRequestedOutput("logits", binary_data=binary, class_count=count)
    ranked = client.infer(MODEL, [image()], outputs=[output], headers=headers()).as_numpy("logits")
    count = min(count, 10)
    assert ranked.shape == (5, count)
    for row, entries in zip(logits, ranked, strict=True):
        texts = [entry.decode() if isinstance(entry, bytes) else entry for entry in entries]
        values, classes = zip(*(text.split(":") for text in texts), strict=True)
        order = np.argsort(-row, kind="stable")[:count]
        assert [int(number) for number in classes] == order.tolist()
        np.testing.assert_array_equal(np.array(values, np.float32), row[order])


def test_id_version_and_parameters_come_back(client: Any, version: str) -> None:
    result = client.infer(
        MODEL,
        [image()],
        model_version=version,
        request_id="a/ü/1",
        priority=1,
        timeout=1000,
        parameters={"text": "é", "number": 2, "share": 0.5, "yes": True},
        headers=headers(),
    ).get_response()
    own = {"priority": 1, "timeout": 1000, "text": "é", "number": 2, "share": 0.5, "yes": True}
    assert (result["id"], result["model_name"], result["model_version"]) == (
        "a/ü/1",
        MODEL,
        version,
    )
    assert result["parameters"] == own


def test_many_requests_at_once(server: Server, logits: np.ndarray) -> None:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=4) as client:
        asked = [client.async_infer(MODEL, [image()], headers=headers()) for _ in range(20)]
        for one in asked:
            np.testing.assert_array_equal(one.get_result().as_numpy("logits"), logits)


def test_a_request_body_made_without_the_client_and_an_answer_read_without(server: Server) -> None:
    body, json_size = triton.InferenceServerClient.generate_request_body([image()])
    assert json_size < len(body)
    answer = b'{"outputs":[{"name":"logits","datatype":"FP32","shape":[1],"data":[0.5]}]}'
    assert triton.InferenceServerClient.parse_response_body(answer).as_numpy("logits") == [0.5]


def two_inputs() -> list[Any]:
    return [image(), image()]


def shared_input() -> list[Any]:
    given = triton.InferInput("image", [1, 784], "FP32")
    given.set_shared_memory("region", 3136)
    return [given]


def half_input() -> list[Any]:
    given = triton.InferInput("image", [1, 784], "FP16")
    given.set_data_from_numpy(np.zeros((1, 784), np.float16))
    return [given]


def nan_input() -> list[Any]:
    return [image(np.full((1, 784), np.nan, np.float32))]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (two_inputs, "inputs: got 2 tensors, expected a list of one tensor, 'image'"),
        (shared_input, "got shared_memory_region, expected the tensor itself"),
        (half_input, "inputs[0].datatype: got FP16, expected FP32 or UINT8"),
        (nan_input, "image 0, pixel 0: got nan, expected a finite FP32"),
        (lambda: [image(np.zeros((1, 783), np.float32))], "inputs[0].shape: got [1, 783]"),
    ],
)
def test_a_wrong_input_is_an_exception_that_says_why(
    client: Any, inputs: Callable[[], list[Any]], says: str
) -> None:
    with pytest.raises(InferenceServerException) as error:
        client.infer(MODEL, inputs(), headers=headers())
    assert says in error.value.message()
    assert error.value.status() == "400"


def test_an_answer_in_shared_memory_is_refused(client: Any) -> None:
    output = triton.InferRequestedOutput("logits")
    output.set_shared_memory("region", 40)
    with pytest.raises(InferenceServerException, match="expected an answer in the body"):
        client.infer(MODEL, [image()], outputs=[output], headers=headers())


def test_without_token_nothing_is_inferred(client: Any) -> None:
    for wrong in (None, {"Authorization": "Bearer no"}):
        with pytest.raises(InferenceServerException, match="this server's token") as error:
            client.infer(MODEL, [image()], headers=wrong)
        assert error.value.status() == "401"


# --- what the server tells of itself --------------------------------------------------------------


def test_it_is_live_and_ready_also_without_token(client: Any, version: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, headers=headers())
    assert client.is_model_ready(MODEL, version, headers=headers())
    assert not client.is_model_ready(MODEL, "nope", headers=headers())
    assert not client.is_model_ready("nope", headers=headers())


def test_server_metadata(client: Any) -> None:
    about = client.get_server_metadata(headers=headers())
    assert about["name"] == "mnist-batchnorm"
    assert {"model_configuration", "parameters"} <= set(about["extensions"])


def test_model_metadata(client: Any, version: str) -> None:
    about = client.get_model_metadata(MODEL, version, headers=headers())
    assert about["name"] == MODEL
    assert about["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 784]}]
    assert about["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    with pytest.raises(InferenceServerException, match="no model 'nope' here"):
        client.get_model_metadata("nope", headers=headers())


@pytest.mark.parametrize("named", [True, False])
def test_model_configuration(client: Any, version: str, named: bool) -> None:
    config = client.get_model_config(MODEL, version if named else "", headers=headers())
    told = {name: one["string_value"] for name, one in config.pop("parameters").items()}
    assert (told["version"], told["verified"]) == (version, "true")
    assert config.pop("instance_group") == [{"kind": "KIND_CPU", "count": 1}]
    assert config == {
        "name": MODEL,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 10_000,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [784]}],
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": [10]}],
    }
    with pytest.raises(InferenceServerException, match="no model 'nope' here"):
        client.get_model_config("nope", headers=headers())


def test_statistics_count_what_was_asked(client: Any, version: str) -> None:
    def counts(model: str, chosen: str = "") -> tuple[int, int]:
        told = client.get_inference_statistics(model, chosen, headers=headers())
        (row,) = (row for row in told["model_stats"] if row["name"] == model)
        return row["inference_count"], row["execution_count"]

    before = counts("mnist-bn-folded")
    client.infer("mnist-bn-folded", [image()], headers=headers())
    assert counts("mnist-bn-folded") == (before[0] + 5, before[1] + 1)
    assert counts(MODEL, version) == counts(MODEL)
    everything = client.get_inference_statistics(headers=headers())["model_stats"]
    assert {MODEL, "mnist-bn-folded"} <= {row["name"] for row in everything}


# --- the repository -------------------------------------------------------------------------------


def test_a_model_is_unloaded_and_loaded(client: Any, logits: np.ndarray) -> None:
    def states() -> dict[str, str]:
        index = client.get_model_repository_index(headers=headers())
        return {row["name"]: row["state"] for row in index}

    assert set(states().values()) == {"READY"}
    client.unload_model(MODEL, headers=headers(), unload_dependents=True)
    assert states()[MODEL] == "UNAVAILABLE"
    assert not client.is_model_ready(MODEL, headers=headers())
    with pytest.raises(InferenceServerException, match="no model 'mnist-bn' here"):
        client.infer(MODEL, [image()], headers=headers())
    client.load_model(MODEL, headers=headers())
    assert states()[MODEL] == "READY"
    given = client.infer(MODEL, [image()], headers=headers()).as_numpy("logits")
    np.testing.assert_array_equal(given, logits)


def test_no_model_comes_over_the_network(client: Any) -> None:
    config = json.dumps({"backend": "onnxruntime"})
    with pytest.raises(InferenceServerException, match="models come from the command line"):
        client.load_model(MODEL, headers=headers(), config=config)
    with pytest.raises(InferenceServerException, match="no model 'other' here"):
        client.load_model("other", headers=headers())
    assert client.is_model_ready(MODEL, headers=headers())


UNSUPPORTED: dict[str, Callable[[Any], object]] = {
    "get_trace_settings": lambda client: client.get_trace_settings(headers=headers()),
    "get_trace_settings of a model": lambda c: c.get_trace_settings(MODEL, headers=headers()),
    "update_trace_settings": lambda client: client.update_trace_settings(headers=headers()),
    "get_log_settings": lambda client: client.get_log_settings(headers=headers()),
    "update_log_settings": lambda client: client.update_log_settings({}, headers=headers()),
    "get_system_shared_memory_status": lambda client: client.get_system_shared_memory_status(
        headers=headers()
    ),
    "register_system_shared_memory": lambda client: client.register_system_shared_memory(
        "a", "/a", 1, headers=headers()
    ),
    "unregister_system_shared_memory": lambda client: client.unregister_system_shared_memory(
        headers=headers()
    ),
    "get_cuda_shared_memory_status": lambda client: client.get_cuda_shared_memory_status(
        headers=headers()
    ),
    "register_cuda_shared_memory": lambda client: client.register_cuda_shared_memory(
        "a", base64.b64encode(b"a"), 0, 1, headers=headers()
    ),
    "unregister_cuda_shared_memory": lambda client: client.unregister_cuda_shared_memory(
        headers=headers()
    ),
}


@pytest.mark.parametrize("call", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_an_exception(client: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(InferenceServerException, match="no such path") as error:
        call(client)
    assert error.value.status() == "404"


def test_every_call_of_the_client_is_tested() -> None:
    calls = {name for name in vars(triton.InferenceServerClient) if not name.startswith("_")}
    text = Path(__file__).read_text()
    assert [name for name in sorted(calls - {"close"}) if f"{name}(" not in text] == []
