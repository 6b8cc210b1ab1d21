"""Learning curves, of one run and of many seeds."""

import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from mnist_batchnorm.artifacts.seeds import SeedMetrics, SeedRuns
from mnist_batchnorm.core.arrays import Float64
from mnist_batchnorm.reporting.plots.curves import Measure, learning_curve, overview, seeds
from mnist_batchnorm.reporting.plots.style import BATCH_NORM, MUTED, PLAIN, SURFACE
from tests.support.svg import SVG, texts


def curve(loss: float, epochs: int = 3) -> dict[str, Float64]:
    epoch = np.arange(1.0, epochs + 1)
    return {
        "epoch": epoch,
        "train_loss": loss / epoch,
        "train_accuracy": 1 - loss / epoch,
        "valid_loss": 2 * loss / epoch,
        "valid_accuracy": 1 - 2 * loss / epoch,
    }


CURVES = {"bn": curve(0.1), "plain": curve(0.2)}


def test_learning_curve_labels_each_line_with_its_last_value() -> None:
    found = texts(learning_curve(CURVES, "valid", "accuracy", "valid (= test images)"))
    assert {"Accuracy, valid (= test images)", "epoch", "accuracy (%)"} <= set(found)
    for name, value in (("batch norm", "93.3"), ("plain", "86.7")):
        assert found[found.index(name) + 1] == value


def test_train_and_valid_share_their_scale() -> None:
    def ticks(split: str) -> list[str]:
        return texts(learning_curve(CURVES, split, "loss", "x"))[:-6]

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
    curves: dict[str, dict[str, Float64]], measure: Measure
) -> None:
    assert "batch norm" in texts(learning_curve(curves, "train", measure, "train"))


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
    """How many lines of this width there are in each color."""
    styles = [path.get("style", "") for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    found = (re.match(r"fill: none; .*stroke: (#\w+)", s) for s in styles if f"width: {width}" in s)
    return Counter(match[1] for match in found if match)


def test_every_seed_is_a_thin_line_their_mean_a_thick_one_and_each_pair_is_joined() -> None:
    svg = seeds(seed_runs(7), "valid")
    assert strokes(svg, 0.6) == {BATCH_NORM: 7, PLAIN: 7}
    assert strokes(svg, 2.4) == {BATCH_NORM: 1, PLAIN: 1}
    assert strokes(svg, 0.7)[MUTED] == 7
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
    svg = seeds(seed_runs(2, epochs=1, gain=gain), "valid")
    title = ElementTree.fromstring(svg).findtext(f"{SVG}title") or ""
    assert said in title.replace("\N{MINUS SIGN}", "-")
    assert said.split(", ")[1] in [text.replace("\N{MINUS SIGN}", "-") for text in texts(svg)]


def test_overview_has_an_opaque_background() -> None:
    svg = overview(CURVES, {"train": "train", "valid": "valid"})
    background = next(ElementTree.fromstring(svg).iter(f"{SVG}path"))
    assert background.get("style") == f"fill: {SURFACE}"
    assert len([text for text in texts(svg) if text == "epoch"]) == 4


def test_same_numbers_give_same_bytes_and_other_numbers_other_bytes() -> None:
    first, again, other = (
        learning_curve({"bn": curve(loss), "plain": curve(0.2)}, "train", "loss", "train")
        for loss in (0.1, 0.1, 0.11)
    )
    assert first == again != other


def test_the_readers_matplotlibrc_changes_nothing() -> None:
    usual = overview(CURVES, {"train": "train", "valid": "valid"})
    with mpl.rc_context({"font.size": 20, "axes.titlepad": 30, "svg.id": "mine"}):
        assert overview(CURVES, {"train": "train", "valid": "valid"}) == usual
        assert mpl.rcParams["font.size"] == 20
