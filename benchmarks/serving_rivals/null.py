"""An ASGI application that reads the body and answers what it had ready: what uvicorn itself costs.

    python null.py PORT LOOP

``POST /N`` is answered by a JSON string of N bytes.
"""

import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]


@cache
def answer(path: str) -> tuple[Message, Message]:
    """Make the two messages of an answer once."""
    size = int(path[1:])
    body = json.dumps("x" * (size - 2)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % size)]
    return (
        {"type": "http.response.start", "status": 200, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Answer one request."""
    chunks = []
    more = True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    b"".join(chunks)
    start, body = answer(scope["path"])
    await send(start)
    await send(body)


def main() -> None:
    """Serve, with the settings that `mnist-bn serve` gives uvicorn."""
    port, loop = sys.argv[1:]
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(port),
        http="httptools",
        loop=loop,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        interface="asgi3",
    )


if __name__ == "__main__":
    main()
