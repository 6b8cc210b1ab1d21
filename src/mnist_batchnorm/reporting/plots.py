"""The report's pictures as SVG text: the same numbers give the same bytes."""

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

    from mnist_batchnorm.artifacts.parity_report import Histogram
    from mnist_batchnorm.artifacts.seeds import SeedRuns
    from mnist_batchnorm.reporting.results import LayerStatistics

Floats = npt.NDArray[np.float64]
Curves = Mapping[str, Mapping[str, Floats]]
Measure = Literal["loss", "accuracy"]

SURFACE, INK, MUTED, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
BATCH_NORM, PLAIN = "#0063a6", "#b34700"  # blue and vermilion: apart for every kind of colour sight
ALARM = "#a40e26"
ERRORS = "#8a2252"
STRONGEST = 0.6  # share of ERRORS in the fullest cell: ink stays readable on it

UNITS: dict[Measure, str] = {"loss": "cross-entropy (nats)", "accuracy": "accuracy (%)"}

_STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Look:
    """How one network is drawn: never by colour alone."""

    label: str
    colour: str
    line: str
    marker: str


LOOKS = {
    "bn": Look("batch norm", BATCH_NORM, "-", "o"),
    "plain": Look("plain", PLAIN, "--", "s"),
}


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, a value for each bin that holds images.

    Attributes:
        confidence: mean probability given to the predicted class.
        accuracy: share of right predictions.
        interval: ``[2, bins]``, the accuracy's 95 % interval, low and high.
        images: how many fell into the bin.
    """

    confidence: Floats
    accuracy: Floats
    interval: Floats
    images: npt.NDArray[np.int64]


def learning_curve(curves: Curves, split: str, measure: Measure, split_label: str) -> str:
    """Draw one of the lecture's four pictures: a measure on a split, epoch by epoch.

    Args:
        curves: for each network its columns (``epoch``, ``train_loss`` …), float64 ``[epochs]``.
        split: ``train`` or ``valid``.
        measure: ``loss`` or ``accuracy``.
        split_label: what the split is called in the title.
    """
    title = f"{measure.capitalize()}, {split_label}"
    with _style():
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        _draw_curves(figure.add_subplot(), curves, split, measure, title)
        return _svg(figure, f"{title}, by epoch: batch norm against plain")


def overview(curves: Curves, split_labels: Mapping[str, str]) -> str:
    """Draw the four pictures as one, on an opaque background."""
    measures: tuple[Measure, ...] = ("accuracy", "loss")
    with _style():
        figure = Figure(figsize=(9.2, 6.2), layout="constrained")
        axes = figure.subplots(2, 2)
        for row, measure in zip(axes, measures, strict=True):
            for cell, (split, label) in zip(row, split_labels.items(), strict=True):
                title = f"{measure.capitalize()}, {label}"
                _draw_curves(cell, curves, split, measure, title)
        return _svg(figure, "Loss and accuracy by epoch: batch norm against plain")


def _draw_curves(axes: Axes, curves: Curves, split: str, measure: Measure, title: str) -> None:
    factor = 100 if measure == "accuracy" else 1
    ends = {name: curve[f"{split}_{measure}"][-1] for name, curve in curves.items()}
    upper = max(ends, key=lambda name: float(ends[name]))
    for name, curve in curves.items():
        look, values = LOOKS[name], factor * curve[f"{split}_{measure}"]
        axes.plot(
            curve["epoch"],
            values,
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markeredgecolor=SURFACE,
            markeredgewidth=0.6,
        )
        axes.annotate(
            f"{look.label}\n{values[-1]:.{1 if measure == 'accuracy' else 3}f}",
            (curve["epoch"][-1], values[-1]),
            xytext=(6, 1 if name == upper else -1),
            textcoords="offset points",
            color=look.colour,
            va="bottom" if name == upper else "top",
            linespacing=1.1,
        )
    # the same scale for train and valid, so that the two pictures can be compared
    every = factor * np.concatenate(
        [curve[f"{s}_{measure}"] for curve in curves.values() for s in ("train", "valid")]
    )
    low = 0.0 if measure == "loss" else float(every.min())
    margin = 0.1 * (float(every.max()) - low) or 1.0
    axes.set_ylim(low if measure == "loss" else low - margin, float(every.max()) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(title=title, xlabel="epoch", ylabel=UNITS[measure])


def seeds(runs: "SeedRuns", split_label: str) -> str:
    """Draw both networks from every seed: valid accuracy by epoch, and test accuracy in pairs.

    Args:
        runs: of stage seeds.
        split_label: what valid is called in the title.
    """
    difference = runs.metrics.difference
    low, high = difference.interval_95
    gain = (
        f"batch norm \N{MINUS SIGN} plain: mean {points(difference.mean)} points, "
        f"95 % interval {points(low)} to {points(high)}"
    )
    with _style():
        figure = Figure(figsize=(9.2, 3.7), layout="constrained")
        curves, pairs = figure.subplots(1, 2, width_ratios=(1.2, 1))
        _draw_seed_curves(curves, runs, split_label)
        _draw_pairs(pairs, runs)
        pairs.set_xlabel(gain.replace(", ", ",\n", 1))
        return _svg(
            figure,
            f"Valid accuracy by epoch and test accuracy from {runs.metrics.seeds} seeds, {gain}",
        )


def _draw_seed_curves(axes: Axes, runs: "SeedRuns", split_label: str) -> None:
    ends = {name: float(of["valid_accuracy"][:, -1].mean()) for name, of in runs.curves.items()}
    upper = max(ends, key=lambda name: ends[name])
    for name, curves in runs.curves.items():
        look, accuracy = LOOKS[name], 100 * curves["valid_accuracy"]
        axes.plot(runs.epoch, accuracy.T, color=look.colour, linewidth=0.6, alpha=0.4)
        axes.plot(
            runs.epoch,
            accuracy.mean(axis=0),
            color=look.colour,
            linestyle=look.line,
            linewidth=2.4,
            marker=look.marker,
            markeredgecolor=SURFACE,
            markeredgewidth=0.6,
        )
        axes.annotate(
            f"{look.label}\nmean {100 * ends[name]:.1f}",
            (runs.epoch[-1], 100 * ends[name]),
            xytext=(6, 1 if name == upper else -1),
            textcoords="offset points",
            color=look.colour,
            va="bottom" if name == upper else "top",
            linespacing=1.1,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(
        title=f"Accuracy, {split_label}: {runs.metrics.seeds} seeds",
        xlabel="epoch",
        ylabel=UNITS["accuracy"],
    )


def _draw_pairs(axes: Axes, runs: "SeedRuns") -> None:
    order = list(reversed(LOOKS))  # from plain to batch norm: what batch norm adds goes up
    accuracy = {name: runs.metrics[name].test_accuracy for name in order}
    values = 100 * np.array([accuracy[name].values for name in order])
    axes.plot(range(len(order)), values, color=MUTED, linewidth=0.7, alpha=0.6, zorder=1)
    for place, name in enumerate(order):
        look, mean = LOOKS[name], 100 * accuracy[name].mean
        axes.plot(
            np.full(values.shape[1], place),
            values[place],
            color=look.colour,
            linestyle="none",
            marker=look.marker,
            markersize=5,
            markeredgecolor=SURFACE,
            markeredgewidth=0.6,
        )
        side = 1 if place else -1
        axes.plot([place + 0.06 * side, place + 0.2 * side], [mean, mean], color=look.colour)
        axes.annotate(
            f"{mean:.2f}\n± {100 * accuracy[name].sd:.2f}",
            (place + 0.23 * side, mean),
            color=look.colour,
            ha="left" if place else "right",
            va="center",
            linespacing=1.2,
        )
    axes.set_xticks(range(len(order)), [LOOKS[name].label for name in order])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set(
        title="Accuracy, test: a line a seed",
        ylabel=UNITS["accuracy"],
        xlim=(-0.75, len(order) - 0.25),
    )


def points(share: float) -> str:
    """Write a difference of shares in percentage points, signed: 0.0108 as ``+1.08``."""
    return f"{100 * share:+.2f}".replace("-", "\N{MINUS SIGN}")


def confusion(matrix: npt.NDArray[np.int64], strongest: int, title: str) -> str:
    """Draw a confusion matrix in which the right answers do not outshine the errors.

    Args:
        matrix: int64 ``[classes, classes]``, rows actual, columns predicted.
        strongest: the count of errors that gets the fullest colour.
        title: above the picture.
    """
    classes = len(matrix)
    strength = STRONGEST * np.minimum(matrix / max(strongest, 1), 1)[..., None]
    colours = (1 - strength) * np.array(to_rgb(SURFACE)) + strength * np.array(to_rgb(ERRORS))
    colours[np.diag_indices(classes)] = to_rgb("#eceff2")
    with _style():
        figure = Figure(figsize=(5.0, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(colours, edgecolors=RULE, linewidth=0.6)
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
        centres, names = np.arange(classes) + 0.5, [str(digit) for digit in range(classes)]
        axes.set_xticks(centres, names)
        axes.set_yticks(centres, names)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set(title=title, xlabel="predicted", ylabel="actual")
        return _svg(figure, f"Confusion matrix: {title}")


def reliability_diagram(results: Mapping[str, Reliability]) -> str:
    """Draw accuracy against confidence, and below how many images each bin holds."""
    with _style():
        figure = Figure(figsize=(4.6, 4.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
        upper.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=":", label="calibrated")
        for name, result in results.items():
            look, accuracy = LOOKS[name], 100 * result.accuracy
            style: dict[str, Any] = {
                "color": look.colour, "linestyle": look.line, "marker": look.marker,
                "linewidth": 1.2, "label": look.label,
            }  # fmt: skip
            upper.errorbar(
                100 * result.confidence,
                accuracy,
                np.abs(100 * result.interval - accuracy),
                elinewidth=0.8,
                **style,
            )
            lower.plot(100 * result.confidence, result.images, **style)
        upper.set(title="Calibration, test images", ylabel="right (%)", ylim=(0, 103))
        upper.legend(loc="lower right")
        lower.set(xlabel="confidence: probability of the predicted class (%)", xlim=(0, 103))
        _count_images(lower)
        return _svg(figure, "Reliability diagram: accuracy against confidence")


def arriving_statistics(layers: "Mapping[str, LayerStatistics]") -> str:
    """Draw what each batch-norm layer's units receive: running mean ± standard deviation."""
    units = {name: (layer.mean, layer.deviation) for name, layer in layers.items()}
    return _draw_units(layers, units, "what arrives")


def leaving_statistics(layers: "Mapping[str, LayerStatistics]") -> str:
    """Draw what each batch-norm layer's units pass on: shift ± |scale|."""
    units = {name: (layer.shift, np.abs(layer.scale)) for name, layer in layers.items()}
    return _draw_units(layers, units, "what leaves")


def _draw_units(
    layers: "Mapping[str, LayerStatistics]", units: Mapping[str, tuple[Floats, Floats]], title: str
) -> str:
    with _style():
        figure = Figure(figsize=(4.6, 0.4 + 2.4 * len(layers)), layout="constrained")
        rows = figure.subplots(len(layers), squeeze=False)[:, 0]
        for (name, layer), axes in zip(layers.items(), rows, strict=True):
            # the same in both pictures, so that a unit can be followed from one to the other
            order = np.argsort(layer.mean, kind="stable")
            mean, deviation = units[name]
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
            axes.grid(visible=False, axis="x")
            axes.set_xticks([])
            axes.set(title=f"{name}: {title}", ylabel="mean ± sd")
        rows[-1].set_xlabel("units, by running mean")
        return _svg(figure, f"Batch norm, {title} at each unit: mean ± sd")


def error_histogram(name: str, errors: "Histogram") -> str:
    """Draw how many images have how large an error, and how far that is from the alarm.

    Args:
        name: the ONNX file.
        errors: in standard deviations of the rounding error.
    """
    edges, counts = np.array(errors.edges), np.array(errors.counts)
    alarm = errors.edges[-1]
    widths = np.append(np.diff(edges), edges[-1] - edges[-2])
    colours = np.append(np.full(len(counts) - 1, BATCH_NORM), ALARM)
    images, held = int(counts.sum()), counts > 0
    beyond = f"{counts[-1]:,} beyond" if counts[-1] else "none beyond"
    low = 0.6  # of the logarithmic axis: a single image is a bar
    with _style():
        figure = Figure(figsize=(4.6, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(
            edges[held],
            counts[held] - low,
            widths[held],
            low,
            align="edge",
            color=colours[held],
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
        axes.grid(visible=False, axis="x")
        axes.set(
            title=f"{name}: {images:,} images",
            xlim=(0, alarm + widths[-1]),
            ylim=(low, 30 * max(images, 1)),  # as high for every file, with room for the label
            xlabel="largest error, in standard deviations of rounding",
        )
        return _svg(figure, f"{name}: largest error of each image, {beyond} the alarm")


def _count_images(axes: Axes) -> None:
    axes.set(yscale="log", ylabel="images")
    axes.yaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


@contextlib.contextmanager
def _style() -> Iterator[None]:
    # from Matplotlib's own defaults: the reader's matplotlibrc must not change the bytes
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _svg(figure: Figure, title: str) -> str:
    # the salt makes ids differ between pictures, so that several fit on one page
    with mpl.rc_context({"svg.hashsalt": title}):
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        # savefig draws everything twice, the first time only to lay it out
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Title": title, **nothing})  # type: ignore[no-untyped-call]
    return text.getvalue()


def png_uri(image: npt.NDArray[np.uint8]) -> str:
    """Encode a uint8 ``[28, 28]`` image, 255 = full ink, as dark ink on white paper."""
    png = io.BytesIO()
    unsigned: dict[str, Any] = {"Software": None}  # else Matplotlib writes its version
    imsave(png, image, cmap="gray_r", vmin=0, vmax=255, format="png", metadata=unsigned)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
