"""Connections in the backlog are served before the port closes."""

import asyncio
import contextlib
import socket

import pytest

from mnist_batchnorm.serve.core.settings import Settings
from mnist_batchnorm.serve.http import backlog
from mnist_batchnorm.serve.process.listener import listen


def test_connections_in_the_backlog_are_served_and_new_ones_refused() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(Settings(port=0)))
        address = listener.getsockname()
        waiting = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        backlog.drop_new_connections(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.2)
        for client in waiting:
            client.sendall(b"asked")

        async def accept_late() -> list[bytes]:
            drained = asyncio.create_task(backlog.drain_backlog(listener))
            accepted = []
            for _ in waiting:
                await asyncio.sleep(0.03)
                assert not drained.done()
                accepted.append(stack.enter_context(listener.accept()[0]))
            await drained
            return [connection.recv(5) for connection in accepted]

        assert asyncio.run(accept_late()) == [b"asked"] * 20
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
