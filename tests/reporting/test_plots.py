import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from mnist_batchnorm.artifacts.parity_report import Histogram
from mnist_batchnorm.artifacts.seeds import SeedMetrics, SeedRuns
from mnist_batchnorm.reporting import plots
from mnist_batchnorm.reporting.results import LayerStatistics

SVG = "{http://www.w3.org/2000/svg}"


def curve(loss: float, epochs: int = 3) -> dict[str, plots.Floats]:
    epoch = np.arange(1.0, epochs + 1)
    return {
        "epoch": epoch,
        "train_loss": loss / epoch,
        "train_accuracy": 1 - loss / epoch,
        "valid_loss": 2 * loss / epoch,
        "valid_accuracy": 1 - 2 * loss / epoch,
    }


CURVES = {"bn": curve(0.1), "plain": curve(0.2)}


def texts(svg: str) -> list[str]:
    return [
        "".join(text.itertext()).strip() for text in ElementTree.fromstring(svg).iter(f"{SVG}text")
    ]


def test_learning_curve_labels_each_line_with_its_last_value() -> None:
    found = texts(plots.learning_curve(CURVES, "valid", "accuracy", "valid (= test images)"))
    assert {"Accuracy, valid (= test images)", "epoch", "accuracy (%)"} <= set(found)
    for name, value in (("batch norm", "93.3"), ("plain", "86.7")):
        assert found[found.index(name) + 1] == value


def test_train_and_valid_share_their_scale() -> None:
    def ticks(split: str) -> list[str]:
        return texts(plots.learning_curve(CURVES, split, "loss", "x"))[:-6]

    assert ticks("train") == ticks("valid")


@pytest.mark.parametrize(
    "curves",
    [
        {name: curve(0.1, epochs=1) for name in ("bn", "plain")},
        {name: curve(0.0) for name in ("bn", "plain")},
    ],
    ids=["one epoch", "flat lines"],
)
@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_curves_at_the_edge_are_drawn(
    curves: dict[str, dict[str, plots.Floats]], measure: plots.Measure
) -> None:
    assert "batch norm" in texts(plots.learning_curve(curves, "train", measure, "train"))


def seed_runs(count: int, epochs: int = 3, gain: float = 0.015) -> SeedRuns:
    values = {
        name: 0.95 + 0.001 * np.arange(count) + (gain if name == "bn" else 0) for name in CURVES
    }

    def moments(of: Any) -> dict[str, Any]:
        return {"mean": of.mean(), "sd": of.std(ddof=1), "values": of.tolist()}

    content = {
        "seeds": count,
        "device": "cpu",
        **{
            n: {"test_accuracy": moments(v), "test_loss": moments(1 - v)} for n, v in values.items()
        },
        "bn_minus_plain": {
            "test_accuracy": moments(values["bn"] - values["plain"])
            | {"interval_95": (gain - 0.001, gain + 0.002)}
        },
    }
    epoch = np.arange(1.0, epochs + 1)
    curves = {
        name: {"valid_accuracy": v[:, None] - 0.01 / epoch, "valid_loss": (2 - v)[:, None] / epoch}
        for name, v in values.items()
    }
    return SeedRuns(SeedMetrics.model_validate(content), epoch, curves)


def strokes(svg: str, width: float) -> Counter[str]:
    """How many lines of this width there are in each colour."""
    styles = [path.get("style", "") for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    found = (re.match(r"fill: none; .*stroke: (#\w+)", s) for s in styles if f"width: {width}" in s)
    return Counter(match[1] for match in found if match)


def test_every_seed_is_a_thin_line_their_mean_a_thick_one_and_each_pair_is_joined() -> None:
    svg = plots.seeds(seed_runs(7), "valid")
    assert strokes(svg, 0.6) == {plots.BATCH_NORM: 7, plots.PLAIN: 7}
    assert strokes(svg, 2.4) == {plots.BATCH_NORM: 1, plots.PLAIN: 1}
    assert strokes(svg, 0.7)[plots.MUTED] == 7
    found = texts(svg)
    assert "Accuracy, valid: 7 seeds" in found
    for label, mean, end in (("batch norm", "96.5", "96.80"), ("plain", "95.0", "95.30")):
        assert found[found.index(label) + 1] == f"mean {mean}"
        assert found[found.index(end) + 1] == "± 0.22"


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.015, "mean +1.50 points, 95 % interval +1.40 to +1.70"),
        (-0.0005, "mean -0.05 points, 95 % interval -0.15 to +0.15"),
    ],
)
def test_picture_of_seeds_states_the_difference_and_its_interval(gain: float, said: str) -> None:
    svg = plots.seeds(seed_runs(2, epochs=1, gain=gain), "valid")
    title = ElementTree.fromstring(svg).findtext(f"{SVG}title") or ""
    assert said in title.replace("\N{MINUS SIGN}", "-")
    assert said.split(", ")[1] in [text.replace("\N{MINUS SIGN}", "-") for text in texts(svg)]


def test_networks_differ_by_more_than_colour() -> None:
    looks = plots.LOOKS.values()
    for aspect in ("colour", "line", "marker"):
        assert len({getattr(look, aspect) for look in looks}) == len(looks)


def test_overview_has_an_opaque_background() -> None:
    svg = plots.overview(CURVES, {"train": "train", "valid": "valid"})
    background = next(ElementTree.fromstring(svg).iter(f"{SVG}path"))
    assert background.get("style") == f"fill: {plots.SURFACE}"
    assert len([text for text in texts(svg) if text == "epoch"]) == 4


def test_confusion_shows_counts_and_colours_errors_only() -> None:
    matrix = np.diag([90, 80, 70])
    matrix[0, 2] = 7
    found = texts(plots.confusion(matrix, 7, "plain"))
    assert sorted(text for text in found if text.isdigit() and int(text) > 2) == [
        "7",
        "70",
        "80",
        "90",
    ]
    without = plots.confusion(np.diag([90, 80, 70]), 0, "plain")
    full = "#b97a97"  # STRONGEST of ERRORS on SURFACE
    assert full in plots.confusion(matrix, 7, "plain")
    assert full not in plots.confusion(matrix, 70, "plain")
    assert full not in without


@pytest.mark.parametrize(
    ("draw", "title"),
    [(plots.arriving_statistics, "what arrives"), (plots.leaving_statistics, "what leaves")],
)
def test_statistics_have_a_row_a_layer(
    draw: Callable[[dict[str, LayerStatistics]], str], title: str
) -> None:
    units = np.linspace(-1, 1, 5)
    layer = LayerStatistics(mean=units, deviation=units**2, scale=-units, shift=units)
    names = ("bn1", "bn2", "bn3")
    found = texts(draw(dict.fromkeys(names, layer)))
    assert [text for text in found if title in text] == [f"{name}: {title}" for name in names]


def test_arriving_is_drawn_from_the_statistics_and_leaving_from_scale_and_shift() -> None:
    units = np.linspace(-1, 1, 5)
    layer = LayerStatistics(mean=units, deviation=units**2, scale=units, shift=units)
    arriving, leaving = (plots.arriving_statistics, plots.leaving_statistics)
    usual = arriving({"bn1": layer}), leaving({"bn1": layer})
    for field, changed in (("deviation", 0), ("scale", 1), ("shift", 1)):
        other = {"bn1": replace(layer, **{field: getattr(layer, field) * 3})}
        differs = [arriving(other) != usual[0], leaving(other) != usual[1]]
        assert differs == [changed == 0, changed == 1]


def bars(svg: str) -> dict[str, list[float]]:
    """The heights of the filled, outlined shapes by their colour, in points."""
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
    svg = plots.error_histogram("bn.onnx", errors)
    found = bars(svg)
    assert found.keys() == {plots.BATCH_NORM, plots.ALARM}
    hundred, ten, one = found[plots.BATCH_NORM]
    assert hundred - ten == pytest.approx(ten - one, abs=1e-3)  # logarithmic
    assert one > 3  # points: a single image is seen
    assert found[plots.ALARM] == [pytest.approx(hundred)]
    assert {"bn.onnx: 211 images", "alarm at 8", "100 beyond"} <= set(texts(svg))


def test_histogram_says_that_nothing_is_beyond_the_alarm() -> None:
    errors = Histogram(edges=EDGES, counts=[12_345, *[0] * 16])
    svg = plots.error_histogram("bn-folded.onnx", errors)
    assert bars(svg).keys() == {plots.BATCH_NORM}
    assert {"bn-folded.onnx: 12,345 images", "none beyond"} <= set(texts(svg))
    title = ElementTree.fromstring(svg).findtext(f"{SVG}title")
    assert title == "bn-folded.onnx: largest error of each image, none beyond the alarm"


def test_histogram_of_no_images_is_drawn() -> None:
    svg = plots.error_histogram("bn.onnx", Histogram(edges=EDGES, counts=[0] * 17))
    assert bars(svg) == {}
    assert "bn.onnx: 0 images" in texts(svg)


def test_histograms_of_as_many_images_share_their_scale() -> None:
    def ticks(counts: list[int]) -> list[str]:
        svg = plots.error_histogram("x", Histogram(edges=EDGES, counts=counts))
        return [text for text in texts(svg) if re.fullmatch(r"[\d,]+", text)]

    assert ticks([500, *[0] * 16]) == ticks([*[30] * 16, 20])


def test_same_numbers_give_same_bytes_and_other_numbers_other_bytes() -> None:
    first, again, other = (
        plots.learning_curve({"bn": curve(loss), "plain": curve(0.2)}, "train", "loss", "train")
        for loss in (0.1, 0.1, 0.11)
    )
    assert first == again != other


def test_the_readers_matplotlibrc_changes_nothing() -> None:
    usual = plots.overview(CURVES, {"train": "train", "valid": "valid"})
    with mpl.rc_context({"font.size": 20, "axes.titlepad": 30, "svg.id": "mine"}):
        assert plots.overview(CURVES, {"train": "train", "valid": "valid"}) == usual
        assert mpl.rcParams["font.size"] == 20
