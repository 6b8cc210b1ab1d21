"""What a server is started with."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        rows: images in it.
        nonfinite: whether NaN and infinities are passed to the model.
    """

    rows: int = 10_000
    nonfinite: bool = False


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host: address to listen on.
        port: to listen on; 0: any that is free.
        grpc_port: for calls over gRPC; 0: any that is free; None: no gRPC.
        workers: processes that share the ports.
        limits: of a request's content.
        max_body: bytes of a request's body, also after decompression.
        max_bodies: bytes of all bodies on their way or being answered over HTTP; more get 503.
        max_head: bytes of its request line and headers.
        max_connections: open at once; one more gets 503.
        queue: requests that may wait for the model; one more gets 503.
        head_timeout: seconds that a client has for the head of a request.
        body_timeout: seconds for its body.
        write_timeout: seconds that a client may take none of its answer.
        keep_alive: seconds that a connection may lie idle between requests.
        drain_delay: seconds for which a stopped server, no longer ready, still takes connections.
        drain: seconds that requests in flight then have to end.
        token: that requests must bear, health checks aside; None: none.
        origins: from which pages of other sites may ask; none: no cross-origin requests.
        access_log: whether each request is a line in the log.
        watch: seconds between looks at whether the models' files have changed; 0: never, nor at
            MLflow's registry.
        watch_registry: seconds between looks at MLflow's registry; 0: never.
        state: folder for what the processes of one server share.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    workers: int = 1
    limits: Limits = field(default_factory=Limits)
    max_body: int = 32 << 20
    max_bodies: int = 256 << 20
    max_head: int = 32 << 10
    max_connections: int = 4096
    queue: int = 512
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive: float = 75.0
    drain_delay: float = 1.0
    drain: float = 20.0
    token: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    access_log: bool = False
    watch: float = 1.0
    watch_registry: float = 10.0
    state: Path | None = None

    @property
    def registry_period(self) -> float:
        """Seconds between looks at MLflow's registry; 0: never."""
        return self.watch_registry if self.watch else 0.0
