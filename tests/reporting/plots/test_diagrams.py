"""Confusion matrix, unit statistics and error histogram."""

import re
from dataclasses import replace
from functools import partial
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pytest

from mnist_batchnorm.artifacts.checkpoints import LayerStatistics
from mnist_batchnorm.parity.report import Histogram
from mnist_batchnorm.reporting.plots.diagrams import confusion, error_histogram, unit_statistics
from mnist_batchnorm.reporting.plots.style import ALARM, BATCH_NORM
from tests.support.svg import SVG, texts


def test_confusion_shows_counts_and_colors_errors_only() -> None:
    matrix = np.diag([90, 80, 70])
    matrix[0, 2] = 7
    found = texts(confusion(matrix, 7, "plain"))
    assert sorted(text for text in found if text.isdigit() and int(text) > 2) == [
        "7",
        "70",
        "80",
        "90",
    ]
    without = confusion(np.diag([90, 80, 70]), 0, "plain")
    full = "#b97a97"  # STRONGEST of ERRORS on SURFACE
    assert full in confusion(matrix, 7, "plain")
    assert full not in confusion(matrix, 70, "plain")
    assert full not in without


@pytest.mark.parametrize("side", ["arrives", "leaves"])
def test_statistics_have_a_row_a_layer(side: Literal["arrives", "leaves"]) -> None:
    title = f"what {side}"
    units = np.linspace(-1, 1, 5)
    layer = LayerStatistics(mean=units, deviation=units**2, scale=-units, shift=units)
    names = ("bn1", "bn2", "bn3")
    found = texts(unit_statistics(dict.fromkeys(names, layer), side))
    assert [text for text in found if title in text] == [f"{name}: {title}" for name in names]


def test_arriving_is_drawn_from_the_statistics_and_leaving_from_scale_and_shift() -> None:
    units = np.linspace(-1, 1, 5)
    layer = LayerStatistics(mean=units, deviation=units**2, scale=units, shift=units)
    arriving = partial(unit_statistics, side="arrives")
    leaving = partial(unit_statistics, side="leaves")
    usual = arriving({"bn1": layer}), leaving({"bn1": layer})
    for field, changed in (("deviation", 0), ("scale", 1), ("shift", 1)):
        other = {"bn1": replace(layer, **{field: getattr(layer, field) * 3})}
        differs = [arriving(other) != usual[0], leaving(other) != usual[1]]
        assert differs == [changed == 0, changed == 1]


def bars(svg: str) -> dict[str, list[float]]:
    """The heights of the filled, outlined shapes by their color, in points."""
    found: dict[str, list[float]] = {}
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        style = re.match(r"fill: (#\w+); stroke: #ffffff", path.get("style", ""))
        if style:
            heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path.attrib["d"])]
            found.setdefault(style[1], []).append(max(heights) - min(heights))
    return found


EDGES = [i / 2 for i in range(17)]


def test_histogram_has_a_bar_for_each_bin_with_images_and_another_for_the_beyond() -> None:
    errors = Histogram(edges=EDGES, counts=[100, 0, 10, 1, *[0] * 12, 100])
    svg = error_histogram("bn.onnx", errors)
    found = bars(svg)
    assert found.keys() == {BATCH_NORM, ALARM}
    hundred, ten, one = found[BATCH_NORM]
    assert hundred - ten == pytest.approx(ten - one, abs=1e-3)  # logarithmic
    assert one > 3  # points: a single image is seen
    assert found[ALARM] == [pytest.approx(hundred)]
    assert {"bn.onnx: 211 images", "alarm at 8", "100 beyond"} <= set(texts(svg))


def test_histogram_says_that_nothing_is_beyond_the_alarm() -> None:
    errors = Histogram(edges=EDGES, counts=[12_345, *[0] * 16])
    svg = error_histogram("bn-folded.onnx", errors)
    assert bars(svg).keys() == {BATCH_NORM}
    assert {"bn-folded.onnx: 12,345 images", "none beyond"} <= set(texts(svg))
    title = ElementTree.fromstring(svg).findtext(f"{SVG}title")
    assert title == "bn-folded.onnx: largest error of each image, none beyond the alarm"


def test_histogram_of_no_images_is_drawn() -> None:
    svg = error_histogram("bn.onnx", Histogram(edges=EDGES, counts=[0] * 17))
    assert bars(svg) == {}
    assert "bn.onnx: 0 images" in texts(svg)


def test_histograms_of_as_many_images_share_their_scale() -> None:
    def ticks(counts: list[int]) -> list[str]:
        svg = error_histogram("x", Histogram(edges=EDGES, counts=counts))
        return [text for text in texts(svg) if re.fullmatch(r"[\d,]+", text)]

    assert ticks([500, *[0] * 16]) == ticks([*[30] * 16, 20])
