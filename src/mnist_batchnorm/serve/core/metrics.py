"""The server's Prometheus metrics.

If ``PROMETHEUS_MULTIPROC_DIR`` is set before the import, the processes of a server keep their
figures in that folder, and each reports the sum of all.
"""

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import sub
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess

from mnist_batchnorm.serve.core.settings import METRICS_DIR

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

STAGES = ("parse", "infer", "encode")
# Seconds. One image takes some 10 microseconds a stage, the largest request a tenth of a second.
BUCKETS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5)
BATCH_MIN_VALUES = 4  # fewer are observed faster one by one
NAMESPACE = "mnist_bn"


class Durations(prometheus.Histogram):
    """A histogram that observes many values in the time of a few."""

    def observe_all(self, seconds: Sequence[float]) -> None:
        if len(seconds) < BATCH_MIN_VALUES:
            for value in seconds:
                self.observe(value)
            return
        buckets = Counter(bisect_left(self._upper_bounds, value) for value in seconds)
        for place, count in buckets.items():
            self._buckets[place].inc(count)
        self._sum.inc(sum(seconds))


@dataclass(slots=True)
class Meters:
    """The metrics of one version of a model."""

    requests: prometheus.Counter
    rows: prometheus.Counter
    failures: prometheus.Summary  # seconds from arrival to failure
    answers: prometheus.Gauge
    parse: Durations
    infer: Durations
    encode: Durations
    # of the last answer, by `time.perf_counter`; and the one that the gauge `answers` shows
    last: float = field(init=False, default=0.0)
    published: float = field(init=False, default=0.0)
    # answered requests: rows, arrival, and the end of each stage, by `time.perf_counter`
    pending: list[tuple[int, float, float, float, float]] = field(init=False, default_factory=list)

    def flush(self) -> None:
        """Add the recorded requests to the metrics; faster for several at once."""
        if not self.pending:
            return
        rows, began, decoded, ran, encoded = zip(*self.pending, strict=True)
        self.requests.inc(len(rows))
        self.rows.inc(sum(rows))
        self.parse.observe_all(list(map(sub, decoded, began)))
        self.infer.observe_all(list(map(sub, ran, decoded)))
        self.encode.observe_all(list(map(sub, encoded, ran)))
        self.last = encoded[-1]
        self.pending.clear()

    def publish_last(self) -> None:
        """Set the gauge of the last answer; too slow to be done for each."""
        if self.last != self.published:
            self.answers.set(time.time() - (time.perf_counter() - self.last))
            self.published = self.last


class Metrics:
    def __init__(self) -> None:
        self._own = prometheus.CollectorRegistry()
        self._meters: dict[tuple[str, str], Meters] = {}
        common: Any = {"namespace": NAMESPACE, "registry": self._own}
        counter: Callable[..., prometheus.Counter] = partial(prometheus.Counter, **common)
        gauge: Callable[..., prometheus.Gauge] = partial(prometheus.Gauge, **common)
        version = ("model", "version")
        self._requests = counter("requests", "Inference requests answered.", version)
        self._rows = counter("rows", "Images classified.", version)
        self._rejects = counter("rejects", "Requests refused, by reason.", ("reason", "model"))
        help_ = "Time of inference requests that were refused or failed."
        self._failures = prometheus.Summary("failed_seconds", help_, version, **common)
        self._answers = gauge(
            "last_inference_timestamp_seconds",
            "When an inference request was last answered, since the epoch; 0: never.",
            version,
            multiprocess_mode="max",
        )
        help_ = "Time of an inference request by stage."
        labels = ("stage", *version)
        self._seconds = Durations("stage_seconds", help_, labels, buckets=BUCKETS, **common)
        self._models = gauge(
            "model_info",
            "1 for each model that is served now.",
            (*version, "sha256", "verified"),
            multiprocess_mode="livemax",
        )
        self._swaps = counter("swaps", "Model files loaded or refused.", ("model", "outcome"))
        gauge = partial(gauge, multiprocess_mode="livesum")
        self.queue = gauge("queue", "Requests being read, waiting or answered.")
        self.connections = gauge("connections", "Open connections.")
        if METRICS_DIR not in os.environ:
            prometheus.ProcessCollector(registry=self._own)
            prometheus.PlatformCollector(registry=self._own)

    def meters(self, model: str, version: str) -> Meters:
        """Return the meters of a version, the same object each time."""
        key = model, version
        if key not in self._meters:
            self._meters[key] = Meters(
                self._requests.labels(*key),
                self._rows.labels(*key),
                self._failures.labels(*key),
                self._answers.labels(*key),
                **{stage: self._seconds.labels(stage, *key) for stage in STAGES},
            )
        return self._meters[key]

    def flush(self) -> None:
        for meters in self._meters.values():
            meters.flush()

    def publish_last(self) -> None:
        """Set the gauges of the last answers, which other processes of the server read."""
        for meters in self._meters.values():
            meters.publish_last()

    def rejected(self, reason: str, model: str = "") -> None:
        self._rejects.labels(reason, model).inc()

    def swapped(self, model: str, outcome: str) -> None:
        """Count a model file; the outcome is ``loaded`` or ``refused``."""
        self._swaps.labels(model, outcome).inc()

    def served(self, model: str, version: str, sha256: str, verified: bool, now: bool) -> None:
        self._models.labels(model, version, sha256, str(verified).lower()).set(int(now))

    def merged(self) -> prometheus.CollectorRegistry:
        """Return the metrics of all processes of the server."""
        self.publish_last()
        if METRICS_DIR not in os.environ:
            return self._own
        merged = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return merged

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus.generate_latest(self.merged())


def statistics(merged: prometheus.CollectorRegistry, model: str, version: str) -> dict[str, object]:
    """Return a version's statistics as in the protocol's statistics extension.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
    """

    def figure(name: str, **labels: str) -> float:
        labels |= {"model": model, "version": version}
        return merged.get_sample_value(f"{NAMESPACE}_{name}", labels) or 0.0

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(seconds * 1e9)}

    requests, failures = round(figure("requests_total")), round(figure("failed_seconds_count"))
    parse, infer, encode = (figure("stage_seconds_sum", stage=stage) for stage in STAGES)
    return {
        "name": model,
        "version": version,
        "last_inference": int(figure("last_inference_timestamp_seconds") * 1000),
        "inference_count": round(figure("rows_total")),
        "execution_count": requests,
        "inference_stats": {
            "success": duration(requests, parse + infer + encode),
            "fail": duration(failures, figure("failed_seconds_sum")),
            "queue": duration(requests, 0.0),
            "compute_input": duration(requests, parse),
            "compute_infer": duration(requests, infer),
            "compute_output": duration(requests, encode),
            "cache_hit": duration(0, 0.0),
            "cache_miss": duration(0, 0.0),
        },
        "batch_stats": [],
        "memory_usage": [],
    }


def forget(process: int) -> None:
    """Remove a process that died from the gauges of the present."""
    if METRICS_DIR in os.environ:
        multiprocess.mark_process_dead(process)  # type: ignore[no-untyped-call]
