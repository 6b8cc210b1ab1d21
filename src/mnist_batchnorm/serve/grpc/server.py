"""The gRPC port of a server."""

import asyncio
from collections.abc import Callable

import grpc

from mnist_batchnorm.core.errors import UserError
from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.grpc.service import GrpcService

POLL_INTERVAL_S = 0.1  # between checks for the shutdown
KEEPALIVE_MS = 60_000  # between pings that detect vanished clients
MIN_CLIENT_PING_MS = 10_000


class GrpcServer:
    """A port on which a service answers calls."""

    def __init__(self, service: GrpcService) -> None:
        self.service = service
        self.settings = service.settings
        self._server = grpc.aio.server(handlers=[service], options=channel_options(self.settings))

    async def start(self) -> str:
        """Accept calls; return the address, ``host:port``.

        Raises:
            UserError: The port cannot be bound.
        """
        assert self.settings.grpc_port
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        address = f"{host}:{self.settings.grpc_port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise UserError(f"cannot listen on {address}: {error}") from None
        await self._server.start()
        return address

    async def run(self, stopping: Callable[[], bool], at_once: Callable[[], bool]) -> None:
        """Answer calls until the server stops, and open ones until the time to drain is over.

        Args:
            stopping: whether to accept no more calls.
            at_once: whether to wait for nothing.
        """
        while not stopping():
            await asyncio.sleep(POLL_INTERVAL_S)
        await self.service.shutdown.drain(at_once)
        stop = asyncio.create_task(self._server.stop(self.settings.drain))
        while not stop.done():
            if at_once():
                await self._server.stop(None)
            await asyncio.wait({stop}, timeout=POLL_INTERVAL_S)
        await stop


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Return gRPC's options; see ``grpc/impl/channel_arg_names.h`` in its sources."""
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body),  # also after decompression
        ("grpc.max_metadata_size", settings.max_head),
        ("grpc.absolute_max_metadata_size", settings.max_head),
        ("grpc.max_concurrent_streams", settings.queue),  # per connection: more calls wait
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", round(settings.head_timeout * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.keep_alive * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
