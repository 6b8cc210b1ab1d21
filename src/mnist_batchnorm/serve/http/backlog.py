"""Accept every connection that waits before the port closes, so that no request is reset."""

import asyncio
import ctypes
import select
import socket
import struct
import sys

from mnist_batchnorm.serve.core.log import log

HANDSHAKE_S = 0.25  # for handshakes that have begun
POLL_INTERVAL_S = 0.01
MAX_POLLS = 500

SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it
# Classic BPF on a TCP header: a segment with SYN (2 in byte 13) is dropped, all others pass.
# Code, jump if true, jump if false, operand: linux/filter.h.
DROP_SYN = (
    (0x30, 0, 0, 13),  # load byte
    (0x45, 0, 1, 0x02),  # test bits
    (0x06, 0, 0, 0),  # return 0 bytes
    (0x06, 0, 0, 0xFFFFFFFF),  # return all
)


async def drain_backlog(listener: socket.socket) -> None:
    """Refuse new connections and wait until those in the backlog are accepted.

    Closing a port resets what waits in its backlog, requests included. So the system first drops
    each new SYN as if it were lost (the client retries a second later and finds the port closed).
    Other systems than Linux can still lose a connection that comes after the last poll.
    """
    if sys.platform == "linux":
        drop_new_connections(listener)
    await asyncio.sleep(HANDSHAKE_S)
    backlog = select.poll()
    backlog.register(listener, select.POLLIN)
    for _ in range(MAX_POLLS):
        await asyncio.sleep(POLL_INTERVAL_S)
        if not backlog.poll(0):
            return
    log("backlog", "error", why="connections still wait to be accepted; the port closes")


def drop_new_connections(listener: socket.socket) -> None:
    """Attach a socket filter that drops each SYN; handshakes that have begun go on."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
