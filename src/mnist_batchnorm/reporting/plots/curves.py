"""Learning curves, of one run and of many seeds."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.reporting.plots.style import LOOKS, MUTED, SURFACE, styled_figure, to_svg

if TYPE_CHECKING:
    from mnist_batchnorm.artifacts.seeds import SeedRuns

Curves = Mapping[str, Mapping[str, Float64]]  # by network, by column of the learning curve
Measure = Literal["loss", "accuracy"]

UNITS: dict[Measure, str] = {"loss": "cross-entropy (nats)", "accuracy": "accuracy (%)"}
OUTLINE: dict[str, Any] = {"markeredgecolor": SURFACE, "markeredgewidth": 0.6}


def learning_curve(curves: Curves, split: str, measure: Measure, split_label: str) -> str:
    """Draw loss or accuracy on a split (``train`` or ``valid``) by epoch, a line per network."""
    title = f"{measure.capitalize()}, {split_label}"
    with styled_figure(4.6, 3.1) as figure:
        _draw_curves(figure.add_subplot(), curves, split, measure, title)
        return to_svg(figure, f"{title}, by epoch: batch norm against plain")


def overview(curves: Curves, split_labels: Mapping[str, str]) -> str:
    """Draw loss and accuracy on both splits as one picture on an opaque background."""
    measures: tuple[Measure, ...] = ("accuracy", "loss")
    with styled_figure(9.2, 6.2) as figure:
        axes = figure.subplots(2, 2)
        for row, measure in zip(axes, measures, strict=True):
            for cell, (split, label) in zip(row, split_labels.items(), strict=True):
                title = f"{measure.capitalize()}, {label}"
                _draw_curves(cell, curves, split, measure, title)
        return to_svg(figure, "Loss and accuracy by epoch: batch norm against plain")


def seeds(runs: "SeedRuns", split_label: str) -> str:
    """Draw the networks of every seed: valid accuracy by epoch, and test accuracy in pairs."""
    difference = runs.metrics.difference
    low, high = difference.interval_95
    gain = (
        f"batch norm \N{MINUS SIGN} plain: mean {format_points(difference.mean)} points, "
        f"95 % interval {format_points(low)} to {format_points(high)}"
    )
    with styled_figure(9.2, 3.7) as figure:
        curves, pairs = figure.subplots(1, 2, width_ratios=(1.2, 1))
        _draw_seed_curves(curves, runs, split_label)
        _draw_pairs(pairs, runs)
        pairs.set_xlabel(gain.replace(", ", ",\n", 1))
        return to_svg(
            figure,
            f"Valid accuracy by epoch and test accuracy from {runs.metrics.seeds} seeds, {gain}",
        )


def format_points(share: float) -> str:
    """Format a difference of shares in percentage points, signed: 0.0108 as ``+1.08``."""
    return f"{100 * share:+.2f}".replace("-", "\N{MINUS SIGN}")


def _draw_curves(axes: Axes, curves: Curves, split: str, measure: Measure, title: str) -> None:
    factor, form = (100, "{:.1f}") if measure == "accuracy" else (1, "{:.3f}")
    column, ends = f"{split}_{measure}", {}
    for name, curve in curves.items():
        axes.plot(curve["epoch"], factor * curve[column], **LOOKS[name].style, **OUTLINE)
        ends[name] = factor * float(curve[column][-1])
    _label_ends(axes, next(iter(curves.values()))["epoch"][-1], ends, form)
    # the same scale for train and valid, to compare the two pictures
    values = factor * np.concatenate(
        [curve[f"{s}_{measure}"] for curve in curves.values() for s in ("train", "valid")]
    )
    low, high = 0.0 if measure == "loss" else float(values.min()), float(values.max())
    margin = 0.1 * (high - low) or 1.0
    axes.set_ylim(low if measure == "loss" else low - margin, high + margin)
    _set_epoch_axis(axes, title, measure)


def _draw_seed_curves(axes: Axes, runs: "SeedRuns", split_label: str) -> None:
    ends = {}
    for name, curves in runs.curves.items():
        look, accuracy = LOOKS[name], 100 * curves["valid_accuracy"]
        ends[name] = 100 * float(curves["valid_accuracy"][:, -1].mean())
        axes.plot(runs.epoch, accuracy.T, color=look.color, linewidth=0.6, alpha=0.4)
        axes.plot(runs.epoch, accuracy.mean(axis=0), linewidth=2.4, **look.style, **OUTLINE)
    _label_ends(axes, runs.epoch[-1], ends, "mean {:.1f}")
    _set_epoch_axis(axes, f"Accuracy, {split_label}: {runs.metrics.seeds} seeds", "accuracy")


def _label_ends(axes: Axes, epoch: float, ends: Mapping[str, float], form: str) -> None:
    upper = max(ends, key=lambda name: ends[name])
    for name, end in ends.items():
        axes.annotate(
            f"{LOOKS[name].label}\n{form.format(end)}",
            (epoch, end),
            xytext=(6, 1 if name == upper else -1),
            textcoords="offset points",
            color=LOOKS[name].color,
            va="bottom" if name == upper else "top",
            linespacing=1.1,
        )


def _set_epoch_axis(axes: Axes, title: str, measure: Measure) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(title=title, xlabel="epoch", ylabel=UNITS[measure])


def _draw_pairs(axes: Axes, runs: "SeedRuns") -> None:
    order = list(reversed(LOOKS))  # plain first: a gain of batch norm goes up
    accuracy = {name: runs.metrics[name].test_accuracy for name in order}
    values = 100 * np.array([accuracy[name].values for name in order])
    axes.plot(range(len(order)), values, color=MUTED, linewidth=0.7, alpha=0.6, zorder=1)
    for place, name in enumerate(order):
        look, mean = LOOKS[name], 100 * accuracy[name].mean
        dots = look.style | OUTLINE | {"linestyle": "none", "markersize": 5}
        axes.plot(np.full(values.shape[1], place), values[place], **dots)
        side = 1 if place else -1
        axes.plot([place + 0.06 * side, place + 0.2 * side], [mean, mean], color=look.color)
        axes.annotate(
            f"{mean:.2f}\n± {100 * accuracy[name].sd:.2f}",
            (place + 0.23 * side, mean),
            color=look.color,
            ha="left" if place else "right",
            va="center",
            linespacing=1.2,
        )
    axes.set_xticks(range(len(order)), [LOOKS[name].label for name in order])
    axes.tick_params(axis="x", length=0)
    axes.set(
        title="Accuracy, test: a line a seed",
        ylabel=UNITS["accuracy"],
        xlim=(-0.75, len(order) - 0.25),
    )
