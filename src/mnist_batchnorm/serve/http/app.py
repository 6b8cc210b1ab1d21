"""The ASGI application: inference by the shortest path, everything else by `Routes`."""

import asyncio
from time import perf_counter

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mnist_batchnorm.serve.core.decode import decode
from mnist_batchnorm.serve.core.encode import encode
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.protocol import HEADER_LENGTH, MAX_QUOTED_CHARS, RequestError
from mnist_batchnorm.serve.core.service import Headers, InferenceService, ServedModel, trace_fields
from mnist_batchnorm.serve.http.body import (
    ByteBudget,
    ClientDisconnectedError,
    decompress_body,
    discard_body,
    parse_length,
    read_body,
    select_headers,
)
from mnist_batchnorm.serve.http.fast_request import FastRequest, Response
from mnist_batchnorm.serve.http.origin_policy import OriginPolicy

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
# No token needed: probes have none, and a browser must show a page where it can be entered.
OPEN_PATHS = frozenset(("/", "/docs", "/openapi.json"))
HEALTH = "/v2/health/"
OPEN_FOLDERS = (HEALTH, "/static/")


class App:
    """Answers HTTP requests.

    Attributes:
        targets: path of an inference request in UTF-8 -> model and meters.
        waiting: connections with a complete request whose task has not answered yet.
        body_budget: limit on the bodies of all requests together.
    """

    def __init__(self, service: InferenceService, routes: ASGIApp) -> None:
        self.service = service
        self.settings = service.settings
        self.metrics = service.metrics
        self.targets: dict[bytes, ServedModel] = {}
        self.waiting: set[object] = set()
        self.body_budget = ByteBudget(service.settings.max_bodies)
        self._routes = routes
        self._origin_policy = OriginPolicy(service.settings)
        service.catalog.on_publish = self._list_targets
        self._list_targets()

    def _list_targets(self) -> None:
        targets: dict[bytes, ServedModel] = {}
        for model in self.service.catalog:
            served = (model, self.metrics.meters(model.name, model.version))
            path = f"/v2/models/{model.name}"
            targets.setdefault(f"{path}/infer".encode(), served)
            targets[f"{path}/versions/{model.version}/infer".encode()] = served
        self.targets = targets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        began = perf_counter()
        path = scope["path"]
        headers = select_headers(scope["headers"])
        served = self.targets.get(path.encode())
        model = served[0].name if served else ""
        try:
            if served or not path.startswith(HEALTH):
                self._origin_policy.enforce(headers, scope["method"], scope["http_version"])
            if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
                self.service.authenticate(headers)
            if served is None or scope["method"] != "POST":
                await self._route(scope, headers, receive, send)
                return
            try:
                self.service.check_queue(len(self.waiting))
                with self.body_budget.limiting(receive) as budgeted:
                    body = await read_body(headers, budgeted, self.settings)
                    # others may have come while this body was received
                    self.service.check_queue(len(self.waiting))
                    status, fields, content = self._infer(served, headers, body)
                    del body  # sending the answer may take long
            except BaseException:
                served[1].failures.observe(perf_counter() - began)
                raise
            served[1].flush()
            await send({"type": "http.response.start", "status": status, "headers": fields})
            await send({"type": "http.response.body", "body": content})
        except ClientDisconnectedError:
            self.metrics.rejected("gone", model)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is logged
            rejection = self.service.explain(error, model)
            drop_frames(error)
            status, fields, content = self._rejection(rejection, model, headers)
            more = rejection.unread
            await send({"type": "http.response.start", "status": status, "headers": fields})
            await send({"type": "http.response.body", "body": content, "more_body": more})
            if more:
                await discard_body(receive, 4 * self.settings.max_body)
                await send({"type": "http.response.body", "body": b""})

    def accepts(self, headers: Headers, version: str) -> bool:
        """Whether the body of an inference request may be buffered before validation."""
        try:
            self._origin_policy.enforce(headers, "POST", version)
            size = parse_length(headers, b"content-length")
        except RequestError:
            return False
        fits = size is not None and size <= self.settings.max_body
        return fits and self.service.is_authenticated(headers)

    def handle(self, request: FastRequest) -> Response:
        """Answer a complete request that `accepts` accepted; releases its body."""
        try:
            body = decompress_body(request.headers, request.pop_body(), self.settings)
            return self._infer(request.served, request.headers, body)
        except Exception as error:  # noqa: BLE001 - it is logged
            rejection = self.service.explain(error, request.served[0].name)
            drop_frames(error)
            rejection.unread = False
            return self.reject(request, rejection)

    def reject(self, request: FastRequest, error: RequestError) -> Response:
        """Count a rejected request and return its response."""
        model, meters = request.served
        meters.failures.observe(perf_counter() - request.began)
        return self._rejection(error, model.name, request.headers)

    def client_disconnected(self, request: FastRequest) -> None:
        """Count a request whose client hung up, or was answered, before its body was complete."""
        model, meters = request.served
        meters.failures.observe(perf_counter() - request.began)
        self.metrics.rejected("gone", model.name)

    async def _route(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        status = 0

        async def send_traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.service.trace(headers)]
            await send(message)

        with self.body_budget.limiting(receive) as budgeted:
            await self._routes(scope, budgeted, send_traced)
        if self.settings.access_log:
            path = scope["path"][:MAX_QUOTED_CHARS]
            fields = trace_fields(headers)
            log("answered", method=scope["method"], path=path, status=status, **fields)

    def _infer(self, served: ServedModel, headers: Headers, body: bytes) -> Response:
        fields = self.service.trace(headers)
        began = perf_counter()
        codec = decode, (body, parse_length(headers, HEADER_LENGTH)), encode
        content, json_length = self.service.infer(served, headers, began, *codec)
        length = (b"content-length", b"%d" % len(content))
        if json_length is None:
            return 200, [length, *fields, JSON], content
        return 200, [length, *fields, BINARY, (HEADER_LENGTH, b"%d" % json_length)], content

    def _rejection(self, error: RequestError, model: str, headers: Headers) -> Response:
        fields = self.service.trace(headers)
        why = self.service.reject(error, model, headers, status=error.status)
        content = orjson.dumps({"error": why})
        fields = [JSON, (b"content-length", b"%d" % len(content)), *fields, *error.headers]
        if error.unread:
            fields.append((b"connection", b"close"))
        return error.status, fields, content


def drop_frames(error: BaseException) -> None:
    """Detach the traceback: its frames hold the body, and one of them the error itself."""
    error.__traceback__ = error.__context__ = None
