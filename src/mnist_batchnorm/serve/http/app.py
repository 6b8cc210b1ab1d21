"""The ASGI application: inference by the shortest way, everything else by Starlette."""

import asyncio
import hmac
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from traceback import format_exc
from typing import TYPE_CHECKING, Any

import orjson

from mnist_batchnorm.parity.runtime import RuntimeFailedError
from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.decode import decode
from mnist_batchnorm.serve.core.encode import encode
from mnist_batchnorm.serve.core.log import Sparse, log
from mnist_batchnorm.serve.core.metrics import Meters, Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import (
    HEADER_LENGTH,
    LONGEST,
    RequestError,
    busy,
    unauthorized,
)
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.body import (
    ClientGoneError,
    Held,
    Message,
    Receive,
    Room,
    discard_body,
    length_of,
    pick,
    read_body,
    unpacked,
)
from mnist_batchnorm.serve.http.origin_policy import Site

if TYPE_CHECKING:
    from mnist_batchnorm.serve.http.direct import Direct

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]
Served = tuple[Model, Meters]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
# Free of the token: a probe has none, and a browser shows a page before anybody can give it one.
OPEN_PATHS = frozenset(("/", "/docs", "/openapi.json"))
HEALTH = "/v2/health/"
OPEN_FOLDERS = (HEALTH, "/static/")
REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # visible ASCII
# W3C, level 1: neither version ff nor an id of zeros is valid
TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


class App:
    """What answers requests.

    Args:
        catalog: the models.
        settings: how to serve.
        metrics: what is counted.
        cold: the application for everything but inference.

    Attributes:
        by_target: the path of a request for inference, in UTF-8 -> what it asks.
        ready: connections whose request is all here and has a task that has not answered it yet.
        calls: over gRPC that are not answered yet.
        room: for bodies.
        process: which the ids that it gives to requests begin with.
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics, cold: ASGI) -> None:
        self.catalog = catalog
        self.settings = settings
        self.metrics = metrics
        self.cold = cold
        self.by_target: dict[bytes, Served] = {}
        self.ready: set[object] = set()
        self.calls = 0
        self._token = settings.token.encode() if settings.token else None
        self._site = Site(settings)
        self.room = Room(settings.max_bodies)
        self._ids = itertools.count()
        self._busy = Sparse("busy")
        self.process = secrets.token_hex(6)
        catalog.on_publish = self._list_targets
        self._list_targets()

    def _list_targets(self) -> None:
        targets: dict[bytes, Served] = {}
        for model in self.catalog:
            served = (model, self.metrics.of(model.name, model.version))
            path = f"/v2/models/{model.name}"
            targets.setdefault(f"{path}/infer".encode(), served)
            targets[f"{path}/versions/{model.version}/infer".encode()] = served
        self.by_target = targets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        began = perf_counter()
        head = pick(scope["headers"])
        served = self.by_target.get(scope["path"].encode())
        model = served[0].name if served else ""
        try:
            if served or not scope["path"].startswith(HEALTH):
                self._site.check(head, scope["method"], scope["http_version"])
            if self._token is not None and not self._allowed(scope["path"], head):
                raise unauthorized()
            if served is None or scope["method"] != "POST":
                await self._answer_cold(scope, head, receive, send)
                return
            try:
                self._check_queue()
                with Held(self.room, receive) as held:
                    body = await read_body(head, held, self.settings)
                    self._check_queue()  # others may have come while this one was on its way
                    status, headers, content = self._infer(served, head, body)
                    del body  # the answer may take long to be sent
            except BaseException:
                served[1].failed(perf_counter() - began)
                raise
            served[1].count()
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": content})
        except ClientGoneError:
            self.metrics.rejected("gone", model)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is logged
            refusal = self._explain(error, model)
            forget_frames(error)
            await self._refuse(refusal, model, head, receive, send)

    def takes(self, head: dict[bytes, bytes], version: str) -> bool:
        """Tell whether all of a request for inference may come before it is looked at.

        Args:
            head: headers of the request.
            version: of HTTP.
        """
        try:
            self._site.check(head, "POST", version)
            size = length_of(head, b"content-length")
        except RequestError:
            return False
        if size is None or size > self.settings.max_body:
            return False
        return self._token is None or has_token(head, self._token)

    def answer(self, request: "Direct") -> Answer:
        """Answer a request that the server takes and that is all here; its body is gone then."""
        try:
            body = unpacked(request.head, request.pop_body(), self.settings)
            return self._infer(request.served, request.head, body)
        except Exception as error:  # noqa: BLE001 - it is logged
            refusal = self._explain(error, request.served[0].name)
            forget_frames(error)
            refusal.unread = False
            return self.turn_away(request, refusal)

    def turn_away(self, request: "Direct", error: RequestError) -> Answer:
        """Refuse a request."""
        model, meters = request.served
        meters.failed(perf_counter() - request.began)
        return self._refusal(error, model.name, request.head)

    def gone(self, request: "Direct") -> None:
        """Count a request that will never be all here; its client has hung up or been told."""
        model, meters = request.served
        meters.failed(perf_counter() - request.began)
        self.metrics.rejected("gone", model.name)

    def _check_queue(self) -> None:
        if len(self.ready) > self.settings.queue:
            raise crowd()

    def _allowed(self, path: str, head: dict[bytes, bytes]) -> bool:
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
            return True
        assert self._token is not None
        return has_token(head, self._token)

    async def _answer_cold(
        self, scope: Scope, head: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        status = 0

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.trace(head)]
            await send(message)

        with Held(self.room, receive) as held:
            await self.cold(scope, held, send_traced)
        if self.settings.access_log:
            path = scope["path"][:LONGEST]
            log("answered", method=scope["method"], path=path, status=status, **told(head))

    def _infer(self, served: Served, head: dict[bytes, bytes], body: bytes) -> Answer:
        model, meters = served
        began = perf_counter()
        request = decode(body, length_of(head, HEADER_LENGTH), self.settings.limits)
        parsed = perf_counter()
        logits = model.run(request.images)
        ran = perf_counter()
        content, json_length = encode(request, logits, model.name, model.version)
        encoded = perf_counter()
        headers = [(b"content-length", b"%d" % len(content)), *self.trace(head)]
        if json_length is None:
            headers.append(JSON)
        else:
            headers += [BINARY, (HEADER_LENGTH, b"%d" % json_length)]
        meters.answered(len(logits), began, parsed, ran, encoded)
        if self.settings.access_log:
            log(
                "infer",
                model=model.name,
                version=model.version,
                rows=len(logits),
                seconds=round(encoded - began, 6),
                **told(head),
            )
        return 200, headers, content

    def trace(self, head: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Return the headers by which a request can be found again."""
        given = head.get(b"x-request-id")
        if given is None or not REQUEST_ID.fullmatch(given):
            given = head[b"x-request-id"] = b"%b-%x" % (self.process.encode(), next(self._ids))
        headers = [(b"x-request-id", given)]
        parent = head.get(b"traceparent")
        if parent is not None:
            if TRACEPARENT.fullmatch(parent):
                headers.append((b"traceparent", parent))
            else:
                del head[b"traceparent"]
        return headers

    def _explain(self, error: BaseException, model: str) -> RequestError:
        """Return what a client is told of an error, and log what it need not know."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, RuntimeFailedError):
            log("failed", "error", model=model, why=str(error))
            return RequestError(f"the model does not run: {error}", 500, "runtime")
        if isinstance(error, asyncio.CancelledError):  # the server ends and cannot wait any longer
            return busy("the server stops")
        # a bug, which must not end as plain text
        log("failed", "error", model=model, why=repr(error), traceback=format_exc())
        return RequestError("the server failed; its log says how", 500, "bug", unread=True)

    def _refusal(self, error: RequestError, model: str, head: dict[bytes, bytes]) -> Answer:
        why = str(error).encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
        content = orjson.dumps({"error": why})
        headers = [JSON, (b"content-length", b"%d" % len(content)), *self.trace(head)]
        headers += error.headers
        if error.unread:
            headers.append((b"connection", b"close"))
        self.metrics.rejected(error.reason, model)
        status = error.status
        if error.reason == "busy":  # the log is not to take what time is left
            self._busy.log(why=why, model=model, **told(head))
        else:
            log("rejected", status=status, reason=error.reason, why=why, model=model, **told(head))
        return status, headers, content

    async def _refuse(
        self,
        error: RequestError,
        model: str,
        head: dict[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        status, headers, content = self._refusal(error, model, head)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": error.unread})
        if error.unread:
            await discard_body(receive, 4 * self.settings.max_body)
            await send({"type": "http.response.body", "body": b""})


def forget_frames(error: BaseException) -> None:
    """Cut off the frames that an error came through: they hold the body, and one of them it."""
    error.__traceback__ = error.__context__ = None


def crowd() -> RequestError:
    """Return the refusal of a request when too many wait."""
    return busy("the server is busy, try again")


def has_token(head: dict[bytes, bytes], token: bytes) -> bool:
    """Tell whether a request bears the token, in a time that says nothing of where it differs."""
    scheme, _, given = head.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)


def told(head: dict[bytes, bytes]) -> dict[str, str]:
    """Return what the log says of who asked."""
    fields = {"request_id": head.get(b"x-request-id"), "traceparent": head.get(b"traceparent")}
    return {name: value.decode() for name, value in fields.items() if value}
