"""Bind the server's ports, before there are workers, and raise the limit on descriptors."""

import contextlib
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.settings import Settings

BACKLOG = 2048  # connections that the system queues until they are accepted
OTHER_DESCRIPTORS = 256  # beyond those of connections: files, libraries, refusals


def listen(settings: Settings) -> socket.socket:
    """Bind the HTTP port.

    Raises:
        UserError: The port is taken, or the address is not one of this machine.
    """
    with _explained(f"{settings.host}, port {settings.port}"):
        listener = _bind(settings.host, settings.port, socket.SO_REUSEADDR)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    return listener


@contextlib.contextmanager
def reserve_grpc_port(settings: Settings) -> Iterator[Settings]:
    """Hold the gRPC port, which all processes of the server then share (``SO_REUSEPORT``).

    Yields:
        The settings with the port's number, if any free port was asked for.

    Raises:
        UserError: The port is taken, or the address is not one of this machine.
    """
    with _explained(f"{settings.host}, port {settings.grpc_port} for gRPC"):
        if settings.grpc_port:  # another server might share its port too
            _bind(settings.host, settings.grpc_port, socket.SO_REUSEADDR).close()
        holder = _bind(settings.host, settings.grpc_port, socket.SO_REUSEPORT)
    with holder:
        host, port = holder.getsockname()[:2]
        yield replace(settings, host=host, grpc_port=port)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot listen on {where}: {error.strerror or error}") from None


def _bind(host: str, port: int | None, option: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def url_of(listener: socket.socket) -> str:
    """Return the URL at which a server is reached on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_descriptor_limit(settings: Settings) -> Settings:
    """Let this process open as many files as its connections need.

    Returns:
        The settings, with fewer connections if the system allows no more.

    Raises:
        UserError: The system does not allow a single connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return settings
    allowed = needed if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if needed <= allowed:
        return settings
    connections = allowed - OTHER_DESCRIPTORS
    if connections < 1:
        raise UserError(f"{allowed} open files are too few; raise `ulimit -n` to {needed}")
    log(
        "few descriptors",
        "warning",
        why=f"--max-connections {settings.max_connections} needs {needed} open files and the "
        f"system allows {allowed}: raise `ulimit -Hn`",
        max_connections=connections,
    )
    return replace(settings, max_connections=connections)
