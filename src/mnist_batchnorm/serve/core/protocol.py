"""What the Open Inference Protocol, version 2, calls things, and what this server takes and gives.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol and Triton's
extensions to it, https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mnist_batchnorm.artifacts.splits import SIDE

Float32 = npt.NDArray[np.float32]

INPUT, OUTPUT = "image", "logits"
PIXELS = SIDE * SIDE
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
HEADER_LENGTH = b"inference-header-content-length"

# Datatype of the input -> bytes of an element, and the shapes after the batch axis.
BYTES_OF = {"FP32": 4, "UINT8": 1}
SHAPES_OF: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "FP32": ((PIXELS,),),
    "UINT8": ((PIXELS,), (SIDE, SIDE)),
}
LONGEST = 80  # characters of a value that an error repeats

_brief = Repr()  # of a value that may be large, or lists in lists without end
_brief.maxstring = _brief.maxlong = _brief.maxother = LONGEST


class RequestError(Exception):
    """A request that is not answered; the message names the field, what it held, what it should.

    Attributes:
        status: of HTTP, 4xx or 503.
        reason: a word for the metrics.
        unread: whether the client may still be sending the body.
        headers: that its answer needs.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        reason: str = "malformed",
        *,
        unread: bool = False,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.unread = unread
        self.headers = headers


@dataclass(slots=True)
class InferRequest:
    """A request to compute.

    Attributes:
        images: float32 ``[n, 784]``, as the network takes them.
        id: that the answer repeats.
        parameters: that the answer repeats.
        binary: whether the output goes out as raw bytes.
        classes: the so many largest logits with their classes, instead of all logits; 0: all.
    """

    images: Float32
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    binary: bool = False
    classes: int = 0


def refuse(
    where: str, got: object, expected: object, reason: str = "malformed", status: int = 400
) -> NoReturn:
    """Refuse a request for one field.

    Raises:
        RequestError: Always.
    """
    told = "nothing" if got is None else got if isinstance(got, str) else _brief.repr(got)
    short = told if len(told) <= LONGEST else f"{told[: LONGEST - 1]}…"
    raise RequestError(f"{where}: got {short}, expected {expected}", status, reason)


def busy(message: str, *, unread: bool = False) -> RequestError:
    """Return a refusal of what may well be answered a second later."""
    return RequestError(message, 503, "busy", unread=unread, headers=[(b"retry-after", b"1")])


def unauthorized() -> RequestError:
    """Return the refusal of a request that does not bear the token."""
    message = "Authorization: got no or another token, expected Bearer and this server's token"
    return RequestError(message, 401, "token", headers=[(b"www-authenticate", b"Bearer")])
