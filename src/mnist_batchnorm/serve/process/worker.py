"""Serve in this process, alone or as one of several workers."""

import asyncio
import ctypes
import gc
import os
import socket
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp

from mnist_batchnorm.serve.core.catalog import Catalog, Source
from mnist_batchnorm.serve.core.control import Control
from mnist_batchnorm.serve.core.log import log, take_over_logging
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.protocol import HEADER_LENGTH
from mnist_batchnorm.serve.core.service import InferenceService
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.core.shared_state import SharedState
from mnist_batchnorm.serve.http.app import App
from mnist_batchnorm.serve.http.connection import HttpConnection
from mnist_batchnorm.serve.http.response_batch import ResponseBatch
from mnist_batchnorm.serve.http.routes import Routes
from mnist_batchnorm.serve.http.server import HttpServer, configure
from mnist_batchnorm.serve.process.listener import url_of

KEPT_HEAP_BYTES = 2**24
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
TICK_S = 0.5


def with_cors(app: App, settings: Settings) -> ASGIApp:
    if not settings.origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    ours = ["content-type", HEADER_LENGTH.decode(), "x-request-id", "traceparent"]
    middleware: ASGIApp = CORSMiddleware(
        app,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=[*ours, "authorization", "content-encoding"],
        expose_headers=[*ours, "retry-after"],
    )
    return middleware


def keep_freed_memory() -> None:
    """Have glibc keep some freed memory for the next request.

    Each page returned to the system costs a fault when it is needed again: with 32 images as JSON
    a third of a request's time. See ``man 3 mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT_HEAP_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_HEAP_BYTES // 2)


def serve(
    sources: Sequence[Source],
    settings: Settings,
    listener: socket.socket,
    state: SharedState,
    parent: int | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> int:
    """Serve in this process until SIGTERM or SIGINT.

    Args:
        sources: where the models come from.
        settings: how to serve.
        listener: the bound port.
        state: shared with the server's other processes.
        parent: a descriptor that is closed when the parent of this worker ends.
        on_tick: called every `TICK_S` seconds.

    Returns:
        The exit status: 0, or 128 + the signal that ended it at once.

    Raises:
        UserError: A model is missing or invalid.
        CheckFailedError: The parity gate has not passed a model.
    """
    take_over_logging()
    keep_freed_memory()
    metrics = Metrics()
    catalog = Catalog(sources, metrics)
    control = Control(catalog, state, settings.watch)
    control.start()
    service = InferenceService(catalog, settings, metrics)
    app = App(service, Routes(service, control, lambda: server.draining))
    connection_class = type(
        "BoundConnection",
        (HttpConnection,),
        {"settings": settings, "http_app": app, "lingering": set(), "batch": ResponseBatch(app)},
    )
    config = configure(with_cors(app, settings), connection_class)
    server = HttpServer(config, service, connection_class, parent)
    gc.enable()
    gc.freeze()  # what exists now stays: the collector need not traverse it again
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_run(server, control, listener, on_tick))
    log("stopped", pid=os.getpid())
    return server.status


async def _run(
    server: HttpServer, control: Control, listener: socket.socket, on_tick: Callable[[], None]
) -> None:
    periodic = [asyncio.create_task(control.run()), asyncio.create_task(_repeat(on_tick))]
    models = [f"{model.name} {model.version}" for model in control.catalog]
    urls = {"url": url_of(listener)}
    grpc: list[asyncio.Task[None]] = []
    if server.settings.grpc_port is not None:
        from mnist_batchnorm.serve.grpc.server import GrpcServer
        from mnist_batchnorm.serve.grpc.service import GrpcService

        grpc_server = GrpcServer(GrpcService(server.service, control, lambda: server.draining))
        urls["grpc"] = await grpc_server.start()
        running = grpc_server.run(lambda: server.should_exit, lambda: server.force_exit)
        grpc.append(asyncio.create_task(running))

    def serving() -> None:
        control.serve()
        log("serving", **urls, pid=os.getpid(), ids=server.service.id_prefix, models=models)

    server.on_start = serving
    try:
        await server.serve([listener])
    finally:
        server.should_exit = True
        await asyncio.gather(*grpc)
        for task in periodic:
            task.cancel()


async def _repeat(on_tick: Callable[[], None]) -> None:
    while True:
        on_tick()
        await asyncio.sleep(TICK_S)
