"""What Prometheus sees of the server.

Where ``PROMETHEUS_MULTIPROC_DIR`` is set before the import, the processes of one server keep their
figures in that folder, and each answers for all.
"""

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import sub

import prometheus_client as prometheus
from prometheus_client import multiprocess

from mnist_batchnorm.serve.core.metrics_dir import SHARED

prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

STAGES = ("parse", "infer", "encode")
# Seconds. One image takes some 10 microseconds a stage, the largest request a tenth of a second.
BUCKETS = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5)
FEW = 4  # values that are observed in less time one by one
NAMESPACE = "mnist_bn"


class Durations(prometheus.Histogram):
    """A histogram that takes many values in the time of a few."""

    def observe_all(self, seconds: Sequence[float]) -> None:
        """Observe each of them."""
        if len(seconds) < FEW:
            for one in seconds:
                self.observe(one)
            return
        buckets = Counter(bisect_left(self._upper_bounds, one) for one in seconds)
        for place, count in buckets.items():
            self._buckets[place].inc(count)
        self._sum.inc(sum(seconds))


@dataclass(slots=True)
class Meters:
    """What one version of a model is measured by.

    Attributes:
        last: when it last answered, by `time.perf_counter`; 0: never.
        noted: the one of these moments that the figures hold.
        uncounted: what `answered` was told of requests that the figures do not hold yet.
    """

    requests: prometheus.Counter
    rows: prometheus.Counter
    failures: prometheus.Summary
    answers: prometheus.Gauge
    parse: Durations
    infer: Durations
    encode: Durations
    last: float = field(init=False, default=0.0)
    noted: float = field(init=False, default=0.0)
    uncounted: list[tuple[int, float, float, float, float]] = field(
        init=False, default_factory=list
    )

    def answered(self, rows: int, began: float, parsed: float, ran: float, encoded: float) -> None:
        """Note a request, with the moments at which its stages ended, in seconds."""
        self.uncounted.append((rows, began, parsed, ran, encoded))

    def count(self) -> None:
        """Put what was noted into the figures: takes less time for several at once."""
        if not self.uncounted:
            return
        rows, began, parsed, ran, encoded = zip(*self.uncounted, strict=True)
        self.requests.inc(len(rows))
        self.rows.inc(sum(rows))
        self.parse.observe_all(list(map(sub, parsed, began)))
        self.infer.observe_all(list(map(sub, ran, parsed)))
        self.encode.observe_all(list(map(sub, encoded, ran)))
        self.last = encoded[-1]
        self.uncounted.clear()

    def failed(self, seconds: float) -> None:
        """Count a request that was not answered, with the time since it came."""
        self.failures.observe(seconds)

    def note(self) -> None:
        """Put the time of the last answer into the figures; too slow to do it at each."""
        last = self.last
        if last != self.noted:
            self.answers.set(time.time() - (time.perf_counter() - last))
            self.noted = last


class Metrics:
    """All counters, gauges and histograms of a process."""

    def __init__(self) -> None:
        self._own = own = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "requests",
            "Inference requests answered.",
            ["model", "version"],
            NAMESPACE,
            registry=own,
        )
        self._rows = prometheus.Counter(
            "rows", "Images classified.", ["model", "version"], NAMESPACE, registry=own
        )
        self._rejects = prometheus.Counter(
            "rejects", "Requests refused, by reason.", ["reason", "model"], NAMESPACE, registry=own
        )
        self._failures = prometheus.Summary(
            "failed_seconds",
            "Time of inference requests that were refused or failed.",
            ["model", "version"],
            NAMESPACE,
            registry=own,
        )
        self._answers = prometheus.Gauge(
            "last_inference_timestamp_seconds",
            "When an inference request was last answered, since the epoch; 0: never.",
            ["model", "version"],
            NAMESPACE,
            registry=own,
            multiprocess_mode="max",
        )
        self._meters: dict[tuple[str, str], Meters] = {}
        self._seconds = Durations(
            "stage_seconds",
            "Time of an inference request by stage.",
            ["stage", "model", "version"],
            NAMESPACE,
            registry=own,
            buckets=BUCKETS,
        )
        self._models = prometheus.Gauge(
            "model_info",
            "1 for each model that is served now.",
            ["model", "version", "sha256", "verified"],
            NAMESPACE,
            registry=own,
            multiprocess_mode="livemax",
        )
        self._swaps = prometheus.Counter(
            "swaps", "Model files loaded or refused.", ["model", "outcome"], NAMESPACE, registry=own
        )
        self.queue = prometheus.Gauge(
            "queue",
            "Requests being read, waiting or answered.",
            namespace=NAMESPACE,
            registry=own,
            multiprocess_mode="livesum",
        )
        self.connections = prometheus.Gauge(
            "connections",
            "Open connections.",
            namespace=NAMESPACE,
            registry=own,
            multiprocess_mode="livesum",
        )
        if SHARED not in os.environ:
            prometheus.ProcessCollector(registry=own)
            prometheus.PlatformCollector(registry=own)

    def of(self, model: str, version: str) -> Meters:
        """Return the meters of a version, the same ones each time."""
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

    def count(self) -> None:
        """Count what is noted."""
        for meters in self._meters.values():
            meters.count()

    def note(self) -> None:
        """Put into the figures what is kept beside them, for the server's other processes."""
        for meters in self._meters.values():
            meters.note()

    def rejected(self, reason: str, model: str = "") -> None:
        """Count a request that was refused."""
        self._rejects.labels(reason, model).inc()

    def swapped(self, model: str, outcome: str) -> None:
        """Count a model file that was ``loaded`` or ``refused``."""
        self._swaps.labels(model, outcome).inc()

    def served(self, model: str, version: str, sha256: str, verified: bool, now: bool) -> None:
        """Note whether a version is served now."""
        self._models.labels(model, version, sha256, str(verified).lower()).set(int(now))

    def merged(self) -> prometheus.CollectorRegistry:
        """Return the figures of all processes of the server."""
        self.note()
        if SHARED not in os.environ:
            return self._own
        everyone = prometheus.CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        return everyone

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return prometheus.generate_latest(self.merged())


def statistics(
    figures: prometheus.CollectorRegistry, model: str, version: str
) -> dict[str, object]:
    """Return what the protocol's statistics extension tells of a version.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
    """
    of = {"model": model, "version": version}

    def figure(name: str, **labels: str) -> float:
        return figures.get_sample_value(f"{NAMESPACE}_{name}", {**of, **labels}) or 0.0

    seconds = {stage: figure("stage_seconds_sum", stage=stage) for stage in STAGES}
    requests = round(figure("requests_total"))

    def duration(value: float) -> dict[str, int]:
        return {"count": requests, "ns": round(value * 1e9)}

    failures = round(figure("failed_seconds_count"))
    nothing = {"count": 0, "ns": 0}
    return {
        "name": model,
        "version": version,
        "last_inference": int(figure("last_inference_timestamp_seconds") * 1000),
        "inference_count": round(figure("rows_total")),
        "execution_count": requests,
        "inference_stats": {
            "success": duration(sum(seconds.values())),
            "fail": {"count": failures, "ns": round(figure("failed_seconds_sum") * 1e9)},
            "queue": duration(0.0),
            "compute_input": duration(seconds["parse"]),
            "compute_infer": duration(seconds["infer"]),
            "compute_output": duration(seconds["encode"]),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
        "memory_usage": [],
    }


def forget(process: int) -> None:
    """Take a process that died out of the figures that are about the present."""
    if SHARED in os.environ:
        multiprocess.mark_process_dead(process)  # type: ignore[no-untyped-call]
