"""Checks of the Host and Origin headers: protect a server without a token from other sites' pages.

A page that a browser on this machine loaded can reach the server in two ways. By DNS rebinding: the
page's own name resolves to this machine, so that the browser takes the server for the page's site;
``Host`` contains that name. And by cross-site requests that browsers send without a preflight
(CSRF); ``Origin`` contains the page's site.
"""

import re

from mnist_batchnorm.core.access import is_loopback
from mnist_batchnorm.serve.core.protocol import RequestError, refuse
from mnist_batchnorm.serve.core.service import Headers
from mnist_batchnorm.serve.core.settings import Settings

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]*)?", re.IGNORECASE)  # RFC 3986, 3.2
READS = frozenset(("GET", "HEAD", "OPTIONS"))  # a browser hides the answers from other sites
MAX_CACHED_HOSTS = 64
MAX_CACHED_HOST_BYTES = 100


class OriginPolicy:
    """The sites that requests may be addressed to and come from."""

    def __init__(self, settings: Settings) -> None:
        self._guarded = settings.token is None  # no other site knows the token
        self._loopback = self._guarded and is_loopback(settings.host)
        self._origins = frozenset(origin.encode() for origin in settings.origins)
        self._accepted_hosts: set[bytes | None] = set()

    def enforce(self, headers: Headers, method: str, version: str) -> None:
        """Check that a request is addressed to this server and does not come from another site.

        Raises:
            RequestError: Host is missing (RFC 9112, section 3.2), repeated or another host, or
                Origin is a site that may not send requests.
        """
        host = headers.get(b"host")
        if host not in self._accepted_hosts:
            self._check_host(host, version)
        if b"origin" in headers and self._guarded and method not in READS:
            self._check_origin(headers[b"origin"], host)

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
        if len(self._accepted_hosts) < MAX_CACHED_HOSTS and len(host) <= MAX_CACHED_HOST_BYTES:
            self._accepted_hosts.add(host)

    def _check_origin(self, origin: bytes, host: bytes | None) -> None:
        own = origin.partition(b"://")[2].lower() == (host or b"").lower()
        if not own and origin not in self._origins and b"*" not in self._origins:
            expected = "this server's own pages or a site that --cors names"
            refuse("Origin", origin.decode("latin-1"), expected, "origin", 403)
