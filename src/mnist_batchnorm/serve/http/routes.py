"""Everything but inference: health, metadata, repository, statistics, metrics, the page."""

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

from mnist_batchnorm.serve.core.catalog import Catalog
from mnist_batchnorm.serve.core.control import Control, allow_control, check_parameters
from mnist_batchnorm.serve.core.describe import (
    find,
    model_configuration,
    model_metadata,
    model_statistics,
    provenance,
    repository_index,
    server_metadata,
)
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.models import Model
from mnist_batchnorm.serve.core.protocol import EXTENSIONS, LONGEST, RequestError, busy, refuse
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import Scope, Send
from mnist_batchnorm.serve.http.body import Receive, pick, read_body
from mnist_batchnorm.serve.http.openapi import DOCS, START, SWAGGER_UI, bundled, document

Handler = Callable[[Request], Awaitable[Response]]

PAGE = Path(__file__).parents[1] / "page"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
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


def answer(content: Any, status: int = 200) -> Response:
    """Return JSON."""
    return Response(
        orjson.dumps(content), status, {"cache-control": "no-store"}, "application/json"
    )


class Routes:
    """The protocol's calls, but for inference.

    Args:
        catalog: the models.
        control: by which models are loaded and unloaded.
        settings: how to serve.
        metrics: what is counted.
        draining: tells whether the server is about to end.
    """

    def __init__(
        self,
        catalog: Catalog,
        control: Control,
        settings: Settings,
        metrics: Metrics,
        draining: Callable[[], bool],
    ) -> None:
        self.catalog = catalog
        self.control = control
        self.settings = settings
        self.metrics = metrics
        self.draining = draining
        self._router = Router(self._routes(), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RequestError: It is not answered.
        """
        scope["app"] = self  # makes Starlette raise what it refuses
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            says = {404: "no such path", 405: "this path does not take this method"}
            headers = [(k.lower().encode(), v.encode()) for k, v in (error.headers or {}).items()]
            told = f"{scope['method']} {scope['path'][:LONGEST]}: {says[error.status_code]}"
            raise RequestError(told, error.status_code, "path", headers=headers) from None

    def _routes(self) -> list[Route]:
        model, one = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        repository = "/v2/repository/models/{name}"
        get = partial(Route, methods=["GET"])
        post = partial(Route, methods=["POST"])
        return [
            get("/v2", self.server),
            get("/v2/health/live", self.live),
            get("/v2/health/ready", self.ready),
            get("/v2/models/stats", self.all_statistics),
            *(get(path, self.model) for path in (model, one)),
            *(get(f"{path}/config", self.config) for path in (model, one)),
            *(get(f"{path}/ready", self.model_ready) for path in (model, one)),
            *(get(f"{path}/stats", self.statistics) for path in (model, one)),
            *(post(f"{path}/infer", self.no_such_model) for path in (model, one)),
            post("/v2/repository/index", self.index),
            post(f"{repository}/load", self.load),
            post(f"{repository}/unload", self.unload),
            get("/metrics", self.prometheus),
            get("/openapi.json", fixed(orjson.dumps(document(self.settings)), "application/json")),
            *docs_routes(),
            *page_routes(PAGE),
        ]

    async def server(self, _: Request) -> Response:
        """Answer what the server is."""
        return answer(server_metadata(EXTENSIONS))

    async def live(self, _: Request) -> Response:
        """Answer that the process does its work."""
        return answer({"live": True})

    async def ready(self, _: Request) -> Response:
        """Answer whether requests may come."""
        ready = self.catalog.ready and not self.draining()
        return answer({"ready": ready}, 200 if ready else 503)

    def _find(self, request: Request) -> Model:
        wanted = request.path_params
        return find(self.catalog, wanted["name"], wanted.get("version"))

    async def no_such_model(self, request: Request) -> Response:
        """Refuse inference by a model that is not served: what is, the lean path answers."""
        self._find(request)
        raise busy("the model is being loaded, try again")

    async def model(self, request: Request) -> Response:
        """Answer what a model takes and gives, and whether it is proven."""
        model = self._find(request)
        metadata = model_metadata(self.catalog, model, chosen="version" in request.path_params)
        return answer({**metadata, "parameters": provenance(model)})

    async def config(self, request: Request) -> Response:
        """Answer how a model is served, as Triton's model configuration extension says it.

        https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_configuration.md
        """
        settings = self.settings
        return answer(model_configuration(self._find(request), settings.limits, settings.workers))

    async def model_ready(self, request: Request) -> Response:
        """Answer whether a model may be asked."""
        model = self._find(request)
        ready = not self.draining()
        return answer({"name": model.name, "ready": ready}, 200 if ready else 503)

    async def statistics(self, request: Request) -> Response:
        """Answer what a model has done."""
        wanted = request.path_params
        return self._statistics(wanted["name"], wanted.get("version"))

    async def all_statistics(self, _: Request) -> Response:
        """Answer what all models have done."""
        return self._statistics()

    def _statistics(self, *wanted: str | None) -> Response:
        return answer({"model_stats": model_statistics(self.catalog, self.metrics, *wanted)})

    async def index(self, request: Request) -> Response:
        """Answer which models there are, served or not."""
        asked = await self._object(request)
        only_ready = asked.get("ready")
        if not isinstance(only_ready, bool | None):
            refuse("ready", only_ready, "true or false")
        return answer(repository_index(self.catalog, only_ready=bool(only_ready)))

    async def load(self, request: Request) -> Response:
        """Serve a model that was unloaded, or look whether its file has changed."""
        name = await self._named(request)
        problem = await self.control.load(name)
        if problem:
            raise RequestError(problem, 400, "unproven")
        return answer({})

    async def unload(self, request: Request) -> Response:
        """Serve a model no longer."""
        await self.control.unload(await self._named(request))
        return answer({})

    async def _named(self, request: Request) -> str:
        allow_control(self.settings, pick(request.headers.raw))
        name: str = request.path_params["name"]
        self.control.require(name)
        check_parameters((await self._object(request)).get("parameters") or {})
        return name

    async def _object(self, request: Request) -> dict[str, Any]:
        """Return the object in a request's body, which may be missing."""
        body = await read_body(pick(request.headers.raw), request.receive, self.settings)
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
        """Answer all figures."""
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, headers={"content-type": EXPOSITION, "cache-control": "no-store"})


def page_routes(folder: Path) -> list[Route]:
    """Return a route for each file of the page, which is read now and never again."""
    routes = []
    for path in sorted(folder.glob("*.*")):
        if path.suffix in CONTENT_TYPES:
            where = "/" if path.name == "index.html" else f"/static/{path.name}"
            routes.append(Route(where, fixed(path.read_bytes(), CONTENT_TYPES[path.suffix])))
    return routes


def docs_routes() -> list[Route]:
    """Return the routes of Swagger UI, whose files are large and read when they are asked for."""
    html, javascript = CONTENT_TYPES[".html"], CONTENT_TYPES[".js"]
    routes = [
        Route("/docs", fixed(DOCS.encode(), html, DOCS_POLICY)),
        Route("/static/swagger-start.js", fixed(START.encode(), javascript)),
    ]
    for path, name in SWAGGER_UI.items():
        content_type = CONTENT_TYPES[Path(name).suffix]
        routes.append(Route(path, fixed(partial(bundled, name), content_type)))
    return routes


def fixed(content: bytes | Callable[[], bytes], content_type: str, policy: str = POLICY) -> Handler:
    """Return what answers a file that never changes.

    Args:
        content: the file, or what reads it.
        content_type: of it.
        policy: its Content-Security-Policy.
    """

    async def endpoint(request: Request) -> Response:
        body = content if isinstance(content, bytes) else content()
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {
            **SECURITY,
            "content-security-policy": policy,
            "content-type": content_type,
            "cache-control": "no-cache",  # asked again each time, but sent only when it changed
            "etag": tag,
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return endpoint
