"""Run a server: one process, or several that share a port."""

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Sequence

from mnist_batchnorm.errors import UserError
from mnist_batchnorm.serve.app import ASGI, App
from mnist_batchnorm.serve.catalog import Catalog, Source
from mnist_batchnorm.serve.control import Control
from mnist_batchnorm.serve.http import Protocol, Server, configure
from mnist_batchnorm.serve.log import log, take_over_logging
from mnist_batchnorm.serve.metrics import Metrics
from mnist_batchnorm.serve.protocol import HEADER_LENGTH
from mnist_batchnorm.serve.routes import Routes
from mnist_batchnorm.serve.settings import Settings

BACKLOG = 2048  # connections that the system holds for us
PAUSE = 0.5  # seconds between looks at the process that fetches models


def listen(settings: Settings) -> socket.socket:
    """Bind the server's port.

    Raises:
        UserError: It is taken, or the address is not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a server is reached on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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


def serve(
    sources: Sequence[Source],
    settings: Settings,
    listener: socket.socket,
    tend: Callable[[], None] = lambda: None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT.

    Args:
        sources: where the models come from.
        settings: how to serve.
        listener: the port.
        tend: what this process does now and then besides.

    Raises:
        UserError: A model is missing or is no model.
        CheckFailedError: A model is not fit to be served.
    """
    take_over_logging()
    metrics = Metrics()
    catalog = Catalog(sources, metrics)
    catalog.load()
    assert settings.state
    control = Control(catalog, settings.state, settings.watch)
    routes = Routes(catalog, control, settings, metrics, lambda: server.draining)
    app = App(catalog, settings, metrics, routes)
    protocol = type("BoundProtocol", (Protocol,), {"settings": settings, "app_of_server": app})
    server = Server(configure(cross_origin(app, settings), settings, protocol), app, settings)
    gc.enable()
    gc.freeze()  # what is here now stays, so the collector need not look at it again
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_run(server, control, listener, tend))
    log("stopped", pid=os.getpid())


async def _run(
    server: Server, control: Control, listener: socket.socket, tend: Callable[[], None]
) -> None:
    watching = [asyncio.create_task(control.run()), asyncio.create_task(_repeat(tend))]
    models = [f"{model.name} {model.version}" for model in control.catalog]
    where = {"url": address_of(listener)}
    beside: list[asyncio.Task[None]] = []
    if server.settings.grpc_port is not None:
        from mnist_batchnorm.serve.rpc import Rpc, RpcServer

        rpc = Rpc(server.app, control, server.settings, lambda: server.draining)
        calls = RpcServer(rpc)
        where["grpc"] = await calls.start()
        stop = calls.run(lambda: server.should_exit, lambda: server.force_exit)
        beside.append(asyncio.create_task(stop))
    log("serving", **where, pid=os.getpid(), models=models)
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
