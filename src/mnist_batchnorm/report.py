"""Stage report: the pictures, one self-contained page and the model card, from files on disk."""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib.image import imsave

from mnist_batchnorm import plots
from mnist_batchnorm.dataset import CLASSES
from mnist_batchnorm.files import write_text
from mnist_batchnorm.layout import GRAPHS, REPORTS, VARIANTS
from mnist_batchnorm.params import Params
from mnist_batchnorm.results import Floats, Moments, Results, read_results

NAMES = {variant: look.label for variant, look in plots.LOOKS.items()}
SHOWN_MISTAKES = 12
Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson_interval(successes: npt.ArrayLike, trials: npt.ArrayLike) -> Floats:
    """Return 95 % intervals of proportions, low and high, float64 ``[2, ...]``.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference": unlike
    the textbook interval it holds near 0 and 1, where these accuracies are.
    """
    trials = np.asarray(trials, dtype=np.float64)
    share = np.asarray(successes) / trials
    centre = share + Z95**2 / (2 * trials)
    spread = Z95 * np.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    ends: Floats = np.stack([centre - spread, centre + spread]) / (1 + Z95**2 / trials)
    return ends


@dataclass(frozen=True)
class PairedDifference:
    """Batch norm against plain, on the same test images.

    Attributes:
        difference: accuracy of batch norm minus accuracy of plain.
        low: lower end of the difference's 95 % interval.
        high: upper end.
        only_bn: images that only batch norm gets right.
        only_plain: images that only plain gets right.
    """

    difference: float
    low: float
    high: float
    only_bn: int
    only_plain: int


def paired_difference(bn: npt.NDArray[np.bool_], plain: npt.NDArray[np.bool_]) -> PairedDifference:
    """Compare two networks image by image.

    The interval is Wald's for paired proportions (Agresti, "Categorical Data Analysis",
    section on comparing dependent proportions): only the discordant images carry variance.

    Args:
        bn: ``[n]``, whether batch norm is right.
        plain: ``[n]``, whether plain is right.
    """
    n, only_bn, only_plain = len(bn), int((bn & ~plain).sum()), int((plain & ~bn).sum())
    difference = (only_bn - only_plain) / n
    error = math.sqrt(only_bn + only_plain - (only_bn - only_plain) ** 2 / n) / n
    return PairedDifference(
        difference, difference - Z95 * error, difference + Z95 * error, only_bn, only_plain
    )


def reliability(
    probability: Floats, correct: npt.NDArray[np.bool_], bins: int
) -> plots.Reliability:
    """Group images by confidence, in the calibration error's bins, leaving out empty ones.

    Args:
        probability: ``[n]``, of the predicted class.
        correct: ``[n]``, whether the prediction was right.
        bins: number of equal-width bins between 0 and 1; a bin includes its upper edge.
    """
    which = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(which, minlength=bins)
    right = np.bincount(which, weights=correct, minlength=bins)
    confidence = np.bincount(which, weights=probability, minlength=bins)
    held = images > 0
    counts = images[held]
    return plots.Reliability(
        confidence=confidence[held] / counts,
        accuracy=right[held] / counts,
        interval=wilson_interval(right[held], counts),
        images=counts,
    )


def off_diagonal(matrix: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a confusion matrix with the right answers set to zero."""
    return matrix * (1 - np.eye(len(matrix), dtype=np.int64))


def draw(results: Results) -> dict[str, str]:
    """Draw every picture; SVG text by file name."""
    labels = results.split_labels
    curves = {variant: network.curve for variant, network in results.networks.items()}
    measures: tuple[plots.Measure, ...] = ("loss", "accuracy")
    pictures = {
        f"{split}-{measure}": plots.learning_curve(curves, split, measure, label)
        for split, label in labels.items()
        for measure in measures
    }
    pictures["curves"] = plots.overview(curves, labels)
    pictures["seeds"] = plots.seeds(results.seeds, labels["valid"])
    strongest = most_confused(results)
    for variant, network in results.networks.items():
        title = f"{NAMES[variant]}: {network.test.errors:,} errors in {len(results.test):,}"
        pictures[f"confusion-{variant}"] = plots.confusion(network.confusion, strongest, title)
    bins = results.params.evaluate.calibration_bins
    pictures["calibration"] = plots.reliability_diagram(
        {
            variant: reliability(
                network.probability, network.predicted == results.test.labels, bins
            )
            for variant, network in results.networks.items()
        }
    )
    pictures["statistics-arriving"] = plots.arriving_statistics(results.layers)
    pictures["statistics-leaving"] = plots.leaving_statistics(results.layers)
    for name, graph in results.parity.graphs.items():
        if graph.summary.histogram is not None:
            pictures[f"parity-{name.removesuffix('.onnx')}"] = plots.error_histogram(
                name, graph.summary.histogram
            )
    return pictures


def most_confused(results: Results) -> int:
    """Return the largest count of one kind of error, the scale that both matrices share."""
    return max(int(off_diagonal(n.confusion).max()) for n in results.networks.values())


def inline(svg: str) -> str:
    """Prepare a picture for the page: scalable, accessible, its colours those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture, and nothing refers to it
    variables = {
        plots.SURFACE: "surface",
        plots.INK: "ink",
        plots.MUTED: "muted",
        plots.RULE: "rule",
        plots.BATCH_NORM: "bn",
        plots.PLAIN: "plain",
        plots.ALARM: "bad",
    }
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


@dataclass(frozen=True)
class Mistake:
    """A test image that batch norm gets wrong.

    Attributes:
        picture: PNG as a data URI, ink on paper.
        index: position in the IDX file.
        actual: the image's class.
        predicted: batch norm's answer.
        probability: batch norm's confidence in it.
        plain: the plain network's answer.
    """

    picture: str
    index: int
    actual: int
    predicted: int
    probability: float
    plain: int


def confident_mistakes(results: Results) -> list[Mistake]:
    """Return batch norm's most confident errors, the most confident first."""
    test, bn = results.test, results.networks["bn"]
    wrong = np.flatnonzero(bn.predicted != test.labels)
    worst = wrong[np.argsort(-bn.probability[wrong], kind="stable")][:SHOWN_MISTAKES]
    return [
        Mistake(
            picture=png_uri(test.images[i]),
            index=int(test.index[i]),
            actual=int(test.labels[i]),
            predicted=int(bn.predicted[i]),
            probability=float(bn.probability[i]),
            plain=int(results.networks["plain"].predicted[i]),
        )
        for i in worst
    ]


def png_uri(image: npt.NDArray[np.uint8]) -> str:
    """Encode a uint8 ``[28, 28]`` image, 255 = full ink, as dark ink on white paper."""
    png = io.BytesIO()
    unsigned: dict[str, Any] = {"Software": None}  # else Matplotlib writes its version
    imsave(png, image, cmap="gray_r", vmin=0, vmax=255, format="png", metadata=unsigned)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def per_class(results: Results) -> list[dict[str, Any]]:
    """Compare the networks class by class, with the class batch norm confuses it with most."""
    rows = []
    accuracy = {variant: n.per_class_accuracy for variant, n in results.networks.items()}
    errors = off_diagonal(results.networks["bn"].confusion)
    for digit in range(CLASSES):
        row = {variant: accuracy[variant].get(digit) for variant in accuracy}
        taken_for = int(errors[digit].argmax())
        rows.append(
            {
                "digit": digit,
                **row,
                "taken_for": taken_for,
                "times": int(errors[digit, taken_for]),
            }
        )
    return rows


def shown_params(params: Params) -> dict[str, Any]:
    """Flatten the parameters that decide the results: ``train.lr`` -> 0.01."""
    sections = params.model_dump(include={"prepare", "train", "evaluate", "export"})
    return {
        f"{section}.{key}": ", ".join(map(str, value)) if isinstance(value, tuple) else value
        for section, values in sections.items()
        for key, value in values.items()
    }


def summarize(results: Results) -> dict[str, Any]:
    """Compute what the page and the card say, by the names that the templates use."""
    labels = results.test.labels
    right = {variant: n.predicted == labels for variant, n in results.networks.items()}
    graphs = results.parity.graphs
    files = [graph.summary for graph in graphs.values()]
    return {
        "results": results,
        "names": NAMES,
        "parity": results.parity,
        "proven": results.parity.proven,
        "worst_error": {
            variant: largest(
                graph.summary.max_relative_error
                for name, graph in graphs.items()
                if GRAPHS[name].variant == variant
            )
            for variant in VARIANTS
        },
        "worst_sigmas": largest(file.worst_sigmas for file in files),
        "alarm": largest(file.alarm_sigmas for file in files),
        "difference": paired_difference(right["bn"], right["plain"]),
        "intervals": {
            variant: wilson_interval(r.sum(), len(labels)).tolist() for variant, r in right.items()
        },
        "strongest": max(most_confused(results), 1),
        "per_class": per_class(results),
        "params": shown_params(results.params),
    }


def largest(figures: Iterable[float | None]) -> float | None:
    """Return the largest of what was measured; None if nothing was."""
    return max((figure for figure in figures if figure is not None), default=None)


def render(results: Results, pictures: Mapping[str, str]) -> dict[str, str]:
    """Fill in the templates; the texts of ``index.html`` and ``model_card.md``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_batchnorm"),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "measured": measured,
        "percent": percent,
        "spread": spread,
        "points": plots.points,
        "plain_text": plain_text,
    }
    summary = summarize(results)
    page = environment.get_template("index.html.j2").render(
        summary,
        pictures={name: inline(svg) for name, svg in pictures.items()},
        mistakes=confident_mistakes(results),
    )
    card = environment.get_template("model_card.md.j2").render(summary)
    return {"index.html": page, "model_card.md": card}


def measured(figure: float | None, form: str) -> str:
    """Write a figure of the gate's by a format such as ``.1e``, or that there is none.

    For NaN and infinity, which JSON does not know, the gate writes 1e300.
    """
    if figure is None:
        return "not measured"
    return "not finite" if figure >= 1e300 else format(figure, form)


def percent(share: float | None) -> str:
    """Write 0.9714 as ``97.14 %``, with a space that does not break."""
    return "not measured" if share is None else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def spread(moments: Moments, sign: str = "") -> str:
    """Write a share over seeds as mean ± sd in percent or points: ``97.23 ± 0.10``."""
    mean = format(100 * moments.mean, f"{sign}.2f").replace("-", "\N{MINUS SIGN}")
    return f"{mean} ± {100 * moments.sd:.2f}"


def plain_text(text: str) -> str:
    """Make text mean itself in a Markdown table: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def report(results: Results, reports: Path) -> None:
    """Write ``plots/*.svg``, ``index.html`` and ``model_card.md``; same results, same bytes."""
    pictures = draw(results)
    for name, svg in pictures.items():
        write_text(reports / f"plots/{name}.svg", svg)
    for name, text in render(results, pictures).items():
        write_text(reports / name, text)


@click.command()
def command() -> None:
    """Draw the plots and write the HTML report and the model card (reports)."""
    results = read_results()
    report(results, REPORTS)
    accuracy = {variant: n.test.accuracy for variant, n in results.networks.items()}
    click.echo(f"test accuracy: batch norm {accuracy['bn']:.4f}, plain {accuracy['plain']:.4f}")
    click.echo(f"parity: {'proven' if results.parity.proven else 'NOT PROVEN'}")
    click.echo(f"read {REPORTS / 'index.html'}")
