"""Which pages may ask: none that another site had a browser of this machine load.

Such a page reaches a server without a token in two ways. By DNS rebinding: it makes its own name
lead to this machine, and what it asks then counts as its own site, which ``Host`` names. And by
requests that browsers send unasked to any site, of which ``Origin`` names the sender.
"""

import re

from mnist_batchnorm.core.access import is_loopback
from mnist_batchnorm.serve.core.protocol import RequestError, refuse
from mnist_batchnorm.serve.core.settings import Settings

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]*)?", re.IGNORECASE)  # RFC 3986, 3.2
READS = frozenset(("GET", "HEAD", "OPTIONS"))  # whose answers a browser keeps from other sites
KEPT = 64  # values that have been accepted and are not looked at again
LONGEST = 100  # bytes of such a value


class Site:
    """What a server knows of the sites that its requests are for and from.

    Args:
        settings: how to serve.
    """

    def __init__(self, settings: Settings) -> None:
        self._guarded = settings.token is None  # no page of another site knows the token
        self._loopback = self._guarded and is_loopback(settings.host)
        self._origins = frozenset(origin.encode() for origin in settings.origins)
        self._accepted: set[bytes | None] = set()

    def check(self, head: dict[bytes, bytes], method: str, version: str) -> None:
        """Make sure that a request is meant for this server and comes from no other site's page.

        Args:
            head: headers of the request.
            method: of it.
            version: of HTTP.

        Raises:
            RequestError: It does not say which host it is for (RFC 9112, section 3.2), or names
                several or another; or it is from a page of a site that may not ask.
        """
        host = head.get(b"host")
        if host not in self._accepted:
            self._check_host(host, version)
        if b"origin" in head and self._guarded and method not in READS:
            self._check_origin(head[b"origin"], host)

    def _check_host(self, host: bytes | None, version: str) -> None:
        if host is None:
            if version == "1.1":
                raise RequestError("Host: got none, expected one, as HTTP/1.1 has it", 400, "host")
            return
        if b"," in host:
            refuse("Host", host.decode("latin-1"), "one host", "host")
        if self._loopback:
            text = host.decode("latin-1")
            found = HOST.fullmatch(text)
            if not found or not is_loopback(found[1].strip("[]").lower()):
                expected = "localhost or an address like 127.0.0.1, as the server has no token"
                refuse("Host", text, expected, "host", 403)
        if len(self._accepted) < KEPT and len(host) <= LONGEST:
            self._accepted.add(host)

    def _check_origin(self, origin: bytes, host: bytes | None) -> None:
        own = origin.partition(b"://")[2].lower() == (host or b"").lower()
        if not own and origin not in self._origins and b"*" not in self._origins:
            expected = "this server's own pages or a site that --cors names"
            refuse("Origin", origin.decode("latin-1"), expected, "origin", 403)
