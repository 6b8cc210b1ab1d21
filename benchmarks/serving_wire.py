"""Requests and answers as the servers of benchmarks/serving.py speak them.

JSON holds each pixel / 255 as the shortest decimal that is that float32 again, as people write it
(`0.003921569`); the answers' logits are compared with ONNX Runtime's as float32.
"""

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

JSON, BINARY = "JSON", "binary"  # the forms of a tensor
# Of a row's largest logit. Rounding differs by 1e-6 at most between versions of ONNX Runtime.
TOLERANCE = 1e-5
TIMEOUT = 60.0  # seconds for one answer that is checked

HEADER_LENGTH = "Inference-Header-Content-Length"


class AnswerError(Exception):
    """An answer that is not the one expected; says how."""


class RefusalError(AnswerError):
    """An answer that is not 200, as from a server that has not loaded its model yet."""


@dataclass(frozen=True)
class Request:
    """A POST.

    Attributes:
        path: with the leading slash.
        headers: beside Host and Content-Length.
        body: its bytes.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What came back for one.

    Attributes:
        status: of HTTP.
        headers: with names in lower case.
        body: its bytes.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Dialect(Protocol):
    """How a server is asked, and how its answers are read."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Return the forms that it has, the most usual first."""
        ...

    def request(self, images: Float32, logits: Float32, form: str) -> Request:
        """Return the request for images, float32 ``[n, 784]``, whose logits are known."""
        ...

    def check(self, answer: Answer, logits: Float32, form: str) -> None:
        """Compare a 200 with what it should say.

        Raises:
            AnswerError: It says something else.
        """
        ...


# --- tensors as JSON ------------------------------------------------------------------------------


def numbers(values: Float32) -> str:
    """Write a vector as a JSON array."""
    return f"[{','.join(map(str, values))}]"


def rows(values: Float32) -> str:
    """Write a matrix as a JSON array of arrays."""
    return f"[{','.join(map(numbers, values))}]"


def compare(got: npt.ArrayLike, expected: Float32) -> None:
    """Compare logits.

    Raises:
        AnswerError: Their shapes differ, or a logit by more than `TOLERANCE` of its row's largest.
    """
    try:
        array = np.asarray(got, np.float32)
    except (TypeError, ValueError) as error:
        raise AnswerError(f"its logits are not numbers: {error}") from None
    if array.shape != expected.shape:
        raise AnswerError(f"its logits have shape {array.shape}, expected {expected.shape}")
    off = np.abs(array - expected) / np.abs(expected).max(axis=1, keepdims=True)
    worst = float(off.max())
    if not worst <= TOLERANCE:  # NaN too
        raise AnswerError(
            f"its logits are off by {worst:.1e} of the largest, expected at most {TOLERANCE:.0e}"
        )


# --- dialects -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenInference:
    """The Open Inference Protocol; ``binary`` is its extension for raw tensors, both ways.

    Attributes:
        model: its name.
        forms: that the server knows.
    """

    model: str
    forms: tuple[str, ...] = (JSON, BINARY)

    def request(self, images: Float32, logits: Float32, form: str) -> Request:
        """See `Dialect`."""
        path = f"/v2/models/{self.model}/infer"
        head = f'{{"inputs":[{{"name":"image","shape":[{len(images)},784],"datatype":"FP32",'
        if form == JSON:
            body = f'{head}"data":{numbers(images.ravel())}}}]}}'
            return Request(path, {"Content-Type": "application/json"}, body.encode())
        raw = images.astype("<f4", copy=False).tobytes()
        text = (
            f'{head}"parameters":{{"binary_data_size":{len(raw)}}}}}],'
            '"parameters":{"binary_data_output":true}}'
        ).encode()
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
        return Request(path, headers, text + raw)

    def check(self, answer: Answer, logits: Float32, form: str) -> None:
        """See `Dialect`."""
        length = answer.headers.get(HEADER_LENGTH.lower())
        if (form == BINARY) != (length is not None):
            raise AnswerError(f"a {form} tensor was asked for and another form came back")
        text = answer.body[: int(length)] if length else answer.body
        (output,) = json.loads(text)["outputs"]
        if output["name"] != "logits" or output["datatype"] != "FP32":
            raise AnswerError(f"it answers {output['name']}, {output['datatype']}")
        data = np.frombuffer(answer.body[len(text) :], "<f4") if length else output["data"]
        compare(np.asarray(data).reshape(output["shape"]), logits)


@dataclass(frozen=True)
class MlflowScoring:
    """MLflow's scoring protocol, with a tensor in ``inputs``."""

    forms: tuple[str, ...] = (JSON,)

    def request(self, images: Float32, logits: Float32, form: str) -> Request:
        """See `Dialect`."""
        body = f'{{"inputs":{rows(images)}}}'.encode()
        return Request("/invocations", {"Content-Type": "application/json"}, body)

    def check(self, answer: Answer, logits: Float32, form: str) -> None:
        """See `Dialect`."""
        compare(json.loads(answer.body)["predictions"]["logits"], logits)


@dataclass(frozen=True)
class OwnModels:
    """What benchmarks/serving_rivals/fastapi_app.py declares with pydantic."""

    forms: tuple[str, ...] = (JSON,)

    def request(self, images: Float32, logits: Float32, form: str) -> Request:
        """See `Dialect`."""
        body = f'{{"images":{rows(images)}}}'.encode()
        return Request("/predict", {"Content-Type": "application/json"}, body)

    def check(self, answer: Answer, logits: Float32, form: str) -> None:
        """See `Dialect`."""
        compare(json.loads(answer.body)["logits"], logits)


@dataclass(frozen=True)
class SameSize:
    """The null handler's: a protocol's requests, and answers of nothing, as large as its own.

    Attributes:
        like: the protocol.
    """

    like: OpenInference

    @property
    def forms(self) -> tuple[str, ...]:
        """Those of the protocol."""
        return self.like.forms

    def request(self, images: Float32, logits: Float32, form: str) -> Request:
        """See `Dialect`."""
        asked = self.like.request(images, logits, form)
        return Request(f"/{answer_size(self.like.model, logits, form)}", asked.headers, asked.body)

    def check(self, answer: Answer, logits: Float32, form: str) -> None:
        """See `Dialect`."""
        expected = answer_size(self.like.model, logits, form)
        if len(answer.body) != expected or not isinstance(json.loads(answer.body), str):
            raise AnswerError(f"it has {len(answer.body)} bytes, expected a string of {expected}")


def answer_size(model: str, logits: Float32, form: str) -> int:
    """Return the bytes of the Open Inference Protocol's answer."""
    head = (
        f'{{"model_name":"{model}","model_version":"1","outputs":[{{"name":"logits",'
        f'"datatype":"FP32","shape":[{len(logits)},10],'
    )
    if form == JSON:
        return len(f'{head}"data":{numbers(logits.ravel())}}}]}}')
    return len(f'{head}"parameters":{{"binary_data_size":{logits.nbytes}}}}}]}}') + logits.nbytes


# --- asking once ----------------------------------------------------------------------------------


def ask(port: int, request: Request) -> Answer:
    """Send one request to this machine.

    Raises:
        OSError: Nobody listens, or not any more.
        http.client.HTTPException: The answer is not HTTP.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
    finally:
        connection.close()


def check(port: int, dialect: Dialect, images: Float32, logits: Float32, form: str) -> None:
    """Ask a server for the logits of images and compare them with ONNX Runtime's.

    Raises:
        RefusalError: The answer is not 200.
        AnswerError: It is not of the dialect, or has other logits.
        OSError: Nobody listens, or not any more.
        http.client.HTTPException: The answer is not HTTP.
    """
    answer = ask(port, dialect.request(images, logits, form))
    if answer.status != 200:
        told = answer.body[:200].decode(errors="replace")
        raise RefusalError(f"it answers {answer.status}: {told}")
    try:
        dialect.check(answer, logits, form)
    except (KeyError, TypeError, ValueError) as error:
        raise AnswerError(f"its answer is not understood: {error!r}") from None
