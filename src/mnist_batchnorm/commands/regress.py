"""Tool regress: what changed in the exported model's outputs since somebody last pinned them.

Two trainings of the same accuracy can disagree on many images; logits of fixed images show it. The
goldens lie in git beside the images they belong to. They are no output of the pipeline: only
``mnist-bn regress --update`` writes them, and ``git diff`` then shows what was accepted.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mnist_batchnorm.artifacts.goldens import PINNED, Goldens, load_fixture, save_goldens
from mnist_batchnorm.core.errors import CheckFailedError
from mnist_batchnorm.core.paths import GRAPHS, MODELS
from mnist_batchnorm.promotion.goldens import (
    TOLERANCE,
    Comparison,
    compare_with_goldens,
    pin,
)
from mnist_batchnorm.promotion.graph import Graph, load_graph


@dataclass(frozen=True)
class Finding:
    """What came of one graph.

    Attributes:
        graph: the file.
        path: of its network's goldens.
        goldens: what they hold.
        comparison: of the two.
    """

    graph: Graph
    path: Path
    goldens: Goldens
    comparison: Comparison


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the result as ``--json`` prints it."""
    return {
        "same": all(finding.comparison.same for finding in findings),
        "tolerance": TOLERANCE,
        "graphs": {
            finding.graph.path.name: {
                "same": finding.comparison.same,
                "sha256": finding.graph.sha256,
                "golden_sha256": finding.goldens.onnx_sha256.get(finding.graph.path.name),
                "weights_sha256": finding.graph.weights_sha256,
                "golden_weights_sha256": finding.goldens.weights_sha256,
                "goldens": {
                    "path": finding.path.as_posix(),
                    "computed_by": finding.goldens.computed_by,
                    "images": len(finding.goldens.images),
                },
                **asdict(finding.comparison),
            }
            for finding in findings
        },
    }


def describe(finding: Finding) -> str:
    """Say for people what changed in one graph's outputs, a few lines."""
    graph, goldens, comparison = finding.graph, finding.goldens, finding.comparison
    count = len(goldens.images)
    lines = [
        f"{graph.path}: {'same outputs' if comparison.same else 'OUTPUTS CHANGED'}",
        f"  made from    {_describe_origin(graph, goldens)}",
        f"  logits       largest change {comparison.max_change:.2g} of the row's largest logit, "
        f"median {comparison.median_change:.2g}; {comparison.images_beyond} of {count} images "
        f"beyond {TOLERANCE:g} (batch size {comparison.batch_size})",
        f"  predictions  {len(comparison.flips)} of {count} changed; right before "
        f"{comparison.right_before}, now {comparison.right_after}",
    ]
    lines += [
        f"    image {flip.index:>4}, a {flip.label}: {flip.before} -> {flip.after}, "
        f"margin {flip.margin_before:.3g} -> {flip.margin_after:.3g}"
        for flip in comparison.flips
    ]
    return "\n".join(lines)


def _describe_origin(graph: Graph, goldens: Goldens) -> str:
    if graph.sha256 == goldens.onnx_sha256.get(graph.path.name):
        return f"the very file that was pinned ({graph.sha256[:12]})"
    before, now = goldens.weights_sha256, graph.weights_sha256
    if before is None or now is None:
        return "weights that the file does not name"
    if before == now:
        return f"the pinned weights ({now[:12]}), but the file is another: exported anew"
    return f"other weights: pinned {before[:12]}, now {now[:12]}"


@click.command()
@click.option("--update", is_flag=True, help="Pin the present outputs as the golden ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(update: bool, as_json: bool) -> None:
    """Compare the outputs of models/bn.onnx, bn-folded.onnx and plain.onnx with the golden ones.

    Exit status: 0 the same but for rounding, 1 changed, 2 there is nothing to compare.
    """
    if update and as_json:
        raise click.UsageError("--update compares nothing, so there is no JSON to print.")
    split, images_sha256 = load_fixture()
    networks = {
        path: [load_graph(MODELS / name) for name, of in GRAPHS.items() if of.variant == variant]
        for variant, path in PINNED.items()
    }
    if update:
        pinned = {path: pin(graphs, split, images_sha256) for path, graphs in networks.items()}
        for path, graphs in networks.items():
            save_goldens(path, pinned[path])
            click.echo(f"{path}: pinned the outputs of {graphs[0].path} for {len(split)} images")
        return

    findings = []
    for path, graphs in networks.items():
        goldens, comparisons = compare_with_goldens(graphs, split, images_sha256, path)
        findings += [Finding(g, path, goldens, comparisons[g.path.name]) for g in graphs]
    if as_json:
        click.echo(json.dumps(to_json(findings), indent=2))
    else:
        for finding in findings:
            click.echo(describe(finding))
    changed: dict[Path, list[str]] = {}
    for finding in findings:
        if not finding.comparison.same:
            changed.setdefault(finding.path, []).append(finding.graph.path.name)
    if changed:
        differences = [
            f"{', '.join(names)}: outputs differ from {path}" for path, names in changed.items()
        ]
        raise CheckFailedError(
            f"{'; '.join(differences)}; if that is meant, pin them with `mnist-bn regress --update`"
        )
