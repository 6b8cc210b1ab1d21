"""TODO."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from mnist_batchnorm.artifacts.seeds import Moments
from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.files import write_text
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS
from mnist_batchnorm.reporting import plots
from mnist_batchnorm.reporting.figures import (
    confident_mistakes,
    most_confused,
    off_diagonal,
    paired_difference,
    reliability,
    wilson_interval,
)
from mnist_batchnorm.reporting.results import Results

NAMES = {variant: look.label for variant, look in plots.LOOKS.items()}


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
        loader=jinja2.PackageLoader("mnist_batchnorm.reporting"),
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
