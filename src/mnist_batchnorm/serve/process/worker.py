"""Run a server: one process, or several that share a port."""

import asyncio
import ctypes
import gc
import os
import socket
from collections.abc import Callable, Sequence

from mnist_batchnorm.serve.core.catalog import Catalog, Source
from mnist_batchnorm.serve.core.control import Control
from mnist_batchnorm.serve.core.log import log, take_over_logging
from mnist_batchnorm.serve.core.metrics import Metrics
from mnist_batchnorm.serve.core.protocol import HEADER_LENGTH
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http.app import ASGI, App
from mnist_batchnorm.serve.http.connection import Protocol
from mnist_batchnorm.serve.http.direct import Turn
from mnist_batchnorm.serve.http.routes import Routes
from mnist_batchnorm.serve.http.server import Server, configure
from mnist_batchnorm.serve.process.listener import address_of
from mnist_batchnorm.serve.process.shared_state import Roll

KEPT = 2**24  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PAUSE = 0.5  # seconds between looks at the process that fetches models


def cross_origin(app: App, settings: Settings) -> ASGI:
    """Let pages of the sites that were named ask, and no others."""
    if not settings.origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    ours = ["content-type", HEADER_LENGTH.decode(), "x-request-id", "traceparent"]
    middleware: ASGI = CORSMiddleware(
        app,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        allow_headers=[*ours, "authorization", "content-encoding"],
        expose_headers=[*ours, "retry-after"],
    )
    return middleware


def keep_memory() -> None:
    """Have glibc keep some memory that a request has freed for the next one.

    Given back to the system, each page of it costs a fault when it is needed again: with 32 images
    as JSON a third of the time that a request takes. See ``man 3 mallopt``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, KEPT // 2)


def serve(
    sources: Sequence[Source],
    settings: Settings,
    listener: socket.socket,
    roll: Roll,
    parent: int | None = None,
    tend: Callable[[], None] = lambda: None,
) -> int:
    """Serve in this process until SIGTERM or SIGINT.

    Args:
        sources: of the models.
        settings: how to serve.
        listener: the port.
        roll: of the server's processes.
        parent: a descriptor that ends when the process does that started this worker.
        tend: what this process does now and then besides.

    Returns:
        The exit status: 0, or 128 and the signal that ended it at once.

    Raises:
        UserError: A model is missing or is no model.
        CheckFailedError: A model is not fit to be served.
    """
    take_over_logging()
    keep_memory()
    metrics = Metrics()
    catalog = Catalog(sources, metrics)
    control = Control(catalog, roll, settings.watch)
    control.start()
    routes = Routes(catalog, control, settings, metrics, lambda: server.draining)
    app = App(catalog, settings, metrics, routes)
    protocol = type(
        "BoundProtocol",
        (Protocol,),
        {"settings": settings, "app_of_server": app, "lingering": set(), "turn": Turn(app)},
    )
    config = configure(cross_origin(app, settings), settings, protocol)
    server = Server(config, app, settings, protocol, parent)
    gc.enable()
    gc.freeze()  # what is here now stays, so the collector need not look at it again
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_run(server, control, listener, tend))
    log("stopped", pid=os.getpid())
    return server.status


async def _run(
    server: Server, control: Control, listener: socket.socket, tend: Callable[[], None]
) -> None:
    watching = [asyncio.create_task(control.run()), asyncio.create_task(_repeat(tend))]
    models = [f"{model.name} {model.version}" for model in control.catalog]
    where = {"url": address_of(listener)}
    beside: list[asyncio.Task[None]] = []
    if server.settings.grpc_port is not None:
        from mnist_batchnorm.serve.grpc.service import Rpc, RpcServer

        rpc = Rpc(server.app, control, server.settings, lambda: server.draining)
        calls = RpcServer(rpc)
        where["grpc"] = await calls.start()
        stop = calls.run(lambda: server.should_exit, lambda: server.force_exit)
        beside.append(asyncio.create_task(stop))

    def serving() -> None:
        control.serve()
        log("serving", **where, pid=os.getpid(), ids=server.app.process, models=models)

    server.on_start = serving
    try:
        await server.serve([listener])
    finally:
        server.should_exit = True
        await asyncio.gather(*beside)
        for task in watching:
            task.cancel()


async def _repeat(tend: Callable[[], None]) -> None:
    while True:
        tend()
        await asyncio.sleep(PAUSE)
