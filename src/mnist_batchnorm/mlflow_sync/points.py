"""Metric values as MLflow stores them: with step and time."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from mnist_batchnorm.artifacts.curves import CURVE_COLUMNS

# Column of the learning curve -> metric. The UI draws a section of charts for each prefix, in
# alphabetical order.
CURVE = {name: f"curves/{name}" for name in CURVE_COLUMNS if name != "epoch"}


class Point(NamedTuple):
    """One value of a metric.

    Attributes:
        metric: name in MLflow.
        step: the epoch.
        value: the measured value.
        time: milliseconds since 1970.
    """

    metric: str
    step: int
    value: float
    time: int


def now() -> int:
    """Return the time as MLflow counts it: milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def curve_points(row: Mapping[str, float]) -> list[Point]:
    """Convert a row of the learning curve; the time is the row's ``time``, by default now."""
    when = int(row.get("time", now()))
    return [Point(CURVE[name], int(row["epoch"]), row[name], when) for name in CURVE]
