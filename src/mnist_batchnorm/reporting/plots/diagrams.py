"""Confusion matrix, reliability diagram, unit statistics, error histogram."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from mnist_batchnorm.reporting.figures import Reliability
from mnist_batchnorm.reporting.plots.style import (
    ALARM,
    BATCH_NORM,
    ERRORS,
    INK,
    LOOKS,
    MUTED,
    RULE,
    SURFACE,
    styled_figure,
    to_svg,
)

if TYPE_CHECKING:
    from mnist_batchnorm.artifacts.checkpoints import LayerStatistics
    from mnist_batchnorm.parity.report import Histogram

MAX_ERROR_SHADE = 0.6  # share of ERRORS in the fullest cell, on which ink is readable


def confusion(matrix: npt.NDArray[np.int64], strongest: int, title: str) -> str:
    """Draw a confusion matrix that colors the errors only.

    Args:
        matrix: int64 ``[classes, classes]``, rows actual, columns predicted.
        strongest: number of errors in a cell of the fullest color.
        title: above the picture.
    """
    classes = len(matrix)
    shade = MAX_ERROR_SHADE * np.minimum(matrix / max(strongest, 1), 1)[..., None]
    colors = (1 - shade) * np.array(to_rgb(SURFACE)) + shade * np.array(to_rgb(ERRORS))
    colors[np.diag_indices(classes)] = to_rgb("#eceff2")
    with styled_figure(5.0, 5.2) as figure:
        axes = figure.add_subplot()
        axes.pcolormesh(colors, edgecolors=RULE, linewidth=0.6)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                right = row == column
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    str(count),
                    ha="center",
                    va="center",
                    color=MUTED if right else INK,
                    fontsize=9,
                )
        centers, names = np.arange(classes) + 0.5, [str(digit) for digit in range(classes)]
        axes.set_xticks(centers, names)
        axes.set_yticks(centers, names)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set(title=title, xlabel="predicted", ylabel="actual")
        return to_svg(figure, f"Confusion matrix: {title}")


def reliability_diagram(results: Mapping[str, Reliability]) -> str:
    """Draw accuracy against confidence, and below it the number of images per bin."""
    with styled_figure(4.6, 4.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        upper.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=":", label="calibrated")
        for name, result in results.items():
            look, accuracy = LOOKS[name], 100 * result.accuracy
            style = look.style | {"linewidth": 1.2, "label": look.label}
            upper.errorbar(
                100 * result.confidence,
                accuracy,
                np.abs(100 * result.interval - accuracy),
                elinewidth=0.8,
                **style,
            )
            lower.plot(100 * result.confidence, result.images, **style)
        for axes in (upper, lower):
            axes.grid(visible=True, axis="x")
        upper.set(title="Calibration, test images", ylabel="right (%)", ylim=(0, 103))
        upper.legend(loc="lower right")
        lower.set(xlabel="confidence: probability of the predicted class (%)", xlim=(0, 103))
        _count_images(lower)
        return to_svg(figure, "Reliability diagram: accuracy against confidence")


def unit_statistics(
    layers: "Mapping[str, LayerStatistics]", side: Literal["arrives", "leaves"]
) -> str:
    """Draw a mean ± standard deviation for each unit of each batch-norm layer.

    Args:
        layers: layers by name.
        side: ``arrives``: running statistics of the input; ``leaves``: shift and |scale|, those of
            the output.
    """
    title = f"what {side}"
    with styled_figure(4.6, 0.4 + 2.4 * len(layers)) as figure:
        rows = figure.subplots(len(layers), squeeze=False)[:, 0]
        for (name, layer), axes in zip(layers.items(), rows, strict=True):
            # the same order in both pictures
            order = np.argsort(layer.mean, kind="stable")
            mean, deviation = layer.mean, layer.deviation
            if side == "leaves":
                mean, deviation = layer.shift, np.abs(layer.scale)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.errorbar(
                np.arange(len(order)),
                mean[order],
                deviation[order],
                color=BATCH_NORM,
                linestyle="none",
                marker="o",
                elinewidth=1,
            )
            axes.set_xticks([])
            axes.set(title=f"{name}: {title}", ylabel="mean ± sd")
        rows[-1].set_xlabel("units, by running mean")
        return to_svg(figure, f"Batch norm, {title} at each unit: mean ± sd")


def error_histogram(name: str, errors: "Histogram") -> str:
    """Draw the images' largest errors, in standard deviations of rounding, and the alarm."""
    edges, counts = np.array(errors.edges), np.array(errors.counts)
    alarm = errors.edges[-1]
    widths = np.append(np.diff(edges), edges[-1] - edges[-2])
    colors = np.append(np.full(len(counts) - 1, BATCH_NORM), ALARM)
    images, filled = int(counts.sum()), counts > 0
    beyond = f"{counts[-1]:,} beyond" if counts[-1] else "none beyond"
    low = 0.6  # of the logarithmic axis: one image is a visible bar
    with styled_figure(4.6, 3.1) as figure:
        axes = figure.add_subplot()
        axes.bar(
            edges[filled],
            counts[filled] - low,
            widths[filled],
            low,
            align="edge",
            color=colors[filled],
            edgecolor=SURFACE,
            linewidth=0.6,
        )
        axes.axvline(alarm, color=ALARM, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"alarm at {alarm:g}\n{beyond}",
            (alarm, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-6, -2),
            textcoords="offset points",
            color=ALARM,
            ha="right",
            va="top",
        )
        _count_images(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(
            title=f"{name}: {images:,} images",
            xlim=(0, alarm + widths[-1]),
            ylim=(low, 30 * max(images, 1)),  # the same for every file, with room for the label
            xlabel="largest error, in standard deviations of rounding",
        )
        return to_svg(figure, f"{name}: largest error of each image, {beyond} the alarm")


def _count_images(axes: Axes) -> None:
    axes.set(yscale="log", ylabel="images")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
