"""The port of a server: bound before there are workers, closed without a client noticing."""

import asyncio
import contextlib
import ctypes
import resource
import select
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.log import log
from mnist_batchnorm.serve.core.settings import Settings

BACKLOG = 2048  # connections that the system holds for us
RESERVE = 256  # descriptors for everything but connections in use: files, libraries, refusals
SETTLE = 0.25  # seconds for handshakes on their way to end
LOOK = 0.01  # seconds between looks at the backlog
LOOKS = 500

SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it
# Classic BPF on a TCP header: a segment with SYN (2 in byte 13) is dropped, all others pass.
# Code, jump if true, jump if false, operand: linux/filter.h.
DROP_SYN = (
    (0x30, 0, 0, 13),  # load byte
    (0x45, 0, 1, 0x02),  # test bits
    (0x06, 0, 0, 0),  # return 0 bytes
    (0x06, 0, 0, 0xFFFFFFFF),  # return all
)


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


@contextlib.contextmanager
def reserved(settings: Settings) -> Iterator[Settings]:
    """Hold the port that all processes of the server then share (``SO_REUSEPORT``).

    Yields:
        The settings, with the port's number where any was asked for.

    Raises:
        UserError: It is taken, or the address is not this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.grpc_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if settings.grpc_port:
            with socket.socket(family, kind) as probe:  # another server might share its port too
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        holder = socket.socket(family, kind)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {settings.host}, port {settings.grpc_port} for gRPC: "
            f"{error.strerror or error}"
        ) from None
    with holder:
        host, port = holder.getsockname()[:2]
        yield replace(settings, host=host, grpc_port=port)


def address_of(listener: socket.socket) -> str:
    """Return the URL at which a server is reached on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def fit_descriptors(settings: Settings) -> Settings:
    """Let this process have as many files open as its connections need.

    Returns:
        The settings, with fewer connections where the system allows no more.

    Raises:
        UserError: It does not even allow a few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + RESERVE
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return settings
    allowed = needed if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if needed <= allowed:
        return settings
    connections = allowed - RESERVE
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


async def empty_backlog(listener: socket.socket) -> None:
    """Wait until every connection that clients have is accepted, and let no new one come.

    What waits in the backlog when a port is closed is reset, requests and all. So the system is
    told to drop what would begin another connection, as if it were lost on the way (its client
    tries again a second later, and finds the port closed), and the rest is accepted. Elsewhere than
    on Linux connections may still come between the last look and the end.
    """
    if sys.platform == "linux":
        drop_new(listener)
    await asyncio.sleep(SETTLE)
    backlog = select.poll()
    backlog.register(listener, select.POLLIN)
    for _ in range(LOOKS):
        await asyncio.sleep(LOOK)
        if not backlog.poll(0):
            return
    log("backlog", "error", why="connections still wait to be accepted; the port closes")


def drop_new(listener: socket.socket) -> None:
    """Make the system drop requests for connections; those that it has begun go on."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
