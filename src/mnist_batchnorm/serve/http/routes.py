"""The slow path: health, metadata, repository, statistics, metrics, documentation, the page."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from mnist_batchnorm.serve.core.control import Control, check_parameters
from mnist_batchnorm.serve.core.describe import (
    find,
    model_configuration,
    model_metadata,
    model_statistics,
    provenance,
    repository_index,
    server_metadata,
)
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import (
    EXTENSIONS,
    MAX_QUOTED_CHARS,
    RequestError,
    refuse,
    unavailable,
)
from mnist_batchnorm.serve.core.service import InferenceService
from mnist_batchnorm.serve.http.body import read_body, select_headers
from mnist_batchnorm.serve.http.openapi import DOCS, START, SWAGGER_UI, document, read_bundled

Handler = Callable[[Request], Awaitable[Response]]

PAGE = Path(__file__).parents[1] / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")  # Swagger UI
SECURITY = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


def json_response(content: Any, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(orjson.dumps(content), status, headers, "application/json")


class Routes:
    """All calls except for inference; `draining` returns whether the server is shutting down."""

    def __init__(
        self, service: InferenceService, control: Control, draining: Callable[[], bool]
    ) -> None:
        self.service = service
        self.catalog = service.catalog
        self.settings = service.settings
        self.metrics = service.metrics
        self.control = control
        self.draining = draining
        self._router = Router(self._routes(), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises RequestError."""
        scope["app"] = self  # makes Starlette raise HTTPException
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            messages = {404: "no such path", 405: "this path does not take this method"}
            headers = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
            path = scope["path"][:MAX_QUOTED_CHARS]
            why = f"{scope['method']} {path}: {messages[error.status_code]}"
            raise RequestError(why, error.status_code, "path", headers=headers) from None

    def _routes(self) -> list[Route]:
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        repository = "/v2/repository/models/{name}"
        get = partial(Route, methods=["GET"])
        post = partial(Route, methods=["POST"])
        return [
            get("/v2", self.server),
            get("/v2/health/live", self.live),
            get("/v2/health/ready", self.ready),
            get("/v2/models/stats", self.statistics),
            *(get(path, self.model) for path in (model, version)),
            *(get(f"{path}/config", self.config) for path in (model, version)),
            *(get(f"{path}/ready", self.model_ready) for path in (model, version)),
            *(get(f"{path}/stats", self.statistics) for path in (model, version)),
            *(post(f"{path}/infer", self.no_such_model) for path in (model, version)),
            post("/v2/repository/index", self.index),
            post(f"{repository}/load", self.load),
            post(f"{repository}/unload", self.unload),
            get("/metrics", self.prometheus),
            get("/openapi.json", fixed(orjson.dumps(document(self.settings)), ".json")),
            *docs_routes(),
            *page_routes(PAGE),
        ]

    async def server(self, _: Request) -> Response:
        return json_response(server_metadata(EXTENSIONS))

    async def live(self, _: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self.catalog.ready and not self.draining()
        return json_response({"ready": ready}, 200 if ready else 503)

    def _find(self, request: Request) -> Model:
        return find(self.catalog, **request.path_params)

    async def no_such_model(self, request: Request) -> Response:
        """Reject inference by a model that is not served; the others never come here."""
        self._find(request)
        raise unavailable("the model is being loaded, try again")

    async def model(self, request: Request) -> Response:
        model = self._find(request)
        metadata = model_metadata(self.catalog, model, chosen="version" in request.path_params)
        return json_response({**metadata, "parameters": provenance(model)})

    async def config(self, request: Request) -> Response:
        model, settings = self._find(request), self.settings
        return json_response(model_configuration(model, settings.limits, settings.workers))

    async def model_ready(self, request: Request) -> Response:
        model = self._find(request)
        ready = not self.draining()
        return json_response({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def statistics(self, request: Request) -> Response:
        stats = model_statistics(self.catalog, self.metrics, **request.path_params)
        return json_response({"model_stats": stats})

    async def index(self, request: Request) -> Response:
        only_ready = (await self._json_object(request)).get("ready")
        if not isinstance(only_ready, bool | None):
            refuse("ready", only_ready, "true or false")
        return json_response(repository_index(self.catalog, only_ready=bool(only_ready)))

    async def load(self, request: Request) -> Response:
        problem = await self.control.load(await self._control_target(request))
        if problem:
            raise RequestError(problem, 400, "unproven")
        return json_response({})

    async def unload(self, request: Request) -> Response:
        await self.control.unload(await self._control_target(request))
        return json_response({})

    async def _control_target(self, request: Request) -> str:
        self.service.authorize_control(select_headers(request.headers.raw))
        name: str = request.path_params["name"]
        self.control.require(name)
        check_parameters((await self._json_object(request)).get("parameters") or {})
        return name

    async def _json_object(self, request: Request) -> dict[str, Any]:
        body = await read_body(select_headers(request.headers.raw), request.receive, self.settings)
        if not body:
            return {}
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise RequestError(f"the body is not JSON: {error}", reason="json") from None
        if not isinstance(content, dict):
            refuse("the body", content, "an object")
        if not isinstance(content.get("parameters"), dict | None):
            refuse("parameters", content["parameters"], "an object")
        return content

    async def prometheus(self, _: Request) -> Response:
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, headers={"content-type": EXPOSITION, "cache-control": "no-store"})


def page_routes(folder: Path) -> list[Route]:
    """Return a route for each file of the page, which is read once."""
    routes = []
    for path in sorted(folder.glob("*.*")):
        if path.suffix in CONTENT_TYPES:
            url = "/" if path.name == "index.html" else f"/static/{path.name}"
            routes.append(Route(url, fixed(path.read_bytes(), path.suffix)))
    return routes


def docs_routes() -> list[Route]:
    """Return the routes of Swagger UI, whose large files are read on request."""
    return [
        Route("/docs", fixed(DOCS, ".html", DOCS_POLICY)),
        Route("/static/swagger-start.js", fixed(START, ".js")),
        *(
            Route(f"/static/{name}", fixed(partial(read_bundled, name), Path(name).suffix))
            for name in SWAGGER_UI
        ),
    ]


def fixed(content: bytes | Callable[[], bytes], suffix: str, policy: str = POLICY) -> Handler:
    """Return the handler of a constant file; `policy` is its Content-Security-Policy."""

    async def endpoint(request: Request) -> Response:
        body = content if isinstance(content, bytes) else content()
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {
            **SECURITY,
            "content-security-policy": policy,
            "content-type": CONTENT_TYPES[suffix],
            "cache-control": "no-cache",  # revalidated each time, sent only if it changed
            "etag": tag,
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return endpoint
