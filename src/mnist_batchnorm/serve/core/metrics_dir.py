"""TODO."""

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client keeps what processes share
