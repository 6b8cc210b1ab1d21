"""Close connections without losing the answers that were sent."""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios


def close_unless_unread(transport: asyncio.Transport) -> None:
    """Close a connection unless bytes have arrived that were not read yet.

    A transport closes at the end of the event loop's turn. The end of the stream is sent at once,
    so that a request can cross it within microseconds only.
    """
    descriptor = transport.get_extra_info("socket").fileno()
    if transport.is_closing() or descriptor < 0:
        return
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        (unread,) = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))
        if unread:
            return
        if transport.get_write_buffer_size() == 0:
            with contextlib.suppress(OSError):  # the client closed first
                connection.shutdown(socket.SHUT_WR)
    transport.close()


def reset(transport: asyncio.Transport) -> None:
    """Close a connection and discard unsent bytes, in the system's buffers too."""
    descriptor = transport.get_extra_info("socket").fileno()
    if descriptor >= 0:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
