"""The ASGI application: inference by the shortest way, everything else by Starlette."""

import asyncio
import hmac
import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from traceback import format_exc
from typing import Any

import orjson

from mnist_batchnorm.parity.runtime import RuntimeFailedError
from mnist_batchnorm.serve.body import (
    ClientGoneError,
    Held,
    Message,
    Receive,
    Room,
    discard_body,
    length_of,
    pick,
    read_body,
)
from mnist_batchnorm.serve.catalog import Catalog
from mnist_batchnorm.serve.decode import decode
from mnist_batchnorm.serve.encode import encode
from mnist_batchnorm.serve.log import Sparse, log
from mnist_batchnorm.serve.metrics import Meters, Metrics
from mnist_batchnorm.serve.models import Model
from mnist_batchnorm.serve.protocol import (
    HEADER_LENGTH,
    LONGEST,
    RequestError,
    busy,
    unauthorized,
)
from mnist_batchnorm.serve.settings import Settings
from mnist_batchnorm.serve.site import Site

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
# Free of the token: a probe has none, and a browser shows a page before anybody can give it one.
OPEN_PATHS = frozenset(("/", "/docs", "/openapi.json"))
HEALTH = "/v2/health/"
OPEN_FOLDERS = (HEALTH, "/static/")
WHOLE = "mnist_bn.answer_whole"  # in a scope: how the server answers in one piece, if it can
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
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics, cold: ASGI) -> None:
        self.catalog = catalog
        self.settings = settings
        self.metrics = metrics
        self.cold = cold
        self.ready: set[object] = set()  # connections with a request that is all here, unanswered
        self.calls = 0  # over gRPC that are not answered yet
        self._token = settings.token.encode() if settings.token else None
        self._site = Site(settings)
        self._room = Room(settings.max_bodies)
        self._ids = itertools.count()
        self._busy = Sparse("busy")
        self.process = secrets.token_hex(6)  # which the ids that it gives to requests begin with
        self._paths: dict[str, tuple[Model, Meters]] = {}
        catalog.on_publish = self._list_paths
        self._list_paths()

    def _list_paths(self) -> None:
        paths: dict[str, tuple[Model, Meters]] = {}
        for model in self.catalog:
            served = (model, self.metrics.of(model.name, model.version))
            paths.setdefault(f"/v2/models/{model.name}/infer", served)
            paths[f"/v2/models/{model.name}/versions/{model.version}/infer"] = served
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        began = perf_counter()
        head = pick(scope["headers"])
        served = self._paths.get(scope["path"])
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
                with Held(self._room, receive) as held:
                    await self._infer(served, scope, head, held, send)
            except BaseException:
                served[1].failed(perf_counter() - began)
                raise
        except RequestError as error:
            error.__traceback__ = None  # its frames would keep the body while the rest is read
            await self._refuse(error, model, head, receive, send)
        except ClientGoneError:
            self.metrics.rejected("gone", model)
        except RuntimeFailedError as error:
            log("failed", "error", model=model, why=str(error))
            failure = RequestError(f"the model does not run: {error}", 500, "runtime")
            await self._refuse(failure, model, head, receive, send)
        except Exception as error:  # noqa: BLE001 - a bug, which must not end as plain text
            log("failed", "error", model=model, why=repr(error), traceback=format_exc())
            failure = RequestError("the server failed; its log says how", 500, "bug", unread=True)
            await self._refuse(failure, model, head, receive, send)
        except asyncio.CancelledError:  # the server ends and cannot wait any longer
            await self._refuse(busy("the server stops"), model, head, receive, send)

    def _check_queue(self) -> None:
        if len(self.ready) > self.settings.queue:
            raise busy("the server is busy, try again")

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

        with Held(self._room, receive) as held:
            await self.cold(scope, held, send_traced)
        if self.settings.access_log:
            path = scope["path"][:LONGEST]
            log("answered", method=scope["method"], path=path, status=status, **told(head))

    async def _infer(
        self,
        served: tuple[Model, Meters],
        scope: Scope,
        head: dict[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        model, meters = served
        body = await read_body(head, receive, self.settings)
        self._check_queue()  # others may have come while this one was on its way
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
        answer_whole = scope.get(WHOLE)
        if not answer_whole or not answer_whole(headers, content):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})
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

    async def _refuse(
        self,
        error: RequestError,
        model: str,
        head: dict[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
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
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": content, "more_body": error.unread})
        if error.unread:
            await discard_body(receive, 4 * self.settings.max_body)
            await send({"type": "http.response.body", "body": b""})


def has_token(head: dict[bytes, bytes], token: bytes) -> bool:
    """Tell whether a request bears the token, in a time that says nothing of where it differs."""
    scheme, _, given = head.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)


def told(head: dict[bytes, bytes]) -> dict[str, str]:
    """Return what the log says of who asked."""
    fields = {"request_id": head.get(b"x-request-id"), "traceparent": head.get(b"traceparent")}
    return {name: value.decode() for name, value in fields.items() if value}
