"""Stage verify: no ONNX file leaves the pipeline that does not compute what training left."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from mnist_batchnorm.dataset import load_split, network_input
from mnist_batchnorm.errors import CheckFailedError
from mnist_batchnorm.files import digest, write_json, write_text
from mnist_batchnorm.layout import CHECKPOINT, GRAPHS, MODELS, REPORTS, TEST_SPLIT
from mnist_batchnorm.model import load_checkpoint
from mnist_batchnorm.parity import GraphReport, Reference, check_graph

REPORT = REPORTS / "parity.json"
ERRORS = REPORTS / "parity/errors.csv"


def verify(
    graphs: Sequence[Path], weights: Path, data: Path, batch_sizes: Sequence[int], limit: float
) -> tuple[dict[str, Any], dict[str, GraphReport]]:
    """Run the gate on each ONNX file, on all images of a split.

    Args:
        graphs: the ONNX files; by its name in `GRAPHS` each must be folded, or must not.
        weights: the checkpoint that they should be.
        data: the split.
        batch_sizes: images a call to ONNX Runtime.
        limit: largest error over the row's largest logit.

    Returns:
        The content of ``reports/parity.json``, and the report on each file by its name.

    Raises:
        UserError: A file is missing or is not what its name says.
    """
    checkpoint = load_checkpoint(weights)
    split = load_split(data)
    reference = Reference.compute(checkpoint.model(), network_input(split.images), split.labels)
    reports = {
        path.name: check_graph(
            path,
            weights,
            checkpoint,
            reference,
            batch_sizes,
            limit,
            folded=GRAPHS[path.name],
        )
        for path in graphs
    }
    content = {
        "parity": all(report.parity for report in reports.values()),
        "checkpoint": {"path": weights.as_posix(), "sha256": digest(weights)},
        "data": {"path": data.as_posix(), "sha256": digest(data), "images": len(split)},
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "torch", "numpy")},
        "accuracy": {
            "pytorch": _accuracy(reference.pytorch, split.labels),
            "float64": _accuracy(reference.exact, split.labels),
            **{name: report.outputs.get("accuracy") for name, report in reports.items()},
        },
        "graphs": {name: report.to_json() for name, report in reports.items()},
    }
    return content, reports


def _accuracy(logits: Any, labels: Any) -> float:
    return float(np.mean(logits.argmax(axis=1) == labels))


def error_table(reports: Mapping[str, GraphReport], images: int) -> str:
    """Return the CSV of each image's largest relative error in each file.

    One row an image of the split, in its order; empty where no pass measured the file.
    """
    rows = [",".join(["image", *reports])]
    for image in range(images):
        errors = (report.errors for report in reports.values())
        rows.append(
            ",".join([str(image), *("" if e is None else f"{e[image]:.3e}" for e in errors)])
        )
    return "\n".join(rows) + "\n"


@click.command()
def command() -> None:
    """Prove that ONNX Runtime computes what PyTorch computes (reports/parity.json, parity/)."""
    from mnist_batchnorm.params import load_params

    params = load_params().verify
    graphs = [MODELS / name for name in GRAPHS]
    content, reports = verify(
        graphs, CHECKPOINT, TEST_SPLIT, params.batch_sizes, params.max_relative_error
    )
    write_json(REPORT, content)
    write_text(ERRORS, error_table(reports, content["data"]["images"]))
    for name, report in reports.items():
        click.echo(f"{name}: {'parity' if report.parity else 'NO PARITY'}")
        for check in report.checks:
            click.echo(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.detail}")
    failed = [name for name, report in reports.items() if not report.parity]
    if failed:
        raise CheckFailedError(
            f"{', '.join(failed)} does not compute what {CHECKPOINT} computes; "
            f"every check with its evidence is in {REPORT}"
        )
