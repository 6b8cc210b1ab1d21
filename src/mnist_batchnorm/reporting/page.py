"""The HTML report, the model card and their pictures."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mnist_batchnorm.artifacts.seeds import Moments
from mnist_batchnorm.artifacts.splits import CLASSES
from mnist_batchnorm.core.files import write_text
from mnist_batchnorm.core.params import Params
from mnist_batchnorm.core.paths import GRAPHS, VARIANTS
from mnist_batchnorm.core.templates import template_environment
from mnist_batchnorm.reporting.figures import (
    confident_mistakes,
    most_confused,
    off_diagonal,
    paired_difference,
    reliability,
    wilson_interval,
)
from mnist_batchnorm.reporting.plots import curves, diagrams, style
from mnist_batchnorm.reporting.results import Results

NAMES = {variant: look.label for variant, look in style.LOOKS.items()}
CSS_VARIABLES = {
    style.SURFACE: "surface",
    style.INK: "ink",
    style.MUTED: "muted",
    style.RULE: "rule",
    style.BATCH_NORM: "bn",
    style.PLAIN: "plain",
    style.ALARM: "bad",
}


def draw(results: Results) -> dict[str, str]:
    """Draw all pictures: SVG text by file name without suffix."""
    labels = results.split_labels
    by_network = {variant: network.curve for variant, network in results.networks.items()}
    measures: tuple[curves.Measure, ...] = ("loss", "accuracy")
    pictures = {
        f"{split}-{measure}": curves.learning_curve(by_network, split, measure, label)
        for split, label in labels.items()
        for measure in measures
    }
    pictures["curves"] = curves.overview(by_network, labels)
    pictures["seeds"] = curves.seeds(results.seeds, labels["valid"])
    strongest = most_confused(results)
    for variant, network in results.networks.items():
        title = f"{NAMES[variant]}: {network.test.errors:,} errors in {len(results.test):,}"
        pictures[f"confusion-{variant}"] = diagrams.confusion(network.confusion, strongest, title)
    bins = results.params.evaluate.calibration_bins
    pictures["calibration"] = diagrams.reliability_diagram(
        {v: reliability(n.probability, results.right(v), bins) for v, n in results.networks.items()}
    )
    pictures["statistics-arriving"] = diagrams.unit_statistics(results.layers, "arrives")
    pictures["statistics-leaving"] = diagrams.unit_statistics(results.layers, "leaves")
    for name, graph in results.parity.graphs.items():
        if (histogram := graph.summary.histogram) is not None:
            picture = f"parity-{name.removesuffix('.onnx')}"
            pictures[picture] = diagrams.error_histogram(name, histogram)
    return pictures


def inline(svg: str) -> str:
    """Adapt a picture to the page: scalable, accessible, in the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # not unique on the page, and not referenced
    for color, variable in CSS_VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def per_class(results: Results) -> list[dict[str, Any]]:
    """Compare the networks class by class, with the class that batch norm confuses it with most."""
    accuracy = {variant: n.per_class_accuracy for variant, n in results.networks.items()}
    errors = off_diagonal(results.networks["bn"].confusion)
    return [
        {
            "digit": digit,
            **{variant: accuracy[variant].get(digit) for variant in accuracy},
            "taken_for": int(errors[digit].argmax()),
            "times": int(errors[digit].max()),
        }
        for digit in range(CLASSES)
    ]


def shown_params(params: Params) -> dict[str, Any]:
    """Flatten the parameters that affect the results: ``train.lr`` -> 0.01."""
    sections = params.model_dump(include={"prepare", "train", "evaluate", "export"})
    return {
        f"{section}.{key}": ", ".join(map(str, value)) if isinstance(value, tuple) else value
        for section, values in sections.items()
        for key, value in values.items()
    }


def summarize(results: Results) -> dict[str, Any]:
    """Compute the values for the templates, by the names that they use."""
    right = {variant: results.right(variant) for variant in VARIANTS}
    graphs = results.parity.graphs
    files = [graph.summary for graph in graphs.values()]
    return {
        "results": results,
        "names": NAMES,
        "parity": results.parity,
        "proven": results.parity.proven,
        "worst_error": {
            variant: largest(
                graphs[name].summary.max_relative_error
                for name in graphs
                if GRAPHS[name].variant == variant
            )
            for variant in VARIANTS
        },
        "worst_sigmas": largest(file.worst_sigmas for file in files),
        "alarm": largest(file.alarm_sigmas for file in files),
        "difference": paired_difference(right["bn"], right["plain"]),
        "intervals": {
            variant: wilson_interval(r.sum(), len(r)).tolist() for variant, r in right.items()
        },
        "strongest": max(most_confused(results), 1),
        "per_class": per_class(results),
        "params": shown_params(results.params),
    }


def largest(figures: Iterable[float | None]) -> float | None:
    """Return the largest of the measured figures; None if none was measured."""
    return max((figure for figure in figures if figure is not None), default=None)


def render(results: Results, pictures: Mapping[str, str]) -> dict[str, str]:
    """Render the templates: texts by file name."""
    environment = template_environment("mnist_batchnorm.reporting")
    environment.filters |= {
        "measured": format_measured,
        "percent": format_percent,
        "spread": format_mean_sd,
        "points": curves.format_points,
        "plain_text": escape_markdown,
        "png_uri": style.png_uri,
    }
    summary = summarize(results)
    page = environment.get_template("index.html.j2").render(
        summary,
        pictures={name: inline(svg) for name, svg in pictures.items()},
        mistakes=confident_mistakes(results),
    )
    card = environment.get_template("model_card.md.j2").render(summary)
    return {"index.html": page, "model_card.md": card}


def format_measured(figure: float | None, form: str) -> str:
    """Format a figure of the gate, which writes 1e300 for NaN and infinity."""
    if figure is None:
        return "not measured"
    return "not finite" if figure >= 1e300 else format(figure, form)


def format_percent(share: float | None) -> str:
    """Format 0.9714 as ``97.14 %``, with a no-break space."""
    return "not measured" if share is None else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def format_mean_sd(moments: Moments, sign: str = "") -> str:
    """Format a share over seeds as mean ± sd in percent or points: ``97.23 ± 0.10``."""
    mean = format(100 * moments.mean, f"{sign}.2f").replace("-", "\N{MINUS SIGN}")
    return f"{mean} ± {100 * moments.sd:.2f}"


def escape_markdown(text: str) -> str:
    """Escape text for a cell of a Markdown table: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def write_report(results: Results, reports: Path) -> None:
    """Write ``plots/*.svg``, ``index.html`` and ``model_card.md``; same results, same bytes."""
    pictures = draw(results)
    for name, svg in pictures.items():
        write_text(reports / f"plots/{name}.svg", svg)
    for name, text in render(results, pictures).items():
        write_text(reports / name, text)
