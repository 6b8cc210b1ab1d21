"""Terms of the Open Inference Protocol, version 2, and the tensors of this server.

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
MAX_QUOTED_CHARS = 80  # of a value that an error repeats

_brief = Repr()  # the value may be large or deeply nested
_brief.maxstring = _brief.maxlong = _brief.maxother = MAX_QUOTED_CHARS


class RequestError(Exception):
    """A rejected request; the message names the field, its value and what was expected.

    Attributes:
        status: of HTTP.
        reason: label of the metrics.
        unread: whether the client may still be sending the body.
        headers: for the response.
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
    """A decoded inference request."""

    images: Float32  # [n, 784], the network's input
    id: str | None = None  # repeated in the answer, as are the parameters
    parameters: Mapping[str, Any] = field(default_factory=dict)
    binary: bool = False  # whether the output is sent as raw bytes
    classes: int = 0  # largest logits to return with their classes; 0: all logits, unranked


def refuse(
    where: str, got: object, expected: object, reason: str = "malformed", status: int = 400
) -> NoReturn:
    """Raise RequestError for the value of one field."""
    text = "nothing" if got is None else got if isinstance(got, str) else _brief.repr(got)
    short = text if len(text) <= MAX_QUOTED_CHARS else f"{text[: MAX_QUOTED_CHARS - 1]}…"
    raise RequestError(f"{where}: got {short}, expected {expected}", status, reason)


def unavailable(message: str, *, unread: bool = False) -> RequestError:
    """Return the error of a request that the client may retry after a second."""
    return RequestError(message, 503, "busy", unread=unread, headers=[(b"retry-after", b"1")])


def queue_full() -> RequestError:
    """Return the error of a request for which the queue has no place."""
    return unavailable("the server is busy, try again")
