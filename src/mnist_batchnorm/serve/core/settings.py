"""Settings of a server: the options of ``mnist-bn serve``."""

from dataclasses import dataclass, field
from pathlib import Path

# Folder of the metrics that processes share; prometheus_client reads the variable at import.
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"


@dataclass(frozen=True)
class Limits:
    """Limits on the content of a request."""

    rows: int = 10_000  # images
    nonfinite: bool = False  # whether NaN and infinities are passed to the model


@dataclass(frozen=True)
class Settings:
    """Settings of a server; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # HTTP port; 0: any free port
    grpc_port: int | None = None  # gRPC port; 0: any free port; None: no gRPC
    workers: int = 1  # processes that share the ports
    limits: Limits = field(default_factory=Limits)  # of a request's content
    max_body: int = 32 << 20  # size of a request body, also after decompression
    max_bodies: int = 256 << 20  # all bodies being received or answered over HTTP; more get 503
    max_head: int = 32 << 10  # size of a request line with its headers
    max_connections: int = 4096  # open connections; one more gets 503
    queue: int = 512  # requests waiting for the model; one more gets 503
    head_timeout: float = 10.0  # for receiving the request headers
    body_timeout: float = 30.0  # for receiving the body
    write_timeout: float = 30.0  # how long a client may read nothing of its answer
    keep_alive: float = 75.0  # how long a connection may be idle between requests
    drain_delay: float = 1.0  # how long to keep serving, reporting not ready, after SIGTERM
    drain: float = 20.0  # how long requests in flight may take after that
    # required in requests, except for health checks; None: no authentication
    token: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()  # sites whose pages may send requests (CORS); empty: none
    access_log: bool = False  # whether to log every request
    # interval between checks for changed model files; 0: never, nor MLflow's registry
    watch: float = 1.0
    watch_registry: float = 10.0  # interval between checks of MLflow's registry; 0: never
    state: Path | None = None  # folder that the processes of one server share

    @property
    def registry_period(self) -> float:
        """Interval between checks of MLflow's registry, in seconds; 0: never."""
        return self.watch_registry if self.watch else 0.0
