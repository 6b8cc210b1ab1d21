"""Inference for every transport: authentication, queue limit, trace, execution, accounting, errors.

A transport decodes requests, encodes answers and maps errors to its status codes. It passes the
headers of a request (gRPC: the metadata) as a dictionary with lower-case names.
"""

import asyncio
import hmac
import itertools
import re
import secrets
from collections.abc import Callable
from time import perf_counter
from traceback import format_exc
from typing import Any, TypeVar

from mnist_batchnorm.parity.runtime import RuntimeFailedError
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.log import RateLimitedLog, log
from mnist_batchnorm.serve.core.metrics import Meters, Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import (
    Float32,
    InferRequest,
    RequestError,
    queue_full,
    unavailable,
)
from mnist_batchnorm.serve.core.settings import Settings

Headers = dict[bytes, bytes]
ServedModel = tuple[Model, Meters]
Encoded = TypeVar("Encoded")

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # visible ASCII
# W3C Trace Context, level 1: version ff and ids of zeros are invalid
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


class InferenceService:
    """Runs models and accounts for requests.

    Attributes:
        open_calls: gRPC calls that are not answered yet.
        id_prefix: start of the request ids that this process generates.
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self.catalog = catalog
        self.settings = settings
        self.metrics = metrics
        self.open_calls = 0
        self.id_prefix = secrets.token_hex(6)
        self._id_prefix = self.id_prefix.encode()
        self._ids = itertools.count()
        self._token = settings.token.encode() if settings.token else None
        self._busy_log = RateLimitedLog("busy")

    def is_authenticated(self, headers: Headers) -> bool:
        """Whether a request may be answered; compares the token in constant time."""
        if self._token is None:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)

    def authenticate(self, headers: Headers) -> None:
        if not self.is_authenticated(headers):
            why = "Authorization: got no or another token, expected Bearer and this server's token"
            challenge = [(b"www-authenticate", b"Bearer")]
            raise RequestError(why, 401, "token", headers=challenge)

    def authorize_control(self, headers: Headers) -> None:
        """Raise RequestError unless the request may load and unload models: only with a token."""
        if self._token is None:
            why = "loading and unloading need a token: start the server with --token-file"
            raise RequestError(why, 403, "token")
        self.authenticate(headers)

    def check_queue(self, waiting: int) -> None:
        """Raise RequestError if more requests wait than the queue holds."""
        if waiting > self.settings.queue:
            raise queue_full()

    def trace(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Return the response headers that identify a request.

        Generates the request id in `headers` if it is unusable; deletes an invalid traceparent.
        """
        request_id = headers.get(b"x-request-id")
        if request_id is None or not REQUEST_ID.fullmatch(request_id):
            request_id = headers[b"x-request-id"] = b"%b-%x" % (self._id_prefix, next(self._ids))
        fields = [(b"x-request-id", request_id)]
        parent = headers.get(b"traceparent")
        if parent is not None:
            if TRACEPARENT.fullmatch(parent):
                fields.append((b"traceparent", parent))
            else:
                del headers[b"traceparent"]
        return fields

    def infer(
        self,
        served: ServedModel,
        headers: Headers,
        began: float,
        decode: Callable[..., InferRequest],
        content: tuple[object, ...],
        encode: Callable[[InferRequest, Float32, Model], Encoded],
        **log_fields: Any,
    ) -> Encoded:
        """Decode a request, run its model and encode the answer; raises RequestError.

        Records the time of each stage, since `began` by `time.perf_counter`; the caller flushes the
        meters. `decode` gets the content and the server's limits. `headers`, after `trace`, and
        `log_fields` are for the access log.
        """
        model, meters = served
        request = decode(*content, self.settings.limits)
        decoded = perf_counter()
        try:
            logits = model.run(request.images)
        except RuntimeFailedError as error:
            log("failed", "error", model=model.name, why=str(error))
            raise RequestError(f"the model does not run: {error}", 500, "runtime") from None
        ran = perf_counter()
        answer = encode(request, logits, model)
        encoded = perf_counter()
        meters.pending.append((len(logits), began, decoded, ran, encoded))
        if self.settings.access_log:
            log(
                "infer",
                **log_fields,
                model=model.name,
                version=model.version,
                rows=len(logits),
                seconds=round(encoded - began, 6),
                **trace_fields(headers),
            )
        return answer

    def explain(self, error: BaseException, model: str) -> RequestError:
        """Return the error to report to the client; log the details of an unexpected one."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, asyncio.CancelledError):  # the time to drain is over
            return unavailable("the server stops")
        log("failed", "error", model=model, why=repr(error), traceback=format_exc())
        return RequestError("the server failed; its log says how", 500, "bug", unread=True)

    def reject(self, error: RequestError, model: str, headers: Headers, **log_fields: Any) -> str:
        """Count and log a rejected request; return the message for the client, valid UTF-8."""
        # a file's name in the message may hold surrogates
        why = str(error).encode(errors="backslashreplace").decode()
        self.metrics.rejected(error.reason, model)
        fields = {"why": why, "model": model, **trace_fields(headers)}
        if error.reason == "busy":  # an overloaded server has no time for a line per request
            self._busy_log.log(**log_fields, **fields)
        else:
            log("rejected", **log_fields, reason=error.reason, **fields)
        return why


def trace_fields(headers: Headers) -> dict[str, str]:
    """Return the fields by which a log line identifies its request."""
    fields = {
        "request_id": headers.get(b"x-request-id"),
        "traceparent": headers.get(b"traceparent"),
    }
    return {name: value.decode() for name, value in fields.items() if value}
